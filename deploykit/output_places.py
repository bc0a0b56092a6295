"""Where results may be written: never into a bundle, which would not open with a file that is not its own."""

from __future__ import annotations

import os
from pathlib import Path

from deploykit.bundle_files import is_litter, is_manifest
from deploykit.errors import SpecError, StorageError
from deploykit.manifest import MANIFEST, MANIFEST_DIGEST


def check_outside_bundles(path: Path) -> None:
    """Refuse a place below a bundle, links followed; names that a bundle leaves alone, as README.md, are free.

    Raises:
        SpecError: it is below one.
    """
    place = Path(os.path.realpath(path))
    for folder in place.parents:
        if is_manifest(folder / MANIFEST) and is_manifest(folder / MANIFEST_DIGEST):
            if is_litter(place.relative_to(folder).as_posix()):
                return
            raise SpecError(
                f"{path} lies in the bundle {folder}, which would not open with files that are not its own. "
                "Choose a place outside of it."
            )


def check_result_file(path: Path, what: str) -> None:
    """Refuse, before any work, a file that cannot be written; ``what`` it holds goes into the message.

    Raises:
        StorageError: it is a folder, or lies in none that exists.
        SpecError: it lies in a bundle.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise StorageError(
            f"the {what} {path} cannot be written: it is a folder, or lies in none that exists. Choose another file."
        )
    check_outside_bundles(path)
