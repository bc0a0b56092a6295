"""Class names: of the label sets that deploykit knows, and of the user's own classes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, SupportsIndex, TypeAlias

from deploykit.errors import BundleError, SpecError

LABELS_FILE = "labels.txt"
"""The class names in a bundle, one a line."""

MOST_BYTES = 1 << 26
"""How large a label file may be: a million classes with long names."""

LABEL_FILES: dict[str, str] = {"imagenet-1k": "imagenet_labels.txt"}
"""Label set to its file in deploykit/data: one name a line, in the order of the class index."""

LabelSource: TypeAlias = "str | os.PathLike[str] | Sequence[str] | Mapping[Any, object]"
"""A file; names in index order; or a mapping between index and name, either way round."""


@cache
def class_labels(label_set: str | None) -> tuple[str, ...] | None:
    """Return the class names in index order; None where there is no such label set.

    ``label_set`` is ``BackboneSpec.label_set``, None for weights whose classes have no known names.
    """
    if label_set not in LABEL_FILES:
        return None
    from importlib import resources  # a bundle has its own names, and opens sooner without

    text = resources.files("deploykit").joinpath("data", LABEL_FILES[label_set]).read_text(encoding="utf-8")
    return tuple(text.splitlines())


def decode_labels(content: bytes, path: Path, num_classes: int) -> tuple[str, ...]:
    """Decode the class names that a bundle carries.

    Args:
        content: of the file, one name a line.
        path: the file, for messages.
        num_classes: of the classifier.

    Raises:
        BundleError: not one name for each class, or no text.
    """
    try:
        text = content.decode("utf-8")
    except ValueError as error:
        raise BundleError(
            f"{path} cannot be read ({error}). Fix: export the bundle again, or copy it again."
        ) from error
    labels = tuple(text.removesuffix("\n").split("\n"))
    if len(labels) != num_classes:
        raise BundleError(
            f"{path} has {len(labels)} names and the model {num_classes} classes. Export the bundle again."
        )
    return labels


def parse_labels(source: LabelSource) -> tuple[str, ...]:
    """Read class names in index order.

    Args:
        source: names; ``{0: "cat"}`` or ``{"cat": 0}``; or a file that holds one name a line, a JSON list, or
            a JSON object of either kind.

    Raises:
        SpecError: a file that is not there or is not text, a gap in the indices, or names that are not text.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return _names(_read(path), f"the label file {path}")
    return _names(source, "labels")


def check_count(labels: Sequence[str], num_classes: int) -> None:
    """Refuse class names that are not one for each class.

    Raises:
        SpecError: says both counts.
    """
    if num_classes == 0:
        raise SpecError("labels were given, and the backbone has no classes (num_classes=0). Leave labels out.")
    if len(labels) != num_classes:
        raise SpecError(
            f"there are {len(labels)} labels and the classifier has {num_classes} classes. "
            "Give one name for each class, in the order of the classifier's outputs."
        )


def folder_labels(folder: Path, files: Iterable[Path], num_classes: int) -> tuple[str, ...] | None:
    """Take the class names from a folder with one subfolder a class, in the order of torchvision's ImageFolder.

    Args:
        folder: the folder that was searched for images.
        files: the images that were found in it.
        num_classes: of the classifier.

    Returns:
        The names of the subfolders, sorted; None where they are not as many as the classes, or where an
        image lies outside of them.
    """
    inside = {file.relative_to(folder).parts for file in files if file.is_relative_to(folder)}
    if not inside or any(len(parts) < 2 for parts in inside):
        return None
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    return tuple(names) if len(names) == num_classes and {parts[0] for parts in inside} == set(names) else None


def _read(path: Path) -> object:
    try:
        with path.open("rb") as file:  # also a pipe, as a shell makes of <(command)
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise SpecError(f"the label file {path} has more than {MOST_BYTES} bytes. Give a file of class names.")
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, ValueError) else error.strerror
        raise SpecError(
            f"the label file {path} cannot be read: {reason}. Give a text file with one class name a line, or JSON."
        ) from error
    named_json = path.suffix.lower() == ".json"
    if named_json or text.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except ValueError as error:
            if named_json:
                raise SpecError(
                    f"the label file {path} is not JSON: {error}. Give a list of names, or an object of index to name."
                ) from error
    return [line.strip() for line in text.rstrip().splitlines()]


def _names(source: object, where: str) -> tuple[str, ...]:
    names = _in_order(source, where) if isinstance(source, Mapping) else source
    if not isinstance(names, Iterable) or isinstance(names, (str, bytes)):
        raise SpecError(f"{where}: got {type(source).__name__}; expected names, or a mapping between index and name.")
    listed = list(names)
    for index, name in enumerate(listed):
        if not isinstance(name, str) or not name.strip() or len(name.splitlines()) != 1:
            raise SpecError(f"{where}: the name of class {index} is {name!r}; expected one line of text.")
    if not listed:
        raise SpecError(f"{where}: no class names; expected one for each class.")
    return tuple(name.strip() for name in listed)


def _in_order(mapping: Mapping[Any, object], where: str) -> list[object]:
    """Return the names of a mapping between index and name, by index."""
    pairs = [(_index(value), key) if _index(key) is None else (_index(key), value) for key, value in mapping.items()]
    by_index = {index: name[-1] if isinstance(name, list) and name else name for index, name in pairs}
    if len(by_index) != len(mapping) or set(by_index) != set(range(len(mapping))):
        raise SpecError(
            f"{where}: the indices are {_shown(by_index)}; expected 0 to {len(mapping) - 1}, each once, "
            'as in {"0": "cat", "1": "dog"}.'
        )
    return [by_index[index] for index in range(len(mapping))]


def _index(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdecimal() else None
    return int(value) if isinstance(value, SupportsIndex) else None


def _shown(indices: Iterable[int | None]) -> str:
    listed = list(indices)
    return ", ".join(map(str, listed[:10])) + (", ..." if len(listed) > 10 else "")
