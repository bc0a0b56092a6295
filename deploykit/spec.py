"""What deploykit's parts tell each other: frozen, keyword-only, checked once at the door.

Nothing here imports torch or a runtime, so the device that only runs an engine can read it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from deploykit.arguments import check_choice, check_fields
from deploykit.errors import SpecError
from deploykit.image_sizes import Size, SizeRange, parse_image_size, parse_image_sizes, size_text
from deploykit.precisions import (
    FAMILY_RECIPE,
    PRECISIONS,
    RECIPE_DEFAULTS,
    Bf16,
    BiasCorrection,
    Calibrator,
    FloatDtype,
    Fp16,
    Fp32,
    Int8,
    Precision,
    Rounding,
    WeightScales,
    parse_precision,
)

__all__ = [
    "BATCH_DIM",
    "DEFAULT_BUILD",
    "FAMILY_RECIPE",
    "HEIGHT_DIM",
    "PRECISIONS",
    "RECIPE_DEFAULTS",
    "WIDTH_DIM",
    "BackboneSpec",
    "Batch",
    "BatchRange",
    "Bf16",
    "BiasCorrection",
    "BuildOptions",
    "Calibrator",
    "CropMode",
    "FeatureInfo",
    "FeatureLevel",
    "FloatDtype",
    "Fp16",
    "Fp32",
    "HardwareCompatibility",
    "InputDtype",
    "InputSpec",
    "Int8",
    "Interpolation",
    "Layout",
    "Precision",
    "Preprocessing",
    "Rounding",
    "Size",
    "SizeRange",
    "TensorSpec",
    "WeightScales",
    "parse_batch",
    "parse_image_size",
    "parse_image_sizes",
    "parse_precision",
]

Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropMode: TypeAlias = Literal["center", "squash", "border"]
HardwareCompatibility: TypeAlias = Literal["none", "same_compute_capability", "ampere_plus"]
InputDtype: TypeAlias = Literal["float32", "uint8"]
Layout: TypeAlias = Literal["NCHW", "NHWC"]

BATCH_DIM = "batch"
"""The name of the dynamic batch dimension in every exported graph."""

HEIGHT_DIM, WIDTH_DIM = "height", "width"
"""The names of the dynamic sides of images; a feature map's are ``height/8`` and ``width/8`` at stride 8."""


MOST_SIDE, MOST_VALUES = (1 << 31) - 1, 1 << 40
"""How long a dimension of the images may be, and how many values a call may have: sizes beyond are slips of the pen."""


@dataclass(frozen=True, kw_only=True)
class FeatureLevel:
    """One feature map of a backbone.

    ``index`` counts strides in a pyramid (index i has stride ``2 ** (i + 1)``) and blocks in a
    plain ViT. ``stride`` and ``receptive_field`` are in input pixels. A receptive field of 0
    means that each value sees the whole image (attention, squeeze-and-excitation).
    """

    name: str
    index: int
    channels: int
    stride: int
    receptive_field: int

    def __post_init__(self) -> None:
        check_fields(self)


class FeatureInfo(tuple[FeatureLevel, ...]):
    """The levels that a model returns, shallow to deep, with timm's accessors beside them."""

    __slots__ = ()

    def names(self) -> list[str]:
        """Return the key of each level in the dict of features."""
        return [level.name for level in self]

    def channels(self) -> list[int]:
        """Return the number of channels of each level."""
        return [level.channels for level in self]

    def reduction(self) -> list[int]:
        """Return the stride of each level, in input pixels."""
        return [level.stride for level in self]

    def by_index(self) -> dict[int, str]:
        """Return each level's index, to its name."""
        return {level.index: level.name for level in self}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a photograph becomes the tensor that the weights were trained on, in timm's terms.

    ``mean`` and ``std`` are for RGB in [0, 1]. The image is resized to ``size / crop_pct`` and
    then cropped to ``size``: ``center`` keeps the aspect ratio and cuts the middle, ``squash``
    resizes both sides without keeping it, ``border`` keeps the whole image and fills with the mean.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 0.875
    crop_mode: CropMode = "center"

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.mean) != len(self.std):
            raise SpecError(
                f"mean has {len(self.mean)} channels and std has {len(self.std)}. Give both one value a channel."
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not all(math.isfinite(value) for value in values):
                raise SpecError(f"{name} is {values}; every value must be a finite number.")
        if any(value <= 0 for value in self.std):
            raise SpecError(f"std is {self.std}; every value must be above 0.")
        if not 0 < self.crop_pct <= 1:
            raise SpecError(f"crop_pct is {self.crop_pct}; it must be above 0 and at most 1.")
        check_choice("interpolation", self.interpolation, ("nearest", "bilinear", "bicubic", "lanczos"))
        check_choice("crop_mode", self.crop_mode, ("center", "squash", "border"))


@dataclass(frozen=True, kw_only=True)
class BatchRange:
    """A dynamic batch: the engine takes ``min`` to ``max`` images and is tuned for ``opt``."""

    min: int = 1
    opt: int = 1
    max: int = 8

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 <= self.min <= self.opt <= self.max:
            raise SpecError(
                f"the batch range is min={self.min}, opt={self.opt}, max={self.max}; "
                "it must satisfy 1 <= min <= opt <= max."
            )

    def __str__(self) -> str:
        return f"{self.min}..{self.max}"


Batch: TypeAlias = int | BatchRange


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What a model is called with: `as_images`, or `as_pixels` where the engine does the preprocessing.

    ``height`` and ``width`` are in pixels; of a range, ``sizes``, they are its ``opt``. None: that one size.
    """

    name: str = "images"
    batch: Batch = 1
    channels: int = 3
    height: int = 224
    width: int = 224
    dtype: InputDtype = "float32"
    layout: Layout = "NCHW"
    preprocessing: Preprocessing = Preprocessing()
    sizes: SizeRange | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.sizes is not None and self.sizes.best != (self.height, self.width):
            raise SpecError(
                f"the input is {self.height}x{self.width} and its range {self.sizes}; expected the range's best size."
            )
        if (self.dtype, self.layout) not in (("float32", "NCHW"), ("uint8", "NHWC")):
            raise SpecError(f"the input is {self.dtype} {self.layout}; expected float32 NCHW or uint8 NHWC.")
        most = self.batch if isinstance(self.batch, int) else self.batch.max
        sides = (self.height, self.width) if self.sizes is None else parse_image_size(self.sizes.max)
        if max(most, self.channels, *sides) > MOST_SIDE or math.prod(self.shape_at(self.best_batch)) > MOST_VALUES:
            raise SpecError(
                f"the input is {most} images of {self.channels} channels and {size_text(sides)} pixels, which no "
                "machine holds. Give a smaller batch or image size."
            )

    @property
    def shape(self) -> tuple[int | str, int | str, int | str, int | str]:
        """``(batch, C, H, W)``, or ``(batch, H, W, C)`` for NHWC, with names such as `BATCH_DIM` for dynamic sides."""
        batch = self.batch if isinstance(self.batch, int) else BATCH_DIM
        height, width = (self.height, self.width) if self.sizes is None else (HEIGHT_DIM, WIDTH_DIM)
        if self.layout == "NHWC":
            return (batch, height, width, self.channels)
        return (batch, self.channels, height, width)

    def shape_at(self, batch: int, size: Size | None = None) -> tuple[int, int, int, int]:
        """Return the shape of ``batch`` images of ``(height, width)``; None: of the size that it is tuned for."""
        height, width = (self.height, self.width) if size is None else size
        if self.layout == "NHWC":
            return (batch, height, width, self.channels)
        return (batch, self.channels, height, width)

    def at(self, size: Size) -> InputSpec:
        """Return the input for images of one of its sizes, ``(height, width)``, as `deploykit.preprocess` takes it.

        Raises:
            SpecError: a size that it does not take, with the nearest.
        """
        if self.sizes is None and size != (self.height, self.width):
            raise SpecError(
                f"the input has one size, {self.height}x{self.width}, and {size_text(size)} was asked for. Export with "
                "image_size=(min, opt, max) for a range."
            )
        if self.sizes is not None and not self.sizes.accepts(size):
            raise SpecError(
                f"the input takes {self.sizes}, and {size_text(size)} was asked for. The nearest size is "
                f"{size_text(self.sizes.nearest(size))}."
            )
        return dataclasses.replace(self, height=size[0], width=size[1], sizes=None)

    def size_of(self, shape: Sequence[int]) -> Size:
        """Return ``(height, width)`` of images of a shape in this layout."""
        return (shape[1], shape[2]) if self.layout == "NHWC" else (shape[2], shape[3])

    def accepts_size(self, shape: Sequence[int]) -> bool:
        """Return whether images of a shape with four sides have the input's size, layout and channels."""
        if self.sizes is None:
            return tuple(shape[1:]) == self.shape[1:]
        size = self.size_of(shape)
        return self.sizes.accepts(size) and tuple(shape[1:]) == self.shape_at(1, size)[1:]

    @property
    def best_batch(self) -> int:
        """The batch that an engine is built for; of a range, the one that it is tuned for."""
        return self.batch if isinstance(self.batch, int) else self.batch.opt

    @property
    def embeds_preprocessing(self) -> bool:
        """Whether the engine itself does the cast, the transpose and the mean and std."""
        return self.dtype == "uint8"

    def as_pixels(self) -> InputSpec:
        """Return the same images as decoded: ``(N, H, W, C)`` uint8, RGB from 0 to 255."""
        return dataclasses.replace(self, dtype="uint8", layout="NHWC")

    def as_images(self) -> InputSpec:
        """The same images as the network takes them: ``(N, C, H, W)`` float32, normalised by ``preprocessing``."""
        return dataclasses.replace(self, dtype="float32", layout="NCHW")

    def accepts_batch(self, count: int) -> bool:
        """Return whether a call with ``count`` images is within the engine's batch."""
        return count == self.batch if isinstance(self.batch, int) else self.batch.min <= count <= self.batch.max


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One output of an engine; a dynamic batch is the string `BATCH_DIM`, a dynamic side one like ``height/8``."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """Which backbone, with which options: all that decides the numbers, except the weights.

    ``image_size`` is ``(height, width)`` in pixels. ``levels`` are those that the backbone
    returns with ``features_only=True``, shallow to deep.
    """

    name: str
    family: str
    levels: tuple[FeatureLevel, ...]
    features_only: bool = False
    output_stride: int = 32
    num_classes: int = 1000
    in_channels: int = 3
    image_size: tuple[int, int] = (224, 224)
    patch_size: int | None = None
    hierarchical: bool | str = False
    weights: str | None = None
    label_set: str | None = None

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of what a call returns: the levels, or ``logits``, or ``embedding``."""
        if self.features_only:
            return tuple(level.name for level in self.levels)
        return (self.head_name,)

    @property
    def head_name(self) -> str:
        """``logits``, or ``embedding`` when there is no classifier."""
        return "logits" if self.num_classes > 0 else "embedding"


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What the build of an engine is told beside its target, in the runtimes that have a say in it (TensorRT).

    Args:
        hardware_compatibility: the GPUs that open the plan: ``none`` the target; ``same_compute_capability``
            every GPU of its compute capability; ``ampere_plus`` every one since Ampere (sm80).
        version_compatible: newer versions of the same package, of one major version, open the plan too.
        timing_cache: a file that keeps what builds measured, so that the next is faster and chooses the same.
    """

    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False
    timing_cache: str | None = None

    def __post_init__(self) -> None:
        check_choice("hardware_compatibility", self.hardware_compatibility, get_args(HardwareCompatibility))


DEFAULT_BUILD = BuildOptions()
"""What every runtime's build is told where nothing else is asked for."""


def parse_batch(batch_size: int | str | tuple[int, int, int] | BatchRange) -> Batch:
    """Return an int, ``"dynamic"``, ``(min, opt, max)`` or a `BatchRange`, checked.

    Raises:
        SpecError: anything else, or sizes out of order.
    """
    if isinstance(batch_size, BatchRange):
        return batch_size
    if isinstance(batch_size, bool):
        raise SpecError(f"batch_size is {batch_size!r}; give an int, 'dynamic', or (min, opt, max).")
    if isinstance(batch_size, int):
        if batch_size < 1:
            raise SpecError(f"batch_size is {batch_size}; it must be at least 1.")
        return batch_size
    if batch_size == "dynamic":
        return BatchRange()
    if isinstance(batch_size, str) and batch_size.isdecimal():
        return parse_batch(int(batch_size))
    if isinstance(batch_size, (tuple, list)) and len(batch_size) == 3:
        low, opt, high = batch_size
        return BatchRange(min=low, opt=opt, max=high)
    raise SpecError(f"batch_size is {batch_size!r}; give an int, 'dynamic', or (min, opt, max).")
