"""The converter's own process: a saved torch program -> an .mlpackage folder.

coremltools imports every library of models that it finds, and writes to the terminal. Started by
`deploykit.backends.coreml.lower` as ``python -m deploykit.backends.coreml.converter REQUEST``.
"""

from __future__ import annotations

import json
import shutil
import sys
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed, which programs may call
from torch.fx import GraphModule

from deploykit.backends.conversion import ConversionRequest, Whole, answer, load_module
from deploykit.backends.coreml.integer_weights import check_integers, holds_half, planned_layers
from deploykit.backends.coreml.mil_program import CONTENT, FLOAT32, INT32, MODEL, WEIGHTS, Feature, read_program
from deploykit.backends.coreml.package import PACKAGE
from deploykit.backends.table import BACKENDS, load_backend
from deploykit.errors import ExportError
from deploykit.fusion.fold_dimensions import fold_dimensions
from deploykit.graph import TRANSPOSED

_CHANGED_SCALES = "common::distributive_quantized_binary_op_scale_normalization"
"""A pass that divides the scales of two summands by one of them: the sum's numbers, in other scales than the plan's."""

_DATE = "com.github.apple.coremltools.conversion_date"


_OTHER_LIBRARIES = ("libsvm", "sklearn", "tensorflow", "torchao", "xgboost")
"""What coremltools converts besides torch programs, and would import for many seconds, as other runtimes' packages."""


def convert(request: ConversionRequest) -> None:
    """Write the package that a request asks for, and prove what it has."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module = load_module(request)
        fold_dimensions(module)
        _remove_checks(module)
        planned = planned_layers(module, half=request.half_except is not None)
        # A package takes no uint8: pixels come as int32.
        dtype = torch.float32 if request.dtype == "float32" else torch.int32
        program = torch.export.export(Whole(module), (torch.zeros(request.shape, dtype=dtype),))
        model = _convert(program, request, _weights_of(module, request.half_except or ()))
    package = Path(request.engine)
    _write(model, package)
    written = read_program(package)
    _check_ends(written.inputs, {request.input: request.shape}, INT32 if dtype == torch.int32 else FLOAT32)
    _check_ends(written.outputs, dict(zip(request.outputs, _output_shapes(program), strict=True)), FLOAT32)
    check_integers(written, planned)


def _remove_checks(module: GraphModule) -> None:
    """Remove the checks of a program's tensors, in place: pixels come in another type than the program says."""
    for node in list(module.graph.nodes):
        if node.target == torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
    module.recompile()


def _weights_of(module: GraphModule, names: Iterable[str]) -> set[bytes]:
    """Return the bytes of weights by their names; a program that was wrapped has them behind a prefix."""
    suffixes = tuple(f".{name.removesuffix(TRANSPOSED)}" for name in names)
    return {value.numpy().tobytes() for name, value in module.state_dict().items() if f".{name}".endswith(suffixes)}


def _convert(program: torch.export.ExportedProgram, request: ConversionRequest, kept: set[bytes]) -> Any:
    runtimes = {load_backend(name).package.module for name in BACKENDS} - {"torch", PACKAGE.module}
    for library in (*_OTHER_LIBRARIES, *sorted(runtimes)):
        sys.modules[library] = None  # type: ignore[assignment]  # importing it fails, as if it were not installed
    import coremltools as ct

    def may_be_half(operator: Any) -> bool:
        values = {name: operator.inputs[name].val for name in ("weight", "scale") if name in operator.inputs}
        if values.get("scale") is not None:
            return holds_half(np.asarray(values["scale"], np.float32))
        return values.get("weight") is None or np.asarray(values["weight"], np.float32).tobytes() not in kept

    pipeline = ct.PassPipeline.DEFAULT
    pipeline.remove_passes({_CHANGED_SCALES})
    dtype = np.float32 if request.dtype == "float32" else np.int32
    return ct.convert(
        program.run_decompositions({}),
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS17,
        inputs=[ct.TensorType(name=request.input, shape=request.shape, dtype=dtype)],
        outputs=[ct.TensorType(name=name, dtype=np.float32) for name in request.outputs],
        compute_precision=ct.precision.FLOAT32
        if request.half_except is None
        else ct.transform.FP16ComputePrecision(op_selector=may_be_half),
        pass_pipeline=pipeline,
        skip_model_load=True,
    )


def _write(model: Any, package: Path) -> None:
    """Write the package's files, which are the same for the same program on any day."""
    spec = model.get_spec()
    spec.description.metadata.userDefined.pop(_DATE, None)
    entries = {MODEL: "CoreML Model Specification"}
    (package / MODEL).parent.mkdir(parents=True)
    (package / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    weights = Path(model.weights_dir) / Path(WEIGHTS).name
    if weights.is_file():
        (package / WEIGHTS).parent.mkdir()
        shutil.copyfile(weights, package / WEIGHTS)
        entries[str(Path(WEIGHTS).parent)] = "CoreML Model Weights"
    (package / "Manifest.json").write_text(json.dumps(_contents(entries), indent=4) + "\n", encoding="utf-8")


def _contents(entries: dict[str, str]) -> dict[str, Any]:
    """Return what ``Manifest.json`` says of the files, by their paths, each with what it is."""
    identifiers = {path: str(uuid.uuid5(uuid.NAMESPACE_URL, path)) for path in entries}
    return {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            identifiers[path]: {
                "author": "com.apple.CoreML",
                "description": description,
                "name": Path(path).name,
                "path": str(Path(path).relative_to(Path(CONTENT).parent)),
            }
            for path, description in entries.items()
        },
        "rootModelIdentifier": identifiers[MODEL],
    }


def _output_shapes(program: torch.export.ExportedProgram) -> list[tuple[int, ...]]:
    (outputs,) = program.graph_module.graph.output_node().args
    return [tuple(output.meta["val"].shape) for output in outputs]


def _check_ends(found: tuple[Feature, ...], expected: dict[str, tuple[int, ...]], dtype: int) -> None:
    """Prove that a package has the inputs or outputs of the program.

    Raises:
        ExportError: it has not.
    """
    ends = {feature.name: feature.shape for feature in found}
    if ends != expected or any(feature.dtype != dtype for feature in found):
        raise ExportError(
            f"coremltools wrote {', '.join(f'{name} {shape}' for name, shape in ends.items())}; expected "
            f"{', '.join(f'{name} {shape}' for name, shape in expected.items())}. Export for another runtime."
        )


if __name__ == "__main__":
    sys.exit(answer(sys.argv[1], convert))
