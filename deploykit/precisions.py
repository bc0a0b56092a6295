"""Precisions with their settings and budgets: frozen, keyword-only, checked once at the door."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from deploykit.arguments import check_choice, check_fields, check_only
from deploykit.errors import SpecError, nearest
from deploykit.unset import UNSET, UnsetType

Calibrator: TypeAlias = Literal[
    "mse",
    "minmax",
    "percentile",
    "entropy",
    "nncf",
    "nncf-mse",
    "nncf-minmax",
    "nncf-percentile",
    "nncf-median",
    "nncf-no-outliers",
]
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


def _check_budget(min_sqnr_db: float, min_top1_agreement: float | None) -> None:
    """Refuse a budget that no engine could meet or miss.

    Raises:
        SpecError: it is no number of dB, or no share of the images.
    """
    if not math.isfinite(min_sqnr_db):
        raise SpecError(f"min_sqnr_db is {min_sqnr_db}; it must be a finite number of dB.")
    if min_top1_agreement is not None and not 0 <= min_top1_agreement <= 1:
        raise SpecError(f"min_top1_agreement is {min_top1_agreement}; it must be from 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class Fp32:
    """IEEE single precision; nothing is lost but the order of additions."""

    name: ClassVar[str] = "fp32"
    min_sqnr_db: float = 80.0
    min_top1_agreement: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        _check_budget(self.min_sqnr_db, self.min_top1_agreement)


@dataclass(frozen=True, kw_only=True)
class Fp16:
    """IEEE half precision, by casts in the graph; inputs and outputs stay float32."""

    name: ClassVar[str] = "fp16"
    min_sqnr_db: float = 45.0
    min_top1_agreement: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        _check_budget(self.min_sqnr_db, self.min_top1_agreement)


@dataclass(frozen=True, kw_only=True)
class Bf16:
    """bfloat16: float32's range with 8 bits of mantissa; inputs and outputs stay float32."""

    name: ClassVar[str] = "bf16"
    min_sqnr_db: float = 15.0
    min_top1_agreement: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        _check_budget(self.min_sqnr_db, self.min_top1_agreement)


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
            NNCF quantizes, with its default range estimator, and its ranges, integers and bias correction make the
            plan. ``nncf-mse``, ``nncf-minmax``, ``nncf-percentile``, ``nncf-median`` and ``nncf-no-outliers`` are its
            other estimators; ``recipe="nncf"`` takes the names of the first three without the prefix as well.
        percentile: the share of values inside the range for ``percentile`` and ``nncf-percentile``, in percent.
        bias_correction: shift each bias by the mean error that rounding makes (Nagel et al. 2019,
            "Data-Free Quantization", section 4.2, with measured means): ``fast``, that of its own weight, in
            the same pass; ``full``, that of all before it too, layer after layer; None or False: not at
            all. True is ``fast``.
        rounding: each weight to the ``nearest`` integer, or ``adaptive``: so that a layer's output on the
            calibration images changes least (GPTQ, Frantar et al. 2022); or ``distilled``: weights, biases, ranges and
            rounding of the whole network tuned by gradient, so that its outputs on these images change least.
        weight_scales: a channel's ``max``, or ``mse``: clipped where its output then changes least.
        equalization: 0 to 1, how much of the spread between channels goes from the activations into
            the weights beforehand (cross-layer equalization, SmoothQuant's alpha); None: nothing is scaled, but by
            NNCF's own SmoothQuant where NNCF quantizes a transformer.
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
        mixed_precision: search the fewest layers to keep in float so that the engine is within its budget; where NNCF
            quantizes, its accuracy control goes before.
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
        _check_budget(self.min_sqnr_db, self.min_top1_agreement)
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
        if self.by_nncf:
            check_only(self, {"rounding": "nearest", "weight_scales": "max"}, beside=f"calibrator={self.calibrator!r}")
        if not 50 < self.percentile <= 100:
            raise SpecError(f"percentile is {self.percentile}; it must be above 50 and at most 100.")
        if isinstance(self.equalization, (int, float)) and not 0 <= self.equalization <= 1:
            raise SpecError(f"equalization is {self.equalization}; it must be 0 to 1, or None for none.")

    @property
    def by_nncf(self) -> bool:
        """Whether NNCF quantizes, with whichever of its range estimators."""
        return isinstance(self.calibrator, str) and self.calibrator.partition("-")[0] == "nncf"

    def filled(self, defaults: Mapping[str, Any] | None = None) -> Int8:
        """Return the settings with every `UNSET` one filled: from ``defaults``, or else from `RECIPE_DEFAULTS`."""
        values = RECIPE_DEFAULTS | dict(defaults or {})
        return dataclasses.replace(
            self, **{name: value for name, value in values.items() if getattr(self, name) is UNSET}
        )


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
