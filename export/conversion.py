"""Prove that a runtime converts the network rightly, before what a precision loses is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deploykit.backends.backend import resolve
from deploykit.calibration.dialect import Rendered
from deploykit.errors import DeviceUnavailable, ExportError, ParityError
from deploykit.export.culprit import wrong_in_onnx, wrong_in_runtime
from deploykit.fusion.locate import describe_node
from deploykit.graph import OnnxGraph
from deploykit.parity.compare import compare
from deploykit.progress import Progress, StageStarted
from deploykit.spec import Fp32, Int8

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploykit.export.evaluate import Evaluator
    from deploykit.export.job import ExportJob

PROOF_IMAGES = 4
"""A wrong operator is wrong on every image."""

_REMEDY = "Fix: write that part of the network with other operators, export for another runtime, or report it."


def prove_conversion(engines: Evaluator, progress: Progress) -> dict[str, float]:
    """Hold the runtime's FP32 engine to FP32's budget, where another precision is asked for and its device is here.

    A budget for INT8 would take a wrong border or a wrong resize for rounding. A runtime of torch programs has no
    operators of its own to convert to, and half a minute of compilation: there the FP32 engine is held to its budget
    where the export builds one anyway. A device without FP32 has no such engine.

    Returns:
        The SQNR of each output of the FP32 engine against torch, in dB; empty where none was built.

    Raises:
        ExportError: the runtime cannot convert the network; names the operator.
        ParityError: it converts the network wrongly; names the operator.
    """
    job, needed = engines.job, _needs_fp32(engines.job)
    if Fp32.name not in job.backend.precisions:
        return {}
    if job.options.precision.name == Fp32.name or not (job.backend.source == "onnx" or needed):
        return {}
    if not job.backend.load_devices()():
        return {}
    progress(StageStarted(name="conversion"))
    with operator_named(engines, fp32=True):
        try:
            found = engines.run_fp32(PROOF_IMAGES)
        except DeviceUnavailable:
            return {}
        if not needed:
            engines.close_float()
        budget = Fp32().min_sqnr_db
        levels = compare(engines.expected(found, PROOF_IMAGES), found, min_sqnr_db=budget, logits=None)
        wrong = [f"{level.name}: {level.sqnr_db:.1f} dB" for level in levels if not level.passed]
        if wrong:
            raise ParityError(
                f"{job.options.runtime} computes the network otherwise than torch already in fp32, before "
                f"{job.options.precision.name}: {', '.join(wrong)}; expected at least {budget:g} dB."
            )
    engines.proof = found
    return {level.name: level.sqnr_db for level in levels}


def _needs_fp32(job: ExportJob) -> bool:
    """Return whether the export measures an FP32 engine beside its own."""
    options = job.options
    searched = isinstance(options.precision, Int8) and options.precision.mixed_precision
    return options.time_against_fp32 or options.require_speedup or searched


@contextmanager
def operator_named(engines: Evaluator, *, fp32: bool | None = None) -> Iterator[None]:
    """Add to the error of an FP32 engine which operator is converted wrongly, where one is found.

    Args:
        engines: build the network that fails.
        fp32: what is built within is FP32, where alone a wrong number is the conversion's; None: as the job says.

    Raises:
        ExportError, ParityError: what was raised within, with the operator.
    """
    try:
        yield
    except (ExportError, ParityError) as error:
        if not (engines.job.options.precision.name == Fp32.name if fp32 is None else fp32):
            raise
        try:
            found = _find(engines)
        except Exception:  # the search runs what just failed
            found = None
        if found is None:
            raise
        named = f"{error}\nThe operator at fault: {found}. {_REMEDY}"
        if isinstance(error, ParityError):
            raise ParityError(named, levels=error.levels) from error
        raise ExportError(named) from error


def _find(engines: Evaluator) -> str | None:
    """Describe the operator that one of the two conversions gets wrong."""
    budget, images, master = Fp32().min_sqnr_db, engines.network.probe, engines.network.master
    if (found := wrong_in_onnx(master, images, budget)) is not None:
        return found
    backend = engines.job.backend
    if backend.debug is None or backend.source != "onnx":
        return None
    rendered: Rendered = engines.render(None)
    assert isinstance(rendered.graph, OnnxGraph)  # noqa: S101  (the backend's source; narrows the type)
    wrong = wrong_in_runtime(rendered.graph.model, images, resolve(backend.debug), budget)
    if wrong is None:
        return None
    node, problem = wrong
    return f"{engines.job.options.runtime} converts {_described(node, engines)} wrongly ({problem})"


def _described(node: ir.Node, engines: Evaluator) -> str:
    """Name the ONNX operator, and the one of torch that it comes from, as far as their names tell."""
    program = engines.network.master.torch.program
    origins = {f"node_{origin.name}": origin for origin in program.graph.nodes if origin.op == "call_function"}
    origin = origins.get(str(node.name))
    written = f"{node.op_type} {node.name!r}"
    return written if origin is None else f"{written} (from {describe_node(origin)})"
