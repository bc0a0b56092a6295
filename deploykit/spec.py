"""What deploykit's parts tell each other: frozen, keyword-only, checked once at the door.

Nothing here imports torch or a runtime, so the device that only runs an engine can read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from deploykit.arguments import check_choice, check_fields, check_only
from deploykit.errors import SpecError, nearest
from deploykit.unset import UNSET, UnsetType

Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropMode: TypeAlias = Literal["center", "squash", "border"]
Calibrator: TypeAlias = Literal["mse", "minmax", "percentile", "entropy", "nncf"]
BiasCorrection: TypeAlias = Literal["fast", "full"]
Rounding: TypeAlias = Literal["nearest", "adaptive", "distilled"]
WeightScales: TypeAlias = Literal["max", "mse"]
FAMILY_RECIPE = "family"
RECIPE_DEFAULTS: dict[str, Any] = {
    "equalization": 0.5,
    "calibrator": "mse",
    "bias_correction": "fast",
    "rounding": "nearest",
    "weight_scales": "max",
}
"""What a recipe of INT8 decides, with the values of the recipe that plans the fastest."""

_RECIPE_CHOICES: dict[str, tuple[str, ...]] = {
    "calibrator": get_args(Calibrator),
    "bias_correction": get_args(BiasCorrection),
    "rounding": get_args(Rounding),
    "weight_scales": get_args(WeightScales),
}
FloatDtype: TypeAlias = Literal["fp32", "fp16"]
HardwareCompatibility: TypeAlias = Literal["none", "same_compute_capability", "ampere_plus"]
InputDtype: TypeAlias = Literal["float32", "uint8"]
Layout: TypeAlias = Literal["NCHW", "NHWC"]

BATCH_DIM = "batch"
"""The name of the dynamic batch dimension in every exported graph."""


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
    """What a model is called with: `as_images`, or `as_pixels` where the engine does the preprocessing."""

    name: str = "images"
    batch: Batch = 1
    channels: int = 3
    height: int = 224
    width: int = 224
    dtype: InputDtype = "float32"
    layout: Layout = "NCHW"
    preprocessing: Preprocessing = Preprocessing()

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.dtype, self.layout) not in (("float32", "NCHW"), ("uint8", "NHWC")):
            raise SpecError(f"the input is {self.dtype} {self.layout}; expected float32 NCHW or uint8 NHWC.")

    @property
    def shape(self) -> tuple[int | str, int, int, int]:
        """``(batch, C, H, W)``, or ``(batch, H, W, C)`` for NHWC, with `BATCH_DIM` for a dynamic batch."""
        batch = self.batch if isinstance(self.batch, int) else BATCH_DIM
        if self.layout == "NHWC":
            return (batch, self.height, self.width, self.channels)
        return (batch, self.channels, self.height, self.width)

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
    """One output of an engine; a dynamic batch is the string `BATCH_DIM`."""

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
class Fp32:
    """IEEE single precision; nothing is lost but the order of additions."""

    name: ClassVar[str] = "fp32"
    min_sqnr_db: float = 80.0
    min_top1_agreement: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Fp16:
    """IEEE half precision, by casts in the graph; inputs and outputs stay float32."""

    name: ClassVar[str] = "fp16"
    min_sqnr_db: float = 45.0
    min_top1_agreement: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Bf16:
    """bfloat16: float32's range with 8 bits of mantissa; inputs and outputs stay float32."""

    name: ClassVar[str] = "bf16"
    min_sqnr_db: float = 15.0
    min_top1_agreement: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Int8:
    """8-bit integers by Q/DQ nodes: per-channel weights, per-tensor activations.

    Settings that a recipe decides are `UNSET` until the recipe fills them; explicit settings override the recipe,
    even when they equal its values.

    Args:
        min_sqnr_db: the budget of every feature level and of the logits, in dB against torch FP32.
        min_top1_agreement: the share of images, 0 to 1, whose top-1 class must stay; None: no gate.
        calibrator: how a range is chosen from the statistics: ``mse`` (least squared error),
            ``minmax``, ``percentile``, or ``entropy`` (least Kullback-Leibler divergence, as TensorRT); or ``nncf``:
            NNCF quantizes, and its ranges, integers and bias correction make the plan.
        percentile: the share of values inside the range for ``percentile``, in percent.
        bias_correction: shift each bias by the mean error that rounding makes (Nagel et al. 2019,
            "Data-Free Quantization", section 4.2, with measured means): ``fast``, that of its own weight, in
            the same pass; ``full``, that of all before it too, layer after layer; None or False: not at
            all. True is ``fast``.
        rounding: each weight to the ``nearest`` integer, or ``adaptive``: so that a layer's output on the
            calibration images changes least (GPTQ, Frantar et al. 2022); or ``distilled``: weights, biases, ranges and
            rounding of the whole network tuned by gradient, so that its outputs on these images change least.
        weight_scales: a channel's ``max``, or ``mse``: clipped where its output then changes least.
        equalization: 0 to 1, how much of the spread between channels goes from the activations into
            the weights beforehand (cross-layer equalization, SmoothQuant's alpha); None: nothing is scaled.
        reduce_range: round weights more coarsely, so that no product saturates in the 16 bits of x86
            processors without VNNI (ONNX Runtime's term); None: where the target needs it.
        recipe: a name of `deploykit.calibration.recipes.RECIPES`, which fills the settings that are not given;
            ``family``: the one that was measured best for the backbone's family; ``auto``: the best of the table on
            calibration images that are held out, found within the budget; None: the first of the table.
        recipe_budget_s: how many seconds the trials of ``auto`` may take together.
        distill_steps: how many batches ``distilled`` learns from at most; it stops early where images that are held out
            gain nothing more.
        distill_minutes: when it stops at the latest. Where that is before its steps are done, two exports may differ.
        distill_seed: of the order of its images.
        distill_for_runtime: tune for exactly what the runtime of the export rounds; False: once, for what runtimes have
            in common, with a smaller gain in each, which may be a loss in one that rounds less.
        float_dtype: what stays in float computes in ``fp32``, or in ``fp16`` where the runtime has it.
        mixed_precision: search the fewest layers to keep in float so that the engine is within its budget.
        max_metric_drop: with a metric of the user's own, how far below the FP32 engine's it may be.
    """

    name: ClassVar[str] = "int8"
    min_sqnr_db: float = 12.0
    min_top1_agreement: float | None = None
    calibrator: Calibrator | UnsetType = UNSET
    percentile: float = 99.99
    bias_correction: BiasCorrection | bool | UnsetType | None = UNSET
    rounding: Rounding | UnsetType = UNSET
    weight_scales: WeightScales | UnsetType = UNSET
    equalization: float | UnsetType | None = UNSET
    reduce_range: bool | None = None
    recipe: str | None = FAMILY_RECIPE
    recipe_budget_s: float = 120.0
    distill_steps: int = 240
    distill_minutes: float = 10.0
    distill_seed: int = 0
    distill_for_runtime: bool = True
    float_dtype: FloatDtype = "fp32"
    mixed_precision: bool = False
    max_metric_drop: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_metric_drop is not None and not self.max_metric_drop >= 0:
            raise SpecError(f"max_metric_drop is {self.max_metric_drop}; it must be 0 or more.")
        if not self.recipe_budget_s > 0:
            raise SpecError(f"recipe_budget_s is {self.recipe_budget_s}; it must be above 0 seconds.")
        if isinstance(self.distill_steps, bool) or not self.distill_steps >= 1:
            raise SpecError(f"distill_steps is {self.distill_steps}; it must be at least 1.")
        if not self.distill_minutes > 0:
            raise SpecError(f"distill_minutes is {self.distill_minutes}; it must be above 0.")
        if isinstance(self.distill_seed, bool) or not self.distill_seed >= 0:
            raise SpecError(f"distill_seed is {self.distill_seed}; it must be 0 or more.")
        check_choice("float_dtype", self.float_dtype, ("fp32", "fp16"))
        if isinstance(self.bias_correction, bool):
            object.__setattr__(self, "bias_correction", "fast" if self.bias_correction else None)
        for name, choices in _RECIPE_CHOICES.items():
            value = getattr(self, name)
            if value is not UNSET and not (value is None and name == "bias_correction"):
                check_choice(name, value, choices)
        if self.calibrator == "nncf":
            check_only(self, {"rounding": "nearest", "weight_scales": "max"}, beside="calibrator='nncf'")
        if not 50 < self.percentile <= 100:
            raise SpecError(f"percentile is {self.percentile}; it must be above 50 and at most 100.")
        if isinstance(self.equalization, (int, float)) and not 0 <= self.equalization <= 1:
            raise SpecError(f"equalization is {self.equalization}; it must be 0 to 1, or None for none.")

    def filled(self, defaults: Mapping[str, Any] | None = None) -> Int8:
        """Return the settings with every `UNSET` one filled: from ``defaults``, or else from `RECIPE_DEFAULTS`."""
        values = RECIPE_DEFAULTS | dict(defaults or {})
        return dataclasses.replace(
            self, **{name: value for name, value in values.items() if getattr(self, name) is UNSET}
        )


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

Precision: TypeAlias = Fp32 | Fp16 | Bf16 | Int8

PRECISIONS: dict[str, type[Fp32] | type[Fp16] | type[Bf16] | type[Int8]] = {
    "fp32": Fp32,
    "fp16": Fp16,
    "bf16": Bf16,
    "int8": Int8,
}


def parse_precision(precision: str | Precision, settings: Mapping[str, Any] | None = None) -> Precision:
    """Turn ``"int8"``, or the dataclass itself, into the dataclass; ``settings`` are its fields.

    Raises:
        SpecError: no such precision, or a setting that it does not have.
    """
    if not isinstance(precision, str):
        if not isinstance(precision, (Fp32, Fp16, Bf16, Int8)):
            raise SpecError(f"precision is {precision!r}; give one of {', '.join(PRECISIONS)}, or its dataclass.")
        return precision
    if precision not in PRECISIONS:
        raise SpecError(f"unknown precision {precision!r}. {nearest(precision, PRECISIONS)}")
    kind = PRECISIONS[precision]
    known = {field.name for field in dataclasses.fields(kind)}
    for key in settings or {}:
        if key not in known:
            raise SpecError(f"precision {precision!r} has no setting {key!r}. {nearest(key, known)}")
    return kind(**dict(settings or {}))


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


def parse_image_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return an int or ``(height, width)`` in pixels to ``(height, width)``.

    Raises:
        SpecError: not one or two positive ints.
    """
    listed = tuple(image_size) if isinstance(image_size, Iterable) else ()
    size = (image_size, image_size) if isinstance(image_size, int) else listed
    if len(size) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in size):
        raise SpecError(f"image_size is {image_size!r}; give one int, or (height, width), in pixels.")
    return (size[0], size[1])
