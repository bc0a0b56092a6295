"""What backbone is asked for: the options of `create_backbone` that decide the module, before any weights are read.

An option that a checkpoint can answer is `UNSET` where it was not given. Nothing here imports torch, so the
command line can read it.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, SupportsIndex, TypeAlias

from deploykit.errors import SpecError, nearest
from deploykit.labels import LabelSource
from deploykit.spec import InputSpec, Preprocessing, SizeRange, parse_image_sizes
from deploykit.unset import UNSET, Unset

Pretrained: TypeAlias = bool | str | Path
"""True, the tag of some weights, or a checkpoint file."""


@dataclass(frozen=True, kw_only=True)
class BackboneRequest:
    """The shape of a backbone, its weights, its class names and its preprocessing, as they were asked for.

    Args:
        features_only: return feature maps by level; not given: where ``hierarchical`` asks for a pyramid.
        output_indices: which levels; None: all.
        output_stride: 8, 16 or 32.
        num_classes: outputs of the classifier, 0 for the embedding; not given: those of the weights.
        in_channels: channels of the images; not given: those of the weights.
        image_size: (height, width) in pixels; None: that of the weights. Of a range, its ``opt``.
        image_sizes: the range, where ``image_size`` is given as one.
        patch_size: another patch for a plain ViT.
        hierarchical: a pyramid from a plain ViT.
        pretrained: True, a tag, or a checkpoint file.
        checkpoint_key: which of several state dicts in the file, as ``"state_dict_ema"``.
        new_head: draw a new classifier for ``num_classes`` in place of the file's.
        labels: the class names; None: those of the weights.
        preprocessing: how images were prepared in training, or some of its fields; None: as the weights say.
    """

    features_only: bool | Unset = UNSET
    output_indices: tuple[int, ...] | None = None
    output_stride: int = 32
    num_classes: int | Unset = UNSET
    in_channels: int | Unset = UNSET
    image_size: tuple[int, int] | None = None
    image_sizes: SizeRange | None = None
    patch_size: int | None = None
    hierarchical: bool | str = False
    pretrained: Pretrained = False
    checkpoint_key: str | None = None
    new_head: bool = False
    labels: LabelSource | None = None
    preprocessing: Preprocessing | Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        for name in ("num_classes", "in_channels", "output_stride", "patch_size"):
            value = getattr(self, name)
            if value is not UNSET and value is not None:
                object.__setattr__(self, name, _as_int(name, value))
        for name in ("features_only", "new_head"):
            value = getattr(self, name)
            if value is not UNSET and not isinstance(value, bool):
                raise SpecError(f"{name} is {value!r}; give True or False.")
        if self.checkpoint_key is not None and not isinstance(self.checkpoint_key, str):
            raise SpecError(f"checkpoint_key is {self.checkpoint_key!r}; give the name of a state dict in the file.")
        object.__setattr__(self, "output_indices", _indices(self.output_indices))
        if self.image_size is not None:
            size = parse_image_sizes(self.image_size)
            if isinstance(size, SizeRange):
                object.__setattr__(self, "image_sizes", size)
                size = size.best
            object.__setattr__(self, "image_size", size)
        if isinstance(self.pretrained, os.PathLike):
            object.__setattr__(self, "pretrained", Path(self.pretrained))
        if self.preprocessing is not None:
            _check_preprocessing(self.preprocessing)

    @property
    def gives_features(self) -> bool:
        """Whether a call returns feature maps; a pyramid was asked for to be returned."""
        return bool(self.hierarchical) if self.features_only is UNSET else self.features_only

    @property
    def gives_logits(self) -> bool:
        """Whether a call returns logits of the weights' own classifier."""
        return not (self.gives_features or self.num_classes == 0 or self.new_head)

    def given(self) -> set[str]:
        """Return the options whose value is not their default."""
        return {field.name for field in fields(self) if getattr(self, field.name) is not field.default}


def make_request(**options: Any) -> BackboneRequest:
    """Return a request from keyword arguments.

    Raises:
        SpecError: an option that there is not, with the nearest; or a value that it cannot have.
    """
    # image_sizes is taken from a range in image_size, and is no option.
    known = [field.name for field in fields(BackboneRequest) if field.name != "image_sizes"]
    for name in options:
        if name not in known:
            raise SpecError(f"there is no option {name!r} for a backbone. {nearest(name, known)} See create_backbone.")
    return BackboneRequest(**options)


def is_module(name: object) -> bool:
    """Return whether a backbone was given as a torch module; torch itself is not needed to tell."""
    return hasattr(name, "state_dict")


def _as_int(name: str, value: object) -> int:
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        return operator.index(value)
    raise SpecError(f"{name} is {value!r}; give an int.")


def _indices(given: object) -> tuple[int, ...] | None:
    if given is None:
        return None
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
        raise SpecError(f"output_indices is {given!r}; give level indices, such as (2, 3, 4).")
    return tuple(_as_int("one of output_indices", index) for index in given)


def completed(given: Preprocessing | Mapping[str, object], spec: InputSpec) -> Preprocessing:
    """Return a preprocessing, with the fields that were not given from what the model has.

    One number as ``mean`` or ``std`` is that of every channel.

    Raises:
        SpecError: a mean and standard deviation for other channels than the model's, or values that cannot be.
    """
    whole = given if isinstance(given, Preprocessing) else _changed(spec.preprocessing, given, spec.channels)
    if len(whole.mean) != spec.channels:
        raise SpecError(
            f"the preprocessing has mean and std for {len(whole.mean)} channels, and the backbone takes "
            f"{spec.channels}. Give one value for each channel."
        )
    return whole


def _changed(preprocessing: Preprocessing, given: Mapping[str, object], channels: int) -> Preprocessing:
    values: dict[str, Any] = dict(given)  # checked by Preprocessing
    try:
        for name in values.keys() & {"mean", "std"}:
            listed = (values[name],) if isinstance(values[name], (int, float)) else tuple(values[name])
            values[name] = tuple(map(float, listed * channels if len(listed) == 1 else listed))
        return replace(preprocessing, **values)
    except (TypeError, ValueError) as error:
        raise SpecError(f"the preprocessing {dict(given)} cannot be: {error}") from error


def _check_preprocessing(given: object) -> None:
    if isinstance(given, Preprocessing):
        return
    known = [field.name for field in fields(Preprocessing)]
    if not isinstance(given, Mapping):
        raise SpecError(f"preprocessing is a {type(given).__name__}; give a Preprocessing, or a dict of its fields.")
    for name in given:
        if name not in known:
            raise SpecError(f"preprocessing has no field {name!r}. {nearest(str(name), known)}")
