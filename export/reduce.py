"""A failing model -> its smallest part that fails, by polygraphy's ``debug reduce`` and graphsurgeon."""

from __future__ import annotations

import subprocess
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx_ir as ir

from deploykit.arrays import FloatArray
from deploykit.backends.engine_file import EngineFile
from deploykit.backends.onnx_external import load_external_data
from deploykit.backends.table import backend_of, engine_names, load_backend
from deploykit.bundle import open_bundle
from deploykit.child_process import child_environment, run_code, run_module
from deploykit.errors import DeployKitError, ExportError, SpecError
from deploykit.export.reduce_check import FAILS, CheckRequest, find_problem
from deploykit.optional import require
from deploykit.parity.reference import ParityReference
from deploykit.places import scratch_folder
from deploykit.spec import parse_precision

REDUCE_SECONDS = 1800.0
_LOG_LINES = 12
_POLYGRAPHY = "import sys; from polygraphy.tools import main; sys.exit(main())"


def reduce_bundle(folder: Path, output: Path) -> str | None:
    """Write the smallest part of a bundle's graph on which its runtime fails to ``output``.

    What failing means is the backend's to say (`Backend.debug`): it refuses the part, does not build it, or computes
    it otherwise than node by node by more than the bundle's budget.

    Returns:
        What the runtime does wrong with the part; None where it does nothing wrong with the whole
        graph, and the error is one of conversion or quantization.

    Raises:
        SpecError: the bundle carries no ONNX graph.
        MissingDependency: polygraphy or onnx-graphsurgeon is not installed.
        ExportError: polygraphy failed, with the end of its log.
    """
    manifest = open_bundle(folder, leave_engine=True)
    if not backend_of(manifest).reducible or not manifest.engine.endswith(".onnx"):
        reducible = [name for name in engine_names() if load_backend(name).reducible]
        raise SpecError(
            f"{folder} holds {manifest.engine}, and only bundles that hold an ONNX graph can be reduced: those of "
            f"{', '.join(reducible)} (portable ones). Export the same backbone as one of these, and debug that."
        )
    precision = parse_precision(manifest.precision, manifest.precision_settings)
    with closing(EngineFile(manifest, folder)) as engine:
        load_external_data(engine)
        reference = ParityReference.load(engine.read_beside("reference.npz"))
        return reduce_model(
            Path(str(engine)),
            output,
            images=reference.images[:1],
            runtime=manifest.runtime,
            min_sqnr_db=precision.min_sqnr_db,
        )


def reduce_model(
    model: Path,
    output: Path,
    *,
    images: FloatArray,
    runtime: str,
    min_sqnr_db: float,
    time_limit: float = REDUCE_SECONDS,
) -> str | None:
    """`reduce_bundle` for an ONNX file, on images ``(N, C, H, W)``; a dynamic batch is reduced with one image."""
    require("polygraphy")
    require("onnx_graphsurgeon")
    with scratch_folder("reduce") as work:
        np.save(work / "images.npy", images)
        fixed = work / "whole.onnx"
        onnx.save(with_fixed_batch(onnx.load(model)), fixed)
        request = CheckRequest(
            whole=str(fixed), images=str(work / "images.npy"), runtime=runtime, min_sqnr_db=min_sqnr_db
        )
        (work / "request.json").write_bytes(msgspec.json.encode(request))
        whole = find_problem(ir.load(fixed), request)
        if whole is None:
            return None
        _polygraphy(fixed, work, time_limit)
        reduced = work / "reduced.onnx"
        if not reduced.is_file():
            return whole  # no smaller part fails
        output.write_bytes(reduced.read_bytes())
        return find_problem(ir.load(reduced), request) or whole


def with_fixed_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for one image where the batch is dynamic: a part of a graph can be run or built in fixed shapes alone."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    batch = fixed.graph.input[0].type.tensor_type.shape.dim[0]
    if batch.HasField("dim_value"):
        return fixed
    batch.dim_value = 1
    del fixed.graph.value_info[:]
    for output in fixed.graph.output:
        output.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(fixed)


def _polygraphy(model: Path, work: Path, time_limit: float) -> None:
    check = run_module("deploykit.export.reduce_check", "polygraphy_debug.onnx", str(work / "request.json"))
    command = run_code(_POLYGRAPHY, "debug", "reduce", str(model), "-o", str(work / "reduced.onnx"))
    command += ["--mode", "bisect", "--fail-code", str(FAILS), "--check", *check]
    try:
        done = subprocess.run(
            command, cwd=work, env=child_environment(), capture_output=True, text=True, timeout=time_limit, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"reducing {model.name} took more than {time_limit:g} s and was stopped. Reduce a smaller variant of the "
            "backbone, or a smaller image size."
        ) from error
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        tail = "".join(f"\n  {line}" for line in lines[-_LOG_LINES:])
        raise DeployKitError(f"polygraphy debug reduce failed on {model.name}. Its log ends with:{tail}")
