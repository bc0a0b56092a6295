"""What was seen of a bundle's engine after its export, written into its manifest."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from deploykit.bundle import Manifest, Status, open_bundle, write_manifest, writing
from deploykit.errors import BundleError
from deploykit.plain_files import open_plain


def record_status(
    folder: Path,
    ran: Manifest,
    status: Status,
    seen_on: dict[str, str],
    add: Callable[[Path], None] = lambda staging: None,
) -> Manifest:
    """Replace a bundle, in one step, by the same one with another status and machine in its manifest.

    Args:
        folder: the bundle.
        ran: the manifest of the engine that ran.
        status: what was seen of it.
        seen_on: the machine, the device and the versions.
        add: writes further files into it.

    Raises:
        BundleError: the bundle is damaged, is no longer the one that ran, or its folder cannot be written.
    """
    if open_bundle(folder) != ran:
        raise _replaced(folder)
    with writing(folder, overwrite=True) as staging:
        for name in ran.files:
            target = staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with open_plain(folder / name, follow=True) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)
        add(staging)
        written = write_manifest(staging, replace(ran, status=status, seen_on=seen_on))
        if any(written.files[name] != digest for name, digest in ran.files.items()):
            raise _replaced(folder)
        return written


def _replaced(folder: Path) -> BundleError:
    return BundleError(
        f"the bundle {folder} was replaced while its engine ran, so nothing is recorded. "
        "Fix: run deploykit verify again."
    )
