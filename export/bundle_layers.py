"""Walk the layers of a bundle's engine, beside those of another bundle or of itself in float."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir

from deploykit.backends.engine_file import EngineFile
from deploykit.backends.onnx_external import load_external_data
from deploykit.backends.table import backend_of, engine_names, load_backend
from deploykit.bundle import open_bundle
from deploykit.bundle_files import PLAN_FILE, PLAN_FILES
from deploykit.errors import SpecError
from deploykit.export.layers import SAME_DB, LayerReport, compare_layers
from deploykit.export.runtime_layers import compare_in_runtime
from deploykit.graph import TRANSPOSED
from deploykit.manifest import Manifest
from deploykit.parity.reference import REFERENCE_FILE, ParityReference

EQUALIZED = "equalize-channels"


def bundle_layers(
    folder: Path, reference: Path | None = None, *, runtime: str | None = None, reproducer: Path | None = None
) -> LayerReport:
    """Return each layer's own error and the whole network's, on the bundle's images.

    Args:
        folder: the bundle.
        reference: a bundle of the same backbone that holds an ONNX graph, such as the last release's. With the same
            precision and plan every layer must give the same, and the first that does not is the culprit; with
            another precision, the layer with the largest own error is. None: the engine itself with its activations in
            float.
        runtime: compare with what this runtime makes of each layer of the bundle's graph, in place of a reference.
        reproducer: where to write a culprit that gives something else than the same, see `compare_layers`.

    Raises:
        SpecError: a bundle that holds no ONNX graph, of another network, or equalized otherwise; a runtime that reads
            none.
        ExportError: the runtime refuses a part of the graph.
        BundleError: a bundle is damaged.
    """
    if runtime is not None and reference is not None:
        raise SpecError("a reference and a runtime to compare with were given. Fix: give one of the two.")
    manifest = open_bundle(folder)
    model, images = engine_graph(folder, manifest)
    if runtime is not None:
        modules = modules_of_plan(folder, manifest)
        return compare_in_runtime(model, images, runtime, modules=modules, reproducer=reproducer)
    names = [output.name for output in manifest.outputs]
    other = None if reference is None else open_bundle(reference)
    if reference is None or other is None:
        return compare_layers(model, images, modules=modules_of_plan(folder, manifest), outputs=names)
    _check_pair(manifest, other)
    alike = (manifest.precision, manifest.weights_digest) == (other.precision, other.weights_digest)
    same = alike and all(manifest.files.get(name) == other.files.get(name) for name in PLAN_FILES)
    return compare_layers(
        model,
        images,
        reference=engine_graph(reference, other)[0],
        reference_name=f"{other.runtime} {other.precision} of {reference}",
        min_own_db=SAME_DB if same else None,
        modules=modules_of_plan(folder, manifest),
        outputs=names,
        reproducer=reproducer,
    )


def engine_graph(folder: Path, manifest: Manifest) -> tuple[ir.Model, Any]:
    """Return the graph of a bundle with its weights, and the images as it takes them.

    Raises:
        SpecError: the engine is no ONNX graph.
    """
    if not manifest.engine.endswith(".onnx") or backend_of(manifest).debug is None:
        readable = [name for name in engine_names() if load_backend(name).source == "onnx" and load_backend(name).debug]
        raise SpecError(
            f"{folder} holds {manifest.engine}, whose layers cannot be read; expected an ONNX graph. Fix: export the "
            f"same backbone for one of {', '.join(readable)}, and look at that."
        )
    with closing(EngineFile(manifest, folder)) as engine:
        load_external_data(engine)
        model = ir.load(Path(str(engine)))
        for value in model.graph.initializers.values():  # the file is gone after this
            if value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
        reference = ParityReference.load(engine.read_beside(REFERENCE_FILE))
    return model, reference.images.astype(manifest.input.dtype, copy=False)


def _check_pair(manifest: Manifest, other: Manifest) -> None:
    own, its = (each.input.shape_at(1)[1:] for each in (manifest, other))
    if (manifest.backbone.name, own) != (other.backbone.name, its):
        raise SpecError(
            f"the reference is {other.backbone.name} {its} and the bundle {manifest.backbone.name} {own}. "
            "Fix: give a reference of the same backbone and image size."
        )
    if manifest.fusions.get(EQUALIZED, 0) != other.fusions.get(EQUALIZED, 0):
        raise SpecError(
            "the channels of one of the two bundles were scaled against each other before it was quantized, so that "
            "their tensors do not correspond. Fix: give a reference of the same precision, or none."
        )


def modules_of_plan(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Return the path in torch of each quantized node's weights."""
    if PLAN_FILE not in manifest.files:
        return {}
    plan = msgspec.json.decode((folder / PLAN_FILE).read_bytes(), type=dict[str, Any])
    weights = plan["placement"]["weights"]
    paths = {node: str(entry["weight"]).removeprefix("backbone.") for node, entry in weights.items()}
    return {node: path.removesuffix(TRANSPOSED).removesuffix(".weight") for node, path in paths.items()}
