"""Opening a bundle's engine: the one way in for a device, which imports nothing that only an export needs."""

from __future__ import annotations

import os
from typing import Any

from deploykit.arguments import check_arguments
from deploykit.backends.runtime import Runtime
from deploykit.backends.table import backend_of
from deploykit.bundle import open_bundle
from deploykit.errors import EngineMismatch
from deploykit.names import path_of
from deploykit.threads import Hint, check_threads, checked_hint
from deploykit.unset import UNSET


def load_bundle(
    folder: str | bytes | os.PathLike[str],
    *,
    device: str = "auto",
    threads: int | None = None,
    hint: Hint = "latency",
    trust: bool | None = None,
    signed_by: str | os.PathLike[str] | None = None,
    tuned: bool = True,
) -> Runtime:
    """Verify a bundle and open its engine; needs the runtime's package and NumPy, not torch.

    The engine is opened from the bytes that were verified: a bundle that is replaced meanwhile gives the old one, the
    new one or an error.

    Args:
        folder: the bundle.
        device: where it runs; ``"auto"`` is the runtime's first device.
        threads: as for `deploykit.facade.create_backbone`.
        hint: as for `deploykit.facade.create_backbone`.
        trust: as for `deploykit.facade.create_backbone`.
        signed_by: as for `deploykit.facade.create_backbone`.
        tuned: open it as ``deploykit tune`` measured best for it here, where it did and no ``threads`` are given;
            ``model.tuned`` says how.

    Raises:
        BundleError: not a bundle, or one that is damaged, incomplete or from a newer schema.
        UntrustedEngine: ``trust`` is False, and the engine is machine code from elsewhere; or it is not signed by
            ``signed_by``.
        MissingDependency: the runtime's package is not installed.
        IncompatibleEngine, DeviceUnavailable: the engine cannot run here.
    """
    check_arguments(load_bundle, locals())
    path = path_of(folder)
    manifest = open_bundle(path, leave_engine=True)  # the adapter verifies what it reads
    if signed_by is not None:
        from deploykit.signatures import check_signature

        check_signature(path, manifest, signed_by)
        trust = True if trust is None else trust
    adapter = backend_of(manifest).load_adapter()
    tuning = UNSET if tuned else None
    opened: dict[str, Any] = {"device": device, "threads": check_threads(threads), "hint": checked_hint(hint)}
    try:
        return adapter(manifest, path, **opened, trust=trust, tuning=tuning)
    except EngineMismatch:
        open_bundle(path)  # names everything that is wrong with it; nothing where it was replaced meanwhile
        raise
