"""The tuning of an export by distillation: its network in torch for any batch, and what it is tuned for."""

from __future__ import annotations

from dataclasses import replace

from deploykit.backends.backend import resolve
from deploykit.calibration.dialect import Dialect
from deploykit.calibration.distillation import MOST_IMAGES, distill
from deploykit.calibration.fake_quantized_network import EVERY_RUNTIME
from deploykit.calibration.float_network import FloatNetwork
from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision import Tuning
from deploykit.export.job import ExportJob
from deploykit.export.measure import parity_images
from deploykit.export.scaling import scaling_passes
from deploykit.export.trace import output_names, trace
from deploykit.fusion.pipeline import export_passes, fuse
from deploykit.graph import Master
from deploykit.images.preprocess import network_images
from deploykit.progress import Progress, StageStarted
from deploykit.spec import BatchRange, Int8


def tuning(job: ExportJob, master: Master, progress: Progress) -> Tuning | None:
    """Return what tunes the plan of a job; None for settings that do not ask for it.

    Args:
        job: its recipe settled.
        master: its fused network.
        progress: hears of each step.
    """
    settings = job.options.precision
    if not isinstance(settings, Int8) or settings.filled().rounding != "distilled":
        return None
    own = settings.distill_for_runtime
    dialect: Dialect = resolve(str(job.backend.dialect)) if own else EVERY_RUNTIME

    def run(plan: QuantizationPlan, images: CalibrationSet, chosen: Int8) -> QuantizationPlan:
        progress(StageStarted(name="distill"))
        network = float_network(job, master)
        return distill(network, plan, images.sample(MOST_IMAGES), chosen, dialect=dialect, on_step=progress)

    return Tuning(run=run, runtime=job.options.runtime if own else None)


def float_network(job: ExportJob, master: Master) -> FloatNetwork:
    """Return the network of a master graph in torch, for any batch.

    Raises:
        ExportError: torch cannot trace it for any batch.
    """
    spec = replace(job.input.as_images(), batch=BatchRange())
    scaling = scaling_passes(job.backbone, job.options.precision, job.images, spec)
    probe = network_images(parity_images(job.images, spec), spec)
    program = fuse(trace(job.backbone, spec), spec, probe, export_passes(*scaling)).program
    return FloatNetwork(
        model=master.onnx.model,
        traced=master.torch.program.module(),
        module=program.module(),
        outputs=output_names(job.backbone),
        engine_outputs=job.backbone.spec.output_names,
    )
