"""Engines that are machine code, which runs with the user's rights when it is opened: whose they are.

What this user's deploykit makes on this machine is remembered by its digest, in the store. Other machine code is
opened with a warning, in silence (``trust=True``), or not at all (``trust=False``).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.errors import SpecError, TrustWarning, UntrustedEngine
from deploykit.manifest import FileRecord, Manifest, engine_parts

if TYPE_CHECKING:
    from deploykit.store import Address

KIND = "own-engines"

_made_here: set[str] = set()


def remember_engine(manifest: Manifest) -> None:
    """Remember that this user made the engine of a bundle here; without a store, for this process alone."""
    from deploykit.store import Store

    parts = engine_parts(manifest.engine, manifest.files)
    where = _address(manifest.engine, {name: manifest.files[name] for name in parts})
    _made_here.add(where.key)
    Store().save(where, b"")


def is_own(engine: str, files: Mapping[str, FileRecord]) -> bool:
    """Return whether this user's deploykit made an engine on this machine."""
    from deploykit.store import Store

    where = _address(engine, files)
    if where.key in _made_here:
        return True
    try:
        return Store().load(where) is not None
    except SpecError:  # DEPLOYKIT_CACHE names no folder
        return False


def check_trust(folder: Path, engine: str, files: Mapping[str, FileRecord], trust: bool | None) -> None:
    """Say that an engine is machine code from elsewhere, or refuse it.

    Args:
        folder: the bundle, for messages.
        engine: the engine's file.
        files: the engine's files, by name.
        trust: True: what the user says of its source, so that nothing is asked; False: refuse what is not the user's
            own; None: open it with a warning.

    Raises:
        UntrustedEngine: it is refused.
    """
    if trust or is_own(engine, files):
        return
    what = (
        f"{folder} holds machine code ({engine}) that was not made by this user's deploykit on this machine, and "
        "machine code runs with all your rights when it is opened"
    )
    if trust is False:
        raise UntrustedEngine(f"{what}. It is not opened. Fix: export the bundle here, or pass trust=True.")
    warnings.warn(
        f"{what}. Open it only if you trust whoever made it: trust=True says so, trust=False refuses it.",
        TrustWarning,
        stacklevel=4,
    )


def _address(engine: str, files: Mapping[str, FileRecord]) -> Address:
    from deploykit.store import address  # most engines are no code, and open sooner without

    digests = {name: record.sha256 for name, record in files.items()}
    return address(KIND, {"files": digests}, title=engine)
