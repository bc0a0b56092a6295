"""Class names by label set, read from the package's data."""

from __future__ import annotations

from functools import cache
from importlib import resources

LABEL_FILES: dict[str, str] = {"imagenet-1k": "imagenet_labels.txt"}
"""Label set to its file in deploykit/data: one name a line, in the order of the class index."""


@cache
def class_labels(label_set: str | None) -> tuple[str, ...] | None:
    """The class names in index order; None where there is no such label set.

    ``label_set`` is ``BackboneSpec.label_set``, None for weights whose classes have no known names.
    """
    if label_set not in LABEL_FILES:
        return None
    text = resources.files("deploykit").joinpath("data", LABEL_FILES[label_set]).read_text(encoding="utf-8")
    return tuple(text.splitlines())
