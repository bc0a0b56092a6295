"""A model that another tool quantized, as a plan that every runtime's dialect renders."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from deploykit.arrays import FloatArray, ImageArray
from deploykit.backbones.features import levels_by_stride
from deploykit.backends.backend import Backend, Engine, Lowering, LowerOptions, resolve
from deploykit.backends.runtime import run_in_batches
from deploykit.backends.table import backend_of, engine_names, load_backend
from deploykit.bundle import Manifest, writing
from deploykit.calibration.channel_scales import fold_channel_scales
from deploykit.calibration.dialect import Dialect, Rendered
from deploykit.calibration.images import CalibrationSource, calibration_set
from deploykit.calibration.imported_plan import plan_of
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.strip_quantizers import strip_quantizers
from deploykit.errors import CalibrationWarning, QuantizedModelError, SpecError, plain_reason
from deploykit.export.graphs import output_specs
from deploykit.export.job import tool_versions
from deploykit.export.measure import measure, parity_images
from deploykit.export.pipeline import ExportResult, write_reports
from deploykit.export.quantized_file import input_of, read_quantized, settle_opset
from deploykit.graph import Graph, OnnxGraph
from deploykit.images.preprocess import network_images
from deploykit.labels import LabelSource, check_count, parse_labels
from deploykit.onnx_session import graph_batch, onnx_session
from deploykit.parity.baseline import BASELINE_FILE, measure_baseline
from deploykit.parity.compare import LOGITS
from deploykit.parity.reference import REFERENCE_FILE, capture
from deploykit.processor import machine_key, saturates
from deploykit.progress import Progress, StageStarted, quiet
from deploykit.spec import BATCH_DIM, BackboneSpec, InputSpec, Int8, Preprocessing

FAMILY = "imported"
MIN_SQNR_DB = 20.0
"""How near an engine's outputs have to be to those of the tool's own graph, in dB, unless something else is asked."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImportedNetwork:
    """A quantized model, taken apart.

    ``plan`` has the tool's scales, zero points and integers; ``master`` is the float graph that it belongs to.
    ``source`` is the tool's own graph, which engines are compared with. ``ignored`` names the tool's quantizers that
    the plan has no use for: what they rounded is computed in float.
    """

    digest: str
    input: InputSpec
    backbone: BackboneSpec
    master: OnnxGraph
    plan: QuantizationPlan
    source: ir.Model
    labels: tuple[str, ...] | None
    ignored: tuple[str, ...]

    def outputs_of_source(self, images: FloatArray) -> dict[str, FloatArray]:
        """Run the tool's own graph node by node as it is written, on ``(N, C, H, W)`` images."""
        return _run(self.source, self.input, images)

    def export(
        self,
        output: str | os.PathLike[str],
        *,
        runtime: str,
        images: CalibrationSource | None = None,
        min_sqnr_db: float | None = None,
        target: str | None = None,
        overwrite: bool = False,
        progress: Progress = quiet,
    ) -> ExportResult:
        """Write the network as a bundle of one runtime, compared with the tool's own graph.

        On processors whose products of 8-bit weights saturate, this one or the target's, the weights are rounded
        anew so that they do not, with a warning: the tool's integers would give other numbers there than the tool's.

        Args:
            output: the folder to write.
            runtime: the engine's runtime, one that lowers ONNX graphs.
            images: to compare on, as for calibration; None: synthetic ones, which show whether the conversion is right.
            min_sqnr_db: the budget, in dB of the worst output against the tool's graph; None: 20, and 12 where the
                weights are rounded anew.
            target: what the engine is built for, where the runtime has targets.
            overwrite: replace an existing bundle.
            progress: hears of the stages.

        Raises:
            SpecError: a runtime that takes no ONNX graphs, or an unknown target.
            ExportError: the runtime does not take the graph.
            ParityError: the engine's outputs are farther from the tool's than the budget.
            BundleError: the folder is taken, or cannot be written.
        """
        backend = _backend(runtime, target)
        coarse = backend.uses_cpu and saturates(target)
        budget = min_sqnr_db if min_sqnr_db is not None else Int8.min_sqnr_db if coarse else MIN_SQNR_DB
        precision = Int8(min_sqnr_db=budget, recipe=None, reduce_range=coarse).filled()
        chosen = None if images is None else calibration_set(images, self.input)
        compared_on = parity_images(chosen, self.input)
        with writing(Path(output), overwrite=overwrite) as staging:
            progress(StageStarted(name="render"))
            dialect: Dialect = resolve(str(backend.dialect))
            plan = dialect.keep_float(self.master.model, _without_saturation(self.plan) if coarse else self.plan)
            rendered = dialect.render(self.master, plan, network_images(compared_on, self.input))
            progress(StageStarted(name="lower"))
            lower = _lowering(backend, target)
            manifest = self._manifest(backend, lower(rendered.graph, staging), rendered, precision, target)
            progress(StageStarted(name="parity"))
            expected = self.outputs_of_source(network_images(compared_on, self.input))
            parity, manifest = measure(
                manifest,
                staging,
                images=compared_on,
                expected=expected,
                precision=precision,
                graph=rendered.graph,
                whole=None,
                lower=lower,
            )
            parity = replace(parity, reference="the model that was imported")
            parity.raise_for_failures()
            progress(StageStarted(name="bundle"))
            _write_references(manifest, staging, compared_on, expected)
            plan.save(staging)
            result = ExportResult(folder=Path(output), manifest=manifest, parity=parity)
            return write_reports(result, staging, self.labels)

    def _manifest(
        self, backend: Backend, engine: Engine, rendered: Rendered, precision: Int8, target: str | None
    ) -> Manifest:
        return Manifest(
            backbone=self.backbone,
            input=self.input,
            outputs=rendered.graph.outputs,
            runtime=backend.name,
            runtime_version=engine.runtime_version,
            precision=precision.name,
            precision_settings=asdict(precision),
            engine=engine.file,
            target=target,
            requires=engine.requires,
            weights_digest=self.digest,
            fusions={record.name: record.rewrites for record in rendered.records},
            compiler=engine.compiler,
            tools=tool_versions() | engine.tools,
        )


def import_quantized(
    path: str | os.PathLike[str],
    *,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    labels: LabelSource | None = None,
) -> ImportedNetwork:
    """Take a model that another tool quantized: its scales, zero points and integers become a quantization plan.

    Takes ONNX files with QuantizeLinear and DequantizeLinear around float operators, as ONNX Runtime's
    quantize_static, NNCF, ModelOpt and the export of PyTorch's PT2E flow write them.

    Args:
        path: the ``.onnx`` file, its external weights beside it.
        preprocessing: how images were prepared in training; None: ImageNet's mean and std.
        labels: the class names, in the order of the classes.

    Raises:
        QuantizedModelError: what cannot be taken, by name.
        SpecError: labels that do not fit.
    """
    file = Path(path)
    source, digest = read_quantized(file)
    how = Preprocessing(**preprocessing) if isinstance(preprocessing, Mapping) else preprocessing or Preprocessing()
    taken = input_of(source, how)
    _rename_batch(source, taken)
    backbone = _describe(source, taken, file.stem)
    names = None if labels is None else parse_labels(labels)
    if names is not None:
        check_count(names, backbone.num_classes)
    stripped = strip_quantizers(source)
    fold_channel_scales(stripped)
    stripped = replace(stripped, model=settle_opset(stripped.model))
    imported = plan_of(stripped, digest)
    outputs = output_specs(stripped.model)
    return ImportedNetwork(
        digest=digest,
        input=taken,
        backbone=backbone,
        master=OnnxGraph(input=taken, outputs=outputs, model=stripped.model),
        plan=imported.plan,
        source=source,
        labels=names,
        ignored=imported.ignored,
    )


def _describe(source: ir.Model, taken: InputSpec, name: str) -> BackboneSpec:
    """Run a graph once to see what it gives, name its outputs by deploykit's convention, and describe them."""
    try:
        found = _run(source, taken, np.zeros(taken.shape_at(graph_batch(source)), np.float32))
    except Exception as error:  # the runtime raises classes of its own
        raise QuantizedModelError(
            f"the graph does not run on one batch of zeros ({plain_reason(error)}). Fix: check the file with "
            "onnx.checker, and quantize it again."
        ) from error
    ranks = {output.ndim for output in found.values()}
    if len(found) == 1 and ranks == {2}:
        (logits,) = found.values()
        _rename_outputs(source, [LOGITS])
        return _spec(name, taken, num_classes=logits.shape[1])
    if ranks != {4}:
        seen = ", ".join(f"{key} {output.shape}" for key, output in found.items())
        raise QuantizedModelError(
            f"the graph gives {seen}; expected one (N, D) output, or feature maps (N, C, H, W). Fix: cut it to these."
        )
    strides = [max(1, round(taken.height / output.shape[2])) for output in found.values()]
    order = sorted(range(len(strides)), key=lambda position: strides[position])
    channels = [list(found.values())[position].shape[1] for position in order]
    levels = levels_by_stride([strides[position] for position in order], channels)
    values = list(source.graph.outputs)
    source.graph.outputs.clear()
    source.graph.outputs.extend(values[position] for position in order)
    _rename_outputs(source, [level.name for level in levels])
    return replace(_spec(name, taken, num_classes=0), features_only=True, levels=tuple(levels))


def _spec(name: str, taken: InputSpec, num_classes: int) -> BackboneSpec:
    return BackboneSpec(
        name=name,
        family=FAMILY,
        levels=(),
        num_classes=num_classes,
        in_channels=taken.channels,
        image_size=(taken.height, taken.width),
    )


def _rename_outputs(model: ir.Model, names: Sequence[str]) -> None:
    for position, output in enumerate(model.graph.outputs):  # which may swap their names
        output.name = f"/output{position}"
    values = {value.name: value for node in model.graph for value in node.outputs}
    values |= {value.name: value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for output, name in zip(model.graph.outputs, names, strict=True):
        holder = values.get(name)
        if holder is not None and holder is not output:
            holder.name = f"{name}/inner"
        output.name = name


def _rename_batch(model: ir.Model, taken: InputSpec) -> None:
    if isinstance(taken.batch, int):
        return
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and len(value.shape):
            value.shape = ir.Shape([BATCH_DIM, *list(value.shape)[1:]])


def _run(model: ir.Model, taken: InputSpec, images: FloatArray) -> dict[str, FloatArray]:
    session, size = onnx_session(model, optimize=False), graph_batch(model)
    names = [str(value.name) for value in model.graph.outputs]
    parts = []
    for start in range(0, len(images), size):
        piece = images[start : start + size]
        outputs = session.run(names, {taken.name: piece[np.arange(size) % len(piece)]})
        parts.append([output[: len(piece)] for output in outputs])
    return dict(zip(names, (np.concatenate(column) for column in zip(*parts, strict=True)), strict=True))


def _backend(runtime: str, target: str | None) -> Backend:
    backend = load_backend(runtime)
    if not backend.has_engines or backend.source != "onnx":
        taking = [name for name in engine_names() if load_backend(name).source == "onnx"]
        raise SpecError(
            f"the {runtime} runtime takes no ONNX graphs, and an imported model is one. Choose {', '.join(taking)}."
        )
    backend.require()
    if target is not None and target not in backend.targets:
        known = ", ".join(backend.targets) or "no targets"
        raise SpecError(f"unknown {runtime} target {target!r}; it has {known}.")
    return backend


def _without_saturation(plan: QuantizationPlan) -> QuantizationPlan:
    """Return the plan with weights that are rounded so that no sum of two products leaves 16 bits."""
    warnings.warn(
        "products of 8-bit weights saturate on the engine's processor, so the weights are rounded anew to about 7 "
        "bits, and the imported integers are not kept. Fix: run the engine on a processor with VNNI and export it "
        "there, or name such a target.",
        CalibrationWarning,
        stacklevel=3,
    )
    return replace(plan, reduce_range=True, weights={})


def _lowering(backend: Backend, target: str | None) -> Any:
    lowering: Lowering = resolve(str(backend.lower))

    def lower(graph: Graph, folder: Path) -> Engine:
        return lowering(graph, folder, LowerOptions(target=target))

    return lower


def _write_references(
    manifest: Manifest, staging: Path, images: ImageArray, expected: Mapping[str, FloatArray]
) -> None:
    """Keep what `deploykit verify` compares with: the tool's outputs, and what the engine itself gave."""
    chosen = {output.name: expected[output.name] for output in manifest.outputs}
    capture(images.astype(np.float32), chosen).save(staging / REFERENCE_FILE)
    if manifest.status == "built":
        return
    with backend_of(manifest).load_adapter()(manifest, staging) as model:
        machine = machine_key(model.seen_on(), model.threads)
        measure_baseline(lambda given: run_in_batches(model, given), images, machine).save(staging / BASELINE_FILE)
