"""From a plan to an engine, and what the engine gives: the part of an export that a search repeats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from deploykit.arrays import FloatArray
from deploykit.backends.backend import Engine, Lowering, LowerOptions, resolve
from deploykit.backends.runtime import run_in_batches
from deploykit.bundle import Manifest
from deploykit.calibration.dialect import Dialect, Rendered
from deploykit.calibration.half import HalfPlan
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision_plan import PrecisionPlan
from deploykit.calibration.search import Measured
from deploykit.errors import DeviceUnavailable
from deploykit.export.graphs import select
from deploykit.export.job import ExportJob, tool_versions
from deploykit.export.measure import measure, node_by_node, open_here, program_outputs
from deploykit.export.speed import SpeedReport, time_in_turns
from deploykit.fusion.embed_preprocessing import embed_preprocessing
from deploykit.fusion.pipeline import FusionRecord
from deploykit.graph import Graph, OnnxGraph
from deploykit.parity.baseline import Baseline, measure_baseline
from deploykit.parity.metrics import sqnr_db
from deploykit.parity.report import ErrorKind, ParityReport, capped
from deploykit.places import scratch_folder
from deploykit.processor import machine_key
from deploykit.progress import BuildStep, Progress
from deploykit.spec import Fp32, Int8

if TYPE_CHECKING:
    from deploykit.backends.runtime import Runtime
    from deploykit.export.pipeline import Prepared

APART_IMAGES = 4
"""How many images errors are told apart on, where the FP32 engine was run on none."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine file, the graph it was lowered from, and that graph with every level as an output."""

    engine: Engine
    graph: Graph
    whole: Graph
    records: tuple[FusionRecord, ...]


class Evaluator:
    """Builds engines of one prepared network for one runtime, and measures them beside its float engines.

    A float engine is built once, when first needed, and stays open until the evaluator closes.

    Args:
        job: what is exported.
        network: its master graph, plan and images.
        expected: for every level and the head, torch's outputs in FP32, or those of a trained network with its
            roundings.
        progress: hears of the steps of the runtime's own build.
    """

    def __init__(self, job: ExportJob, network: Prepared, expected: dict[str, FloatArray], progress: Progress) -> None:
        self.job = job
        self.network = network
        self._expected = expected
        self._progress = progress
        self._dialect: Dialect = resolve(str(job.backend.dialect))
        self._open = ExitStack()
        self._float: dict[str, Runtime] = {}
        self.proof: dict[str, FloatArray] = {}
        """What the FP32 engine gave for the first images, where it was run."""

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def render(self, plan: PrecisionPlan) -> Rendered:
        """Write a plan into the master graph, in the form that the runtime fuses."""
        master = self.network.master.form(self.job.backend.source)
        return self._dialect.render(master, plan, self.network.probe)

    def lower(self, rendered: Rendered, folder: Path) -> Built:
        """Write the engine of a rendered graph into a folder."""
        outputs, taken = self.job.backbone.spec.output_names, self.network.input
        graph = embed_preprocessing(select(rendered.graph, outputs), taken)
        return Built(
            engine=self.lower_graph(graph, folder),
            graph=graph,
            whole=embed_preprocessing(rendered.graph, taken),
            records=rendered.records,
        )

    def build(self, plan: PrecisionPlan, folder: Path) -> Built:
        """Write the engine of a plan into a folder."""
        return self.lower(self.render(plan), folder)

    def compare(self, built: Built, folder: Path) -> tuple[ParityReport, Manifest]:
        """Compare an engine with torch; its manifest then says what was seen of it."""
        return measure(
            self.manifest(built),
            folder,
            images=self.network.images,
            expected=self._expected,
            precision=self.job.options.precision,
            graph=built.graph,
            whole=built.whole if self.job.options.probe_levels else None,
            lower=self.lower_graph,
            elsewhere=self.job.is_elsewhere,
        )

    @contextmanager
    def opened(self, manifest: Manifest, folder: Path) -> Iterator[Runtime | None]:
        """Give a built engine, open until the block ends; None where its device is not here."""
        if manifest.status == "built":
            yield None
            return
        with self._opened(manifest, folder) as model:
            yield model

    def errors_apart(self, built: Built, model: Runtime) -> dict[ErrorKind, dict[str, float]]:
        """Compare an engine with the runtime's FP32 engine, and with its own graph node by node.

        Returns:
            The SQNR of each output in dB, by kind; empty for FP32.
        """
        precision = self.job.options.precision
        if isinstance(precision, Fp32):
            return {}
        images = self.network.images[: len(next(iter(self.proof.values()), self.network.images[:APART_IMAGES]))]
        own = run_in_batches(model, images)
        found: dict[ErrorKind, dict[str, float]] = {"quantization": _apart(self.proof, own)}
        if isinstance(built.graph, OnnxGraph) and isinstance(precision, Int8) and precision.float_dtype == "fp32":
            found["runtime"] = _apart(node_by_node(built.graph, images), own)
        return found

    def baseline(self, model: Runtime) -> Baseline:
        """Measure what an engine gives and how far that moves."""
        machine = machine_key(model.seen_on(), model.threads)
        return measure_baseline(lambda images: run_in_batches(model, images), self.network.images, machine)

    def evaluate(self, plan: PrecisionPlan, *, timed: bool = False) -> Measured:
        """Build the engine of a plan in a temporary folder and compare it with torch.

        ``timed`` also times it in turns with FP32, and asks the user's metric, where its device is here.
        """
        with scratch_folder("candidate") as folder:
            report, manifest = self.compare(self.build(plan, folder), folder)
            agreements = [level.top1_agreement for level in report.levels if level.top1_agreement is not None]
            found = Measured(
                sqnr_db=min(level.sqnr_db for level in report.levels),
                top1_agreement=min(agreements) if agreements else None,
            )
            if not timed or manifest.status == "built":
                return found
            with self._opened(manifest, folder) as model:
                (fp32_ms, own_ms), _ = time_in_turns((self.fp32(), model), self.network.images)
                metric = self.job.options.metric
                return replace(found, speedup=fp32_ms / own_ms, metric=None if metric is None else float(metric(model)))

    def speed(self, manifest: Manifest, folder: Path, plan: QuantizationPlan) -> SpeedReport | None:
        """Time a built engine against the float ones; None where its device is not here, or is for another machine."""
        backend = self.job.backend
        if self.job.is_elsewhere or Fp32.name not in backend.precisions:
            return None
        try:
            with self._opened(manifest, folder) as model:
                floats = [self.fp32()]
                if "fp16" in backend.precisions:
                    floats.append(self._float_engine("fp16", HalfPlan(float_weights={})))
                (*float_ms, int8_ms), rounds = time_in_turns((*floats, model), self.network.images)
        except DeviceUnavailable:
            return None
        return SpeedReport(
            fp32_ms=float_ms[0],
            fp16_ms=float_ms[1] if len(float_ms) > 1 else None,
            int8_ms=int8_ms,
            rounds=rounds,
            float_nodes=dict(plan.placement.float_nodes),
            left=resolve(backend.inspect)(folder / manifest.engine) if backend.inspect is not None else {},
        )

    def fp32_metric(self) -> float | None:
        """Return the user's figure of the FP32 engine; None without a metric."""
        metric = self.job.options.metric
        return None if metric is None else float(metric(self.fp32()))

    def fp32(self) -> Runtime:
        """Return the FP32 engine of the same runtime, open until the evaluator closes."""
        return self._float_engine("fp32", None)

    def run_fp32(self, count: int) -> dict[str, FloatArray]:
        """Return what the FP32 engine gives for the first images.

        Raises:
            DeviceUnavailable: its device is not here.
        """
        return run_in_batches(self.fp32(), self.network.images[:count])

    def close_float(self) -> None:
        """Give the memory of the float engines back; one is built again when it is needed."""
        self._float.clear()
        self._open.close()

    def expected(self, names: Iterable[str], count: int) -> dict[str, FloatArray]:
        """Return what torch gives in FP32 for the first images, of some outputs."""
        if self.job.trained is None:
            return {name: self._expected[name][:count] for name in names}
        found = program_outputs(self.network.master.torch, self.network.probe[:count])
        return {name: found[name] for name in names}

    def manifest(self, built: Built) -> Manifest:
        """Return the manifest of an engine that was built and not yet run."""
        job, options = self.job, self.job.options
        quantized = job.images is not None and isinstance(options.precision, Int8)
        return Manifest(
            backbone=job.backbone.spec,
            input=self.network.input,
            outputs=built.graph.outputs,
            runtime=options.runtime,
            runtime_version=built.engine.runtime_version,
            precision=options.precision.name,
            precision_settings=asdict(options.precision),
            engine=built.engine.file,
            target=options.target_name,
            made_for=job.made_for,
            requires=built.engine.requires,
            weights_digest=job.weights_digest,
            calibration_digest=job.images.digest if job.images and quantized else None,
            fusions={record.name: record.rewrites for record in (*self.network.fusions, *built.records)},
            compiler=built.engine.compiler,
            tools=tool_versions() | built.engine.tools,
        )

    def lower_graph(self, graph: Graph, folder: Path) -> Engine:
        """Write a graph into a folder as an engine of the job's runtime."""
        options, backend = self.job.options, self.job.backend
        lowering: Lowering = resolve(str(backend.portable if options.portable else backend.lower))
        return lowering(graph, folder, self._lower_options())

    def _lower_options(self) -> LowerOptions:
        made_for, options = self.job.made_for, self.job.options
        settings = {} if made_for is None else made_for.options
        return LowerOptions(target=options.target, settings=settings, build=options.build, on_step=self._step)

    def _step(self, phase: str, done: int, total: int) -> None:
        self._progress(BuildStep(phase=phase, done=done, total=total))

    def _opened(self, manifest: Manifest, folder: Path) -> Runtime:
        return open_here(manifest, folder)

    def _float_engine(self, precision: str, plan: HalfPlan | None) -> Runtime:
        if precision not in self._float:
            folder = self._open.enter_context(scratch_folder(precision))
            manifest = self.manifest(self.build(plan, folder))
            manifest = replace(manifest, precision=precision, precision_settings={})
            self._float[precision] = self._open.enter_context(self._opened(manifest, folder))
        return self._float[precision]


def _apart(expected: Mapping[str, FloatArray], own: Mapping[str, FloatArray]) -> dict[str, float]:
    """Return the SQNR of each output that both have, in dB, as a report stores it."""
    shared = [name for name in expected if name in own]
    return {name: capped(sqnr_db(expected[name], own[name])) for name in shared}
