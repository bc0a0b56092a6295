"""Search a folder for image files, following links, and say what was left out and why."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploykit.errors import CalibrationError
from deploykit.images.decode import kind_of_content, shown
from deploykit.plain_files import kind_of

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
    | {".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Files with these are images, and an error where they cannot be read; others are where their content says so."""
COMPANION_SUFFIXES = frozenset(
    {".csv", ".db", ".html", ".ini", ".json", ".log", ".md", ".npy", ".npz", ".py", ".toml", ".tsv", ".txt"}
    | {".xml", ".yaml", ".yml"}
)
"""Files that lie beside images and are none: their number is logged, and nobody is warned of them."""
RESOURCE_FORK = "._"
"""How macOS names what it keeps beside a file on other disks and in archives: ``._cat.jpg`` is no image."""
NAMED = 20
"""How many files a message names; it counts the others."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A file or folder that was not taken; ``expected`` where it lies beside images as a rule."""

    path: Path
    reason: str
    expected: bool = False


@dataclass(frozen=True, kw_only=True)
class FoundImages:
    """The image files below a folder, sorted, and everything else in it."""

    files: tuple[Path, ...]
    left_out: tuple[LeftOut, ...]


def find_images(folder: Path) -> FoundImages:
    """List every image file below a folder, also behind links, each folder once.

    A file is an image by its suffix (`IMAGE_SUFFIXES`), or by its first bytes where it has another suffix.

    Raises:
        CalibrationError: a folder cannot be listed.
    """
    files: list[Path] = []
    left_out: list[LeftOut] = []
    for entry in _walk(folder, left_out):
        reason = _why_not(entry)
        if reason is None:
            files.append(entry)
        else:
            left_out.append(LeftOut(path=entry, reason=reason, expected=_is_companion(entry)))
    found = FoundImages(files=tuple(sorted(files)), left_out=tuple(left_out))
    if left_out:
        logger.info("%s", describe_left_out(found.left_out))
    return found


def describe_left_out(left_out: tuple[LeftOut, ...]) -> str:
    """Count and name what was left out: ``"2 files were left out: a.heic (HEIC), b.eps (PostScript)"``."""
    named = ", ".join(f"{shown(each.path)} ({each.reason})" for each in left_out[:NAMED])
    more = f", and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
    files = "1 file was" if len(left_out) == 1 else f"{len(left_out)} files were"
    return f"{files} left out of the images: {named}{more}."


def _walk(folder: Path, left_out: list[LeftOut]) -> Iterator[Path]:
    """Yield every path below a folder that is no folder; real folders first, so that a link to one adds nothing."""
    seen: set[tuple[int, int]] = set()
    pending = [folder]
    links: list[Path] = []
    while pending or links:
        current = pending.pop() if pending else links.pop(0)
        identity, entries = _listed(current)
        if identity in seen:
            left_out.append(LeftOut(path=current, reason="a link to a folder that is read already", expected=True))
            continue
        seen.add(identity)
        for entry in entries:
            if not _is_folder(entry):
                yield entry
            elif entry.is_symlink():
                links.append(entry)
            else:
                pending.append(entry)


def _listed(folder: Path) -> tuple[tuple[int, int], list[Path]]:
    """Return what tells a folder from every other, and its entries, sorted."""
    try:
        found = folder.stat()
        return (found.st_dev, found.st_ino), sorted(folder.iterdir())
    except OSError as error:
        raise CalibrationError(
            f"{shown(folder)}: cannot be listed ({error.strerror}). Fix: make it readable, or take it out."
        ) from error


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError:  # a link that is broken, or leads to itself
        return False


def _is_companion(path: Path) -> bool:
    return path.suffix.lower() in COMPANION_SUFFIXES or path.name.startswith(".")


def _why_not(path: Path) -> str | None:
    """Why a path is not an image file; None where it is one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"a broken link: {error.strerror}" if path.is_symlink() else str(error.strerror)
    kind = kind_of(mode)
    if kind is not None:
        return kind
    if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(RESOURCE_FORK):
        return None
    if path.suffix.lower() in COMPANION_SUFFIXES:
        return "not an image"
    try:
        with path.open("rb") as file:
            prefix = os.read(file.fileno(), 32)
    except OSError as error:
        return str(error.strerror)
    form, is_read = kind_of_content(prefix)
    return None if is_read else form or "not an image"
