"""What was seen of a bundle's engine after its export, written into its manifest."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from deploykit.bundle import Manifest, Status, open_bundle, write_manifest, writing


def record_status(folder: Path, status: Status, seen_on: dict[str, str]) -> Manifest:
    """Replace a bundle, in one step, by the same one with another status and machine in its manifest.

    Raises:
        BundleError: the bundle is damaged, or its folder cannot be written.
    """
    manifest = replace(open_bundle(folder), status=status, seen_on=seen_on)
    with writing(folder, overwrite=True) as staging:
        for name in manifest.files:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, staging / name)
        return write_manifest(staging, manifest)
