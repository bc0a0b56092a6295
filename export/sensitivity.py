"""The sensitivity of a backbone's layers to INT8, as an export would quantize them; no engine is built."""

from __future__ import annotations

from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.sensitivity import Sensitivity, measure_sensitivity, style_of
from deploykit.errors import SpecError
from deploykit.export.pipeline import Progress, prepare, settle_recipe
from deploykit.export.request import ExportRequest, check_request


def sensitivity(request: ExportRequest, *, progress: Progress | None = None) -> Sensitivity:
    """Measure how much noise each layer makes that an INT8 export of this request would quantize.

    Raises:
        SpecError: the request is not of INT8, or the runtime cannot make it.
        CalibrationError: no images, or images that cannot be used.
    """
    check_request(request)
    if request.precision.name != "int8":
        raise SpecError(f"sensitivity is of int8, and precision is {request.precision.name!r}. Ask for int8.")
    progress = progress or Progress()
    request, _ = settle_recipe(request, progress)
    network = prepare(request, progress)
    model, plan = network.master.model, network.plan
    assert model is not None and isinstance(plan, QuantizationPlan)  # noqa: S101  (of INT8; narrows the types)
    progress.stage("sensitivity")
    return measure_sensitivity(model, plan, network.probe, style_of(request.runtime))
