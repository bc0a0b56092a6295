from __future__ import annotations

import dataclasses
import signal
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from deploykit import export_backbone, load_bundle
from deploykit.backends.backend import LowerOptions
from deploykit.backends.tensorrt.build import SETTINGS_FILE, BuildSettings, build_plan
from deploykit.backends.tensorrt.cuda_driver import cuda_capabilities
from deploykit.backends.tensorrt.lower import lower, lower_portable
from deploykit.bundle import open_bundle
from deploykit.errors import DeviceUnavailable, ExportError, SpecError
from deploykit.export.measure import PROXY
from deploykit.graph import OnnxGraph
from deploykit.parity.report import ParityReport
from deploykit.spec import BuildOptions, InputSpec, Int8, TensorSpec
from tests.backends.tensorrt.forms import OUT, WEIGHT_INTEGERS, activation, integer_operator, weight
from tests.backends.tensorrt.forms import SIDE as FORM_SIDE
from tests.conftest_graphs import tiny_graph
from tests.processes import ends
from tests.small_resnet import SMALL


@pytest.mark.parametrize("target", [None, "sm89", "sm120"])
def test_a_dynamic_plan_is_built_without_a_gpu(target: str | None, tmp_path: Path):
    engine = lower(tiny_graph(), tmp_path, LowerOptions(target=target))
    assert [path.name for path in tmp_path.iterdir()] == [engine.file] == ["model.plan"]
    assert (tmp_path / engine.file).stat().st_size > 10_000
    assert engine.requires["compute_capability"] == (target or "sm86")


def graph_of(model: onnx.ModelProto) -> OnnxGraph:
    outputs = (TensorSpec(name="logits", shape=OUT),)
    return OnnxGraph(input=InputSpec(height=FORM_SIDE, width=FORM_SIDE), outputs=outputs, model=ir.from_proto(model))


@pytest.mark.parametrize(
    "model",
    [activation(np.int8(0)), activation(np.uint8(0)), activation(None), weight(WEIGHT_INTEGERS, None, bias=True)],
    ids=["signed", "uint8", "missing zero point", "int32 bias"],
)
def test_quantization_with_an_exact_signed_form_is_built(model: onnx.ModelProto, tmp_path: Path):
    engine = lower(graph_of(model), tmp_path, LowerOptions())
    assert (tmp_path / engine.file).stat().st_size > 10_000


@pytest.mark.parametrize(
    "model",
    [activation(np.int8(3)), activation(np.uint8(128)), activation(np.int16(0)), integer_operator("QLinearConv")],
    ids=["asymmetric", "uint8", "int16", "QLinearConv"],
)
def test_quantization_without_one_is_refused_before_the_build(model: onnx.ModelProto, tmp_path: Path):
    with pytest.raises(ExportError, match=r"quantize_input|the_operator"):
        lower(graph_of(model), tmp_path, LowerOptions())
    assert not list(tmp_path.iterdir())


@pytest.fixture
def unprepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs reach the parser as they are."""
    monkeypatch.setattr("deploykit.backends.tensorrt.lower.prepare", ir.to_proto)


@pytest.mark.usefixtures("unprepared")
def test_a_warning_about_a_changed_type_is_an_error(tmp_path: Path):
    with pytest.raises(ExportError, match=r"change a type.*Defaulting to INT8"):
        lower(graph_of(activation(np.uint8(0))), tmp_path, LowerOptions())
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unprepared")
def test_a_type_changed_without_a_warning_is_an_error(tmp_path: Path):
    with pytest.raises(ExportError, match=r"change a type.*'QuantizeLinear UINT8': 1.*'QuantizeLinear INT8': 1"):
        lower(graph_of(activation(None)), tmp_path, LowerOptions())
    assert not list(tmp_path.iterdir())


def test_the_phases_of_a_build_are_heard(tmp_path: Path):
    heard: list[tuple[str, int, int]] = []
    lower(tiny_graph(), tmp_path, LowerOptions(on_step=lambda *step: heard.append(step)))
    assert {phase for phase, _, _ in heard}
    assert all(0 <= step <= steps for _, step, steps in heard)


def test_what_the_parser_refuses_is_named(tmp_path: Path):
    model = tiny_graph().model.clone()
    model.graph[0].op_type = "Strange"
    model.graph[0].domain = "nobody.knows"
    model.graph[0].name = "strange_node"
    model.graph.opset_imports["nobody.knows"] = 1
    with pytest.raises(ExportError, match=r"(?s)build for sm86 failed.*strange_node"):
        lower(dataclasses.replace(tiny_graph(), model=model), tmp_path, LowerOptions())
    assert not list(tmp_path.iterdir())


def test_a_build_that_takes_too_long_is_stopped(tmp_path: Path):
    with pytest.raises(ExportError, match=r"more than 0\.05 s"):
        lower(tiny_graph(), tmp_path, LowerOptions(), time_limit=0.05)
    assert not list(tmp_path.iterdir())


def builder_that_runs(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    popen = subprocess.Popen

    def other(command: list[str], **options: object) -> object:
        return popen([command[0], "-c", code], **options)  # type: ignore[call-overload]

    monkeypatch.setattr("deploykit.backends.tensorrt.build.subprocess.Popen", other)


@pytest.mark.parametrize(
    ("sent", "message"),
    [(signal.SIGSEGV, r"(?s)crashed \(signal 11\).*last words"), (signal.SIGKILL, r"(?s)signal 9.*Out of memory")],
    ids=["crash", "kill"],
)
def test_a_crash_of_the_builder_is_an_error_with_its_log(
    sent: signal.Signals, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    builder_that_runs(f"import os; os.write(2, b'last words'); os.kill(os.getpid(), {int(sent)})", monkeypatch)
    with pytest.raises(ExportError, match=message):
        lower(tiny_graph(), tmp_path, LowerOptions())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import resource

    popen = subprocess.Popen

    def limited(command: list[str], **options: object) -> object:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # a file of the builder gets no further

        return popen(command, preexec_fn=limit, **options)  # type: ignore[call-overload]

    monkeypatch.setattr("deploykit.backends.tensorrt.build.subprocess.Popen", limited)
    with pytest.raises(ExportError, match=r"could not write its file: .*plan: File too large\. Free some space"):
        lower(tiny_graph(), tmp_path, LowerOptions())
    assert not list(tmp_path.iterdir())


def test_what_the_builder_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = tmp_path / "child"
    code = (
        "import subprocess, sys, time; "
        f"open({str(told)!r}, 'w').write(str(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
        "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)); time.sleep(60)"
    )
    builder_that_runs(code, monkeypatch)
    (tmp_path / "plan").mkdir()
    with pytest.raises(ExportError, match="was stopped"):
        lower(tiny_graph(), tmp_path / "plan", LowerOptions(), time_limit=2)
    assert ends(int(told.read_text()))
    assert not list((tmp_path / "plan").iterdir())


def test_an_unknown_target_lists_the_known(tmp_path: Path):
    with pytest.raises(ExportError, match="sm86"):
        lower(tiny_graph(), tmp_path, LowerOptions(target="sm87"))
    with pytest.raises(ExportError, match="Did you mean 'sm121'"):
        lower(tiny_graph(), tmp_path, LowerOptions(target="sm12"))


def test_a_device_is_a_target_by_name(tmp_path: Path):
    engine = lower(tiny_graph(), tmp_path, LowerOptions(target="rtx-4090"))
    assert engine.requires == {"compute_capability": "sm89", "flavour": "tensorrt_rtx", "tf32": "off"}


def test_one_plan_is_for_every_gpu_since_ampere_where_that_is_asked_for(tmp_path: Path):
    options = BuildOptions(hardware_compatibility="ampere_plus")
    engine = lower(tiny_graph(), tmp_path, LowerOptions(build=options))
    assert engine.requires == {"flavour": "tensorrt_rtx", "tf32": "off", "hardware_compatibility": "ampere_plus"}
    one = tmp_path / "one"
    one.mkdir()
    lower(tiny_graph(), one, LowerOptions(target="sm86"))
    header = [(folder / "model.plan").read_bytes()[:48] for folder in (tmp_path, one)]
    assert header[0] != header[1]


def test_an_unfit_timing_cache_or_version_is_refused_before_the_build(tmp_path: Path):
    for options in (BuildOptions(version_compatible=True), BuildOptions(timing_cache="t.cache")):
        with pytest.raises(SpecError, match="was given"):
            lower(tiny_graph(), tmp_path, LowerOptions(build=options))
    assert not list(tmp_path.iterdir())


def test_a_device_that_builds_for_itself_alone_is_told_so(tmp_path: Path):
    with pytest.raises(ExportError, match=r"'jetson-orin' is sm87.*--portable"):
        lower(tiny_graph(), tmp_path, LowerOptions(target="jetson-orin"))


def test_a_portable_engine_is_the_graph_with_its_settings(tmp_path: Path):
    engine = lower_portable(graph_of(activation(np.uint8(0))), tmp_path, LowerOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", SETTINGS_FILE]
    assert (engine.file, engine.runtime_version, engine.requires) == ("model.onnx", "any", {"tf32": "off"})
    settings = msgspec.json.decode((tmp_path / SETTINGS_FILE).read_bytes(), type=BuildSettings)
    assert settings.quantize_layers == {"QuantizeLinear INT8": 1, "DequantizeLinear INT8": 1}
    build_plan(
        tmp_path / engine.file, tmp_path / "model.plan", dataclasses.replace(settings, capability="sm89"), time_limit=60
    )
    assert (tmp_path / "model.plan").stat().st_size > 10_000


def test_full_tensorrt_without_a_gpu_says_what_builds_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deploykit.backends.tensorrt.cuda_driver.cuda_capabilities", lambda: ())
    monkeypatch.setattr("deploykit.backends.tensorrt.lower.api.default_flavour", lambda: "tensorrt")
    monkeypatch.setattr("deploykit.backends.tensorrt.lower.api.load_tensorrt", lambda flavour: None)
    with pytest.raises(ExportError, match=r"only on a machine with a GPU.*tensorrt_rtx.*--portable"):
        lower(tiny_graph(), tmp_path, LowerOptions())


# ---- through the whole of export

AMPERE_PLUS = BuildOptions(hardware_compatibility="ampere_plus")


@pytest.fixture(scope="module")
def portable_bundle(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("portable") / "bundle"
    export_backbone(
        "mobilenetv3_small_100",
        folder,
        runtime="tensorrt",
        precision=Int8(float_dtype="fp16"),
        calibration=photographs,
        image_size=64,
        num_classes=10,
        portable=True,
    )
    return folder


def test_a_portable_bundle_claims_no_more_than_was_seen(portable_bundle: Path):
    manifest = open_bundle(portable_bundle)
    assert (manifest.engine, manifest.runtime_version, manifest.target) == ("model.onnx", "any", None)
    assert SETTINGS_FILE in manifest.files
    assert "compute_capability" not in manifest.requires
    measured_on = {level.measured_on for level in ParityReport.load(portable_bundle / "parity.json").levels}
    if cuda_capabilities():
        assert manifest.status == "parity_checked"
        assert manifest.seen_on["gpu"]
        assert measured_on == {"probe", "engine"}
    else:
        assert manifest.status == "built"
        assert "device" not in manifest.seen_on
        assert measured_on == {PROXY}


@pytest.mark.skipif(bool(cuda_capabilities()), reason="there is a CUDA device")
def test_a_portable_bundle_does_not_open_without_a_gpu(portable_bundle: Path):
    with pytest.raises(DeviceUnavailable, match=r"the graph model\.onnx.*compute capability any"):
        load_bundle(portable_bundle)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "openvino", "portable": True}, "openvino has no portable form; tensorrt has one"),
        ({"runtime": "tensorrt", "portable": True, "target": "sm89"}, r"portable=True and target='sm89' were both"),
        ({"runtime": "onnxruntime", "precision": Int8(float_dtype="fp16")}, "no int8 with fp16 beside it; it has fp32"),
        ({"runtime": "tensorrt", "target": "rtx-4091"}, "Did you mean 'rtx-4090'"),
        ({"runtime": "openvino", "build_options": AMPERE_PLUS}, "builds for openvino take no such options"),
        ({"runtime": "tensorrt", "build_options": AMPERE_PLUS, "portable": True}, "portable=True and BuildOptions"),
        ({"runtime": "tensorrt", "build_options": AMPERE_PLUS, "target": "sm89"}, "'ampere_plus' and target='sm89'"),
        ({"runtime": "tensorrt", "build_options": BuildOptions(version_compatible=True)}, "no lean runtime"),
    ],
)
def test_what_a_runtime_lacks_is_refused_before_any_work(options: dict[str, object], message: str, tmp_path: Path):
    with pytest.raises(SpecError, match=message):
        export_backbone(SMALL, tmp_path / "bundle", image_size=64, **options)
    assert not list(tmp_path.iterdir())


def test_an_unknown_float_dtype_is_refused():
    with pytest.raises(SpecError, match="float_dtype is 'bf16'"):
        Int8(float_dtype="bf16")  # type: ignore[arg-type]
