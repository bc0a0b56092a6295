"""The speed guard: an INT8 engine timed in turns with the FP32 and FP16 engines of its runtime; why it is slower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from deploykit.arrays import ImageArray
from deploykit.backends.runtime import Runtime
from deploykit.errors import ExportError
from deploykit.timing import time_calls

SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class SpeedReport:
    """An INT8 engine against float ones on this machine: medians in milliseconds a call, timed in turns.

    ``fp16_ms``: of the engine with everything in half precision; None where the runtime has none.
    ``float_nodes`` are the plan's, with their reasons. ``left`` counts what the runtime's optimized
    graph still computes in float or converts: empty where the runtime shows no such graph.
    """

    fp32_ms: float
    int8_ms: float
    fp16_ms: float | None = None
    rounds: int
    float_nodes: dict[str, str] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """FP32's time over the INT8 engine's: above 1 where INT8 is faster."""
        return self.fp32_ms / self.int8_ms

    @property
    def slower(self) -> bool:
        """Whether a float engine of the same runtime is faster."""
        return self.int8_ms > min(self.fp32_ms, self.fp16_ms or self.fp32_ms)

    def sentence(self) -> str:
        """Return one line: how much faster or slower."""
        per_call = f"{self.int8_ms:.3g} against {self.fp32_ms:.3g} ms a call"
        times = f"{'slower; ' if self.slower else ''}{per_call}, median of {self.rounds} rounds in turns, one run"
        half = "" if self.fp16_ms is None else f", {self.fp16_ms / self.int8_ms:.2f} times as fast as fp16,"
        return f"int8 is {self.speedup:.2f} times as fast as fp32{half} in this runtime here ({times})."

    def reasons(self) -> list[str]:
        """Return what keeps the engine from being faster, as lines."""
        lines = [f"stays in float: {node}: {reason}" for node, reason in list(self.float_nodes.items())[:SHOWN]]
        if len(self.float_nodes) > SHOWN:
            lines.append(f"and {len(self.float_nodes) - SHOWN} more nodes stay in float: see quantization-plan.json")
        if self.left:
            counted = ", ".join(f"{count} {operator}" for operator, count in self.left.items())
            lines.append(f"the runtime's optimized graph still has {counted}")
        return lines or ["every node of the plan runs in integers; this processor or batch gains nothing from them"]


def check_speedup(report: SpeedReport | None, runtime: str) -> None:
    """Refuse an engine that is slower than FP32 or FP16, or that was not timed.

    Raises:
        ExportError: either.
    """
    if report is None:
        raise ExportError(
            f"a speedup is required, and {runtime} cannot time the engine here: its device is another. Export there, "
            "or leave require_speedup out."
        )
    if report.slower:
        lines = "".join(f"\n  {line}" for line in report.reasons())
        raise ExportError(
            f"{report.sentence()} A speedup is required; what is against it:{lines}\n"
            "Export at the faster precision for this runtime, try another runtime, or leave require_speedup out."
        )


def time_in_turns(models: Sequence[Runtime], images: ImageArray) -> tuple[list[float], int]:
    """Return the median milliseconds of a call of each model, called in turns on one batch, and the rounds it took."""
    return time_calls([_call(model, images) for model in models])


def _call(model: Runtime, images: ImageArray) -> Callable[[], object]:
    batch = model.input_spec.batch
    size = batch if isinstance(batch, int) else batch.opt
    piece = images[[index % len(images) for index in range(size)]]
    return lambda: model(piece)
