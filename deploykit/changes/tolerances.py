"""How much a new bundle may differ from an old one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deploykit.errors import SpecError, nearest
from deploykit.manifest import Manifest

CONTRACT = ("outputs", "input", "preprocessing", "labels", "levels", "weights")
"""What an application relies on: a difference in these fails, unless it is allowed by name."""

DROP_DB = 1.0
FP32_DB, HALF_DB, SAME_PLAN_DB, SAME_BUILD_DB = 60.0, 40.0, 30.0, 40.0


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """What fails a comparison of two bundles.

    Args:
        max_drop_db: by how much a level may be farther from torch FP32 in the new bundle than in the old one; None:
            `DROP_DB` where both have one precision, else no more than the new bundle's own budget.
        min_sqnr_db: how near the new outputs must be to the old ones; None: as near as the two bundles' own
            precision, plan and runtime let one expect, see `expected_between`.
        min_top1_agreement: the share of images, 0 to 1, on which both must name the same class; None: no gate.
        max_slowdown: the new latency over the old one's; None: no gate.
        max_growth: the new size over the old one's; None: no gate.
        allow: parts of the contract that may differ, of `CONTRACT`.

    Raises:
        SpecError: a number out of range, or an unknown part.
    """

    max_drop_db: float | None = None
    min_sqnr_db: float | None = None
    min_top1_agreement: float | None = None
    max_slowdown: float | None = None
    max_growth: float | None = None
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_drop_db is not None and not 0 <= self.max_drop_db < math.inf:
            raise SpecError(f"max_drop_db is {self.max_drop_db}; expected at least 0 dB.")
        if self.min_sqnr_db is not None and not math.isfinite(self.min_sqnr_db):
            raise SpecError(f"min_sqnr_db is {self.min_sqnr_db}; it must be a finite number of dB.")
        if self.min_top1_agreement is not None and not 0 <= self.min_top1_agreement <= 1:
            raise SpecError(f"min_top1_agreement is {self.min_top1_agreement}; it must be from 0 to 1.")
        for name in ("max_slowdown", "max_growth"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SpecError(f"{name} is {value}; expected a ratio above 0, such as 1.1 for a tenth more.")
        for part in self.allow:
            if part not in CONTRACT:
                raise SpecError(f"allow has {part!r}, which is no part of the contract. {nearest(part, CONTRACT)}")

    def allowed_drop(self, old: Manifest, new: Manifest) -> float | None:
        """Return by how much a level of these two may be farther from torch, in dB; None: no gate."""
        if self.max_drop_db is not None:
            return self.max_drop_db
        return DROP_DB if old.precision == new.precision else None


def expected_between(old: Manifest, new: Manifest, *, same_plan: bool) -> float | None:
    """Return how near the outputs of two bundles must be by what they say of themselves, in dB; None: no gate.

    Two float engines of the same weights compute the same numbers up to roundings. Two INT8 engines do so only where
    they share a quantization plan; INT8 beside float, or another plan, is judged by the distance from torch alone. So
    are other weights.
    """
    if old.weights_digest != new.weights_digest:
        return None
    precisions = {old.precision, new.precision}
    if "int8" in precisions:
        if precisions != {"int8"} or not same_plan or old.runtime != new.runtime:
            return None
        return SAME_BUILD_DB if old.runtime_version == new.runtime_version else SAME_PLAN_DB
    if "bf16" in precisions:
        return None
    return FP32_DB if precisions == {"fp32"} else HALF_DB
