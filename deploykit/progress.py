"""What a running export reports: typed events, through one callable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True)
class StageStarted:
    """A stage of the pipeline begins."""

    name: str


@dataclass(frozen=True, kw_only=True)
class ImagesCalibrated:
    """So many of all images were calibrated; ``resumed``: a stopped calibration goes on after them."""

    done: int
    total: int
    resumed: bool = False


@dataclass(frozen=True, kw_only=True)
class BuildStep:
    """A phase of the runtime's own build, its steps done and in all."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class CandidateMeasured:
    """A recipe or a candidate of the mixed-precision search was measured: one line."""

    summary: str


@dataclass(frozen=True, kw_only=True)
class ImagesRun:
    """So many of all images were read and run, in so many seconds."""

    done: int
    total: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TuningStep:
    """A step of a tuning by distillation; ``sqnr_db`` is the best so far on images held out, over all outputs."""

    step: int
    steps: int
    sqnr_db: float


ProgressEvent: TypeAlias = StageStarted | ImagesCalibrated | BuildStep | CandidateMeasured | ImagesRun | TuningStep
Progress: TypeAlias = Callable[[ProgressEvent], None]


def quiet(event: ProgressEvent) -> None:
    """Report to nobody."""
