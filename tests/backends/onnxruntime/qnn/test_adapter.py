"""A context binary opens on its NPU, in the simulator where that is asked for, and nowhere else."""

from __future__ import annotations

import subprocess
import sys

import onnx
import pytest

from deploykit.backends.onnxruntime.qnn.package import DEVICE, SIMULATOR
from deploykit.backends.runtime import run_in_batches
from deploykit.child_process import child_environment
from deploykit.errors import BundleError, DeviceUnavailable, IncompatibleEngine, SpecError
from deploykit.export.measure import node_by_node, open_here
from deploykit.parity.metrics import sqnr_db
from tests.backends.onnxruntime.qnn.conftest import TARGET, on_x86

SHARED_ROUNDING_DB = 33.0
"""Two ways to compute one graph of integers: some values fall on the other side of a half."""


@on_x86
@pytest.mark.parametrize(
    ("engine", "least"),
    [("residual_engine", SHARED_ROUNDING_DB), ("tokens_engine", 35.0), ("windows_engine", 35.0)],
)
def test_the_simulator_gives_the_numbers_of_the_graph(engine, least, request):
    made = request.getfixturevalue(engine)
    expected = node_by_node(made.graph, made.case.images)
    with made.open() as model:
        found = run_in_batches(model, made.case.images)
        assert (model.device, model.runtime) == (SIMULATOR, "onnxruntime")
    for name, values in found.items():
        assert sqnr_db(expected[name], values) > least, name


@on_x86
@pytest.mark.parametrize("engine", ["half_engine", pytest.param("half_windows_engine", marks=pytest.mark.slow)])
def test_half_precision_is_near_fp32(engine, request):
    made = request.getfixturevalue(engine)
    with made.open() as model:
        found = run_in_batches(model, made.case.images)
    expected = dict(zip((output.name for output in made.graph.outputs), made.case.run(), strict=True))
    for name, own in found.items():
        assert sqnr_db(expected[name], own) > 50, name


@on_x86
def test_what_the_simulator_gives_is_never_said_to_be_the_devices(residual_engine):
    with residual_engine.open() as model:
        seen = model.seen_on()
    assert "device" not in seen
    assert seen["simulator"].startswith("the simulator of QNN 2.")
    with open_here(residual_engine.manifest, residual_engine.folder) as measured:
        assert measured.simulator == seen["simulator"]


@on_x86
@pytest.mark.parametrize("device", ["auto", DEVICE, "cpu"])
def test_a_machine_without_the_npu_says_what_is_needed(residual_engine, device):
    asked = DEVICE if device == "auto" else device
    message = (
        rf"this engine is for {TARGET.title} \(soc_model 57, htp_arch 75\), and '{asked}' was asked for; .*{SIMULATOR}"
    )
    with pytest.raises(DeviceUnavailable, match=message):
        residual_engine.open(device)


@on_x86
def test_a_context_of_a_newer_sdk_is_refused(residual_engine):
    newer = residual_engine.manifest.requires | {"qnn_sdk": "9.1.0"}
    with pytest.raises(
        IncompatibleEngine, match=r"built with QNN 9\.1\.0, and onnxruntime-qnn here has QNN 2\..*'onnxru"
    ):
        residual_engine.open(requires=newer)


@on_x86
def test_a_context_that_qnn_refuses_names_the_soc_that_it_is_for(residual_engine, tmp_path):
    model = onnx.load(residual_engine.path)
    (code,) = [each for each in model.graph.node[0].attribute if each.name == "ep_cache_context"]
    code.s = code.s[: len(code.s) // 2]
    onnx.save(model, tmp_path / "model.onnx")
    from deploykit.backends.onnxruntime.qnn.adapter import QnnRuntime

    with pytest.raises(IncompatibleEngine, match=r"refuses model\.onnx: .*built for .*soc_model 57"):
        QnnRuntime(residual_engine.manifest, tmp_path, device=SIMULATOR)


@on_x86
def test_a_plain_graph_under_the_name_of_a_context_is_refused(residual_engine, tmp_path):
    onnx.save(onnx.ModelProto(graph=onnx.GraphProto(node=[onnx.NodeProto(op_type="Relu")])), tmp_path / "model.onnx")
    from deploykit.backends.onnxruntime.qnn.adapter import QnnRuntime

    with pytest.raises(BundleError, match="holds Relu; expected EPContext alone"):
        QnnRuntime(residual_engine.manifest, tmp_path, device=SIMULATOR)


@on_x86
def test_the_simulator_says_nothing_on_standard_output(residual_engine):
    """Commands print JSON there; Qualcomm's library prints a line of its own when it starts."""
    code = (
        "import sys\n"
        "from deploykit.backends.onnxruntime.qnn.session import open_session\n"
        "open_session(sys.argv[1], {}, {})\n"
        "print('opened')"
    )
    command = [sys.executable, "-c", code, str(residual_engine.path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=child_environment())
    assert done.stdout == "opened\n"


@on_x86
def test_a_closed_model_says_so(residual_engine):
    model = residual_engine.open()
    model.close()
    with pytest.raises(SpecError, match="is closed"):
        model(residual_engine.case.images[:1])
