"""The sensitivity of a backbone's layers to INT8, as an export would quantize them; no engine is built."""

from __future__ import annotations

from dataclasses import replace

from deploykit.backends.backend import resolve
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.sensitivity import Sensitivity, measure_sensitivity
from deploykit.errors import SpecError
from deploykit.export.cures import try_cures
from deploykit.export.job import ExportJob, checked
from deploykit.export.pipeline import evaluate_job, prepare
from deploykit.export.recipe_trials import settle_recipe
from deploykit.progress import Progress, StageStarted, quiet


def sensitivity(job: ExportJob, *, cures: bool = False, progress: Progress = quiet) -> Sensitivity:
    """Measure how much noise each layer makes that an INT8 export of this job would quantize.

    ``cures`` also tries what could be done against it; see `deploykit.export.cures`.

    Raises:
        SpecError: the job is not of INT8, or the runtime cannot make it.
        CalibrationError: no images, or images that cannot be used.
    """
    job = checked(job)
    if job.options.precision.name != "int8":
        raise SpecError(f"sensitivity is of int8, and precision is {job.options.precision.name!r}. Ask for int8.")
    job, _ = settle_recipe(job, progress, evaluate_job)
    network = prepare(job, progress)
    assert isinstance(network.plan, QuantizationPlan)  # noqa: S101  (of INT8; narrows the type)
    progress(StageStarted(name="sensitivity"))
    dialect = resolve(str(job.backend.dialect))
    found = measure_sensitivity(network.master.onnx.model, network.plan, network.probe, dialect, parts=True)
    return replace(found, cures=try_cures(job, network, found, progress)) if cures else found
