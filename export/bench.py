"""Engines of one network, measured beside its FP32 engine: for the mixed-precision search and the speed guard."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

from deploykit.bundle import Manifest
from deploykit.calibration.half import HalfPlan
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision import PrecisionPlan
from deploykit.calibration.search import Measured
from deploykit.errors import DeviceUnavailable
from deploykit.export.build import Builder, Built
from deploykit.export.measure import measure
from deploykit.export.speed import LEFT_IN_FLOAT, SpeedReport, time_in_turns
from deploykit.parity.report import ParityReport
from deploykit.runtimes.base import FloatArray, ImageArray, Runtime, load_runtime
from deploykit.spec import Precision


class Bench:
    """Builds candidates in temporary folders; a float engine is built once, when first needed.

    Args:
        builder: makes the engines.
        manifest_of: the manifest of an engine that it made.
        images: to compare on, as an engine takes them.
        expected: torch's outputs in FP32 for every level and the head.
        precision: the budget.
        probe_levels: also compare the levels inside an engine that gives only the head.
        metric: the user's own figure of a model, higher is better.
    """

    def __init__(
        self,
        *,
        builder: Builder,
        manifest_of: Callable[[Built], Manifest],
        images: ImageArray,
        expected: dict[str, FloatArray],
        precision: Precision,
        probe_levels: bool,
        metric: Callable[[Runtime], float] | None = None,
    ) -> None:
        self._builder = builder
        self._manifest_of = manifest_of
        self._images = images
        self._expected = expected
        self._precision = precision
        self._probe_levels = probe_levels
        self._metric = metric
        self._open = ExitStack()
        self._float: dict[str, Runtime] = {}

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def parity(self, built: Built, folder: Path) -> tuple[ParityReport, Manifest]:
        """Compare an engine with torch; its manifest then says what was seen of it."""
        manifest = self._manifest_of(built)
        return measure(
            manifest,
            folder,
            images=self._images,
            expected=self._expected,
            precision=self._precision,
            graph=built.graph,
            whole=built.whole if self._probe_levels else None,
            lower=self._builder.lower,
        )

    def accuracy(self, plan: PrecisionPlan) -> Measured:
        """Build the engine of a plan and compare it with torch."""
        with TemporaryDirectory(prefix="deploykit-candidate-") as scratch:
            return self._accuracy(plan, Path(scratch))[0]

    def _accuracy(self, plan: PrecisionPlan, folder: Path) -> tuple[Measured, Manifest]:
        report, manifest = self.parity(self._builder.lowered(self._builder.rendered(plan), folder), folder)
        agreements = [level.top1_agreement for level in report.levels if level.top1_agreement is not None]
        worst = min(level.sqnr_db for level in report.levels)
        return Measured(sqnr_db=worst, top1_agreement=min(agreements) if agreements else None), manifest

    def measured(self, plan: QuantizationPlan) -> Measured:
        """Build the engine of a plan and measure it: parity, speed, and the user's metric."""
        with TemporaryDirectory(prefix="deploykit-candidate-") as scratch:
            folder = Path(scratch)
            found, manifest = self._accuracy(plan, folder)
            if manifest.status == "built":
                return found
            with load_runtime(manifest.runtime)(manifest, folder) as model:
                (fp32_ms, own_ms), _ = time_in_turns((self.fp32(), model), self._images)
                metric = None if self._metric is None else float(self._metric(model))
                return replace(found, speedup=fp32_ms / own_ms, metric=metric)

    def speed(self, manifest: Manifest, folder: Path, plan: QuantizationPlan) -> SpeedReport | None:
        """Time a built engine against the float ones; None where its device is not here."""
        try:
            with load_runtime(manifest.runtime)(manifest, folder) as model:
                floats = [self.fp32()]
                if "fp16" in model.precisions:
                    floats.append(self._float_engine("fp16", HalfPlan(float_weights={})))
                (*float_ms, int8_ms), rounds = time_in_turns((*floats, model), self._images)
        except DeviceUnavailable:
            return None
        left = LEFT_IN_FLOAT.get(manifest.runtime)
        return SpeedReport(
            fp32_ms=float_ms[0],
            fp16_ms=float_ms[1] if len(float_ms) > 1 else None,
            int8_ms=int8_ms,
            rounds=rounds,
            float_nodes=dict(plan.placement.float_nodes),
            left=left(folder / manifest.engine) if left is not None else {},
        )

    def fp32_metric(self) -> float | None:
        """The user's figure of the FP32 engine; None without a metric."""
        return None if self._metric is None else float(self._metric(self.fp32()))

    def fp32(self) -> Runtime:
        """The FP32 engine of the same runtime, open until the bench closes."""
        return self._float_engine("fp32", None)

    def _float_engine(self, precision: str, plan: HalfPlan | None) -> Runtime:
        if precision not in self._float:
            folder = Path(self._open.enter_context(TemporaryDirectory(prefix=f"deploykit-{precision}-")))
            built = self._builder.lowered(self._builder.rendered(plan), folder)
            manifest = replace(self._manifest_of(built), precision=precision, precision_settings={})
            engine = load_runtime(manifest.runtime)(manifest, folder)
            self._float[precision] = self._open.enter_context(engine)
        return self._float[precision]
