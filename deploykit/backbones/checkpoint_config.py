"""What a checkpoint says of itself beside its tensors: architecture, classes, preprocessing, class names.

Read from timm's configuration (a ``config.json`` beside the file, or the metadata of a safetensors file), from the
arguments that timm's training script saves, and from a list of classes in a torch file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from deploykit.errors import SpecError, WeightsError
from deploykit.labels import parse_labels
from deploykit.spec import Preprocessing

CONFIG_FILE = "config.json"
LABEL_KEYS = ("label_names", "id2label", "class_names", "classes", "labels", "class_to_idx", "idx_to_class")
_PREPROCESSING = tuple(field.name for field in fields(Preprocessing))
_SIZES = ("input_size", "img_size")
_SYNSET = re.compile(r"n\d{8}")
_TIMM_ARGUMENTS = ("model", "mean", "std", "interpolation", "crop_pct")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a checkpoint says of itself; None, or an empty ``preprocessing``, where it says nothing.

    ``preprocessing`` holds the fields that it names. ``says_preprocessing`` is also true where it says that the
    architecture's own is meant.
    """

    source: str = ""
    architecture: str | None = None
    num_classes: int | None = None
    image_size: tuple[int, int] | None = None
    preprocessing: Mapping[str, Any] | None = None
    labels: tuple[str, ...] | None = None

    @property
    def says_preprocessing(self) -> bool:
        """Whether the file says how its images were prepared."""
        return self.preprocessing is not None


def read_config(path: Path, content: Mapping[str, object], metadata: Mapping[str, str]) -> CheckpointConfig:
    """Find what a checkpoint says of itself, the nearest place first.

    Args:
        path: the checkpoint; ``config.json`` is looked for beside it.
        content: what a torch file holds; a safetensors file's tensors.
        metadata: the header of a safetensors file.

    Raises:
        WeightsError: a configuration that is not readable, or with values that cannot be.
    """
    found = _of_metadata(path, metadata) or _of_file(path.parent / CONFIG_FILE) or _of_torch(path, content)
    return found or CheckpointConfig()


def _of_metadata(path: Path, metadata: Mapping[str, str]) -> CheckpointConfig | None:
    flat: dict[str, object] = {}
    for key, text in metadata.items():
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if isinstance(value, dict) and key not in ("pretrained_cfg", "id2label", "label_descriptions", "class_to_idx"):
            flat = {**flat, **value}
        else:
            flat[key] = value
    return _of_mapping(flat, f"the metadata of {path.name}")


def _of_file(path: Path) -> CheckpointConfig | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path}, beside the checkpoint, is not readable JSON ({error}). Repair it, or move it away."
        ) from error
    return _of_mapping(content, str(path)) if isinstance(content, dict) else None


def _of_torch(path: Path, content: Mapping[str, object]) -> CheckpointConfig | None:
    said = {key: content[key] for key in LABEL_KEYS if key in content}
    arguments = content.get("args")
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    if isinstance(arguments, Mapping) and all(name in arguments for name in _TIMM_ARGUMENTS):
        said |= {name: value for name, value in arguments.items() if value not in (None, "", [])}
        said["architecture"] = arguments["model"]
        said["pretrained_cfg"] = {key: said[key] for key in (*_PREPROCESSING, *_SIZES) if key in said}
    if isinstance(content.get("arch"), str):
        said["architecture"] = content["arch"]
    return _of_mapping(said, f"{path.name}", trusted=False)


def _of_mapping(said: Mapping[str, object], source: str, *, trusted: bool = True) -> CheckpointConfig | None:
    """Return a configuration of timm's, nested or flat; None where it is none.

    ``trusted``: a value that cannot be is an error; otherwise it was meant for something else.
    """
    nested = said.get("pretrained_cfg")
    inner: Mapping[str, object] = nested if isinstance(nested, Mapping) else said
    labels = _labels({**inner, **said}, source, trusted=trusted)
    architecture = said.get("architecture", inner.get("architecture"))
    if nested is None and architecture is None and labels is None and not ({"mean", "std"} & said.keys()):
        return None
    preprocessing = {name: inner[name] for name in _PREPROCESSING if inner.get(name) not in (None, "")}
    says = isinstance(nested, Mapping) or bool(preprocessing)
    return CheckpointConfig(
        source=source,
        architecture=architecture if isinstance(architecture, str) else None,
        num_classes=_count(said.get("num_classes", inner.get("num_classes")), source),
        image_size=_size(inner),
        preprocessing=_checked(preprocessing, source) if says else None,
        labels=labels,
    )


def _checked(preprocessing: Mapping[str, Any], source: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = {
            name: tuple(map(float, value)) if name in ("mean", "std") else value
            for name, value in preprocessing.items()
        }
        Preprocessing(**values)
    except (SpecError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{source} does not say how images are prepared: {str(error).rstrip('.')}. "
            "Fix: correct it, or take it away and give preprocessing=."
        ) from error
    return values


def _count(value: object, source: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise WeightsError(f"{source} says num_classes={value!r}; expected a number of classes. Repair it.")
    return value


def _size(inner: Mapping[str, object]) -> tuple[int, int] | None:
    """Return ``input_size`` (C, H, W) or ``img_size``, in pixels."""
    size = inner.get("input_size") or (3, inner.get("img_size"), inner.get("img_size"))
    if isinstance(size, Sequence) and len(size) == 3 and all(isinstance(side, int) and side > 0 for side in size):
        return size[1], size[2]
    return None


def _labels(said: Mapping[str, object], source: str, *, trusted: bool) -> tuple[str, ...] | None:
    for key in LABEL_KEYS:
        value = said.get(key)
        if not isinstance(value, (Mapping, list, tuple)) or not value:
            continue
        try:
            names = parse_labels(value)
        except SpecError as error:
            if trusted and key in ("label_names", "id2label"):
                raise WeightsError(f"{source}, {key}: {error}") from error
            continue
        if all(name == f"LABEL_{index}" for index, name in enumerate(names)):
            continue
        descriptions = said.get("label_descriptions")
        if isinstance(descriptions, Mapping) and all(_SYNSET.fullmatch(name) for name in names):
            return tuple(str(descriptions.get(name, name)) for name in names)
        return names
    return None
