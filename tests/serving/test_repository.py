"""Bundles in the repositories of model servers: read by the servers' schemas, and by a server where there is one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import deploykit
from deploykit.bundle import open_bundle, read_manifest
from deploykit.errors import BundleError, SpecError, StorageError
from deploykit.loading import load_bundle
from deploykit.serving.repository import write_repository
from tests.accuracy.small_classifier import NAMES, export
from tests.backends.bundles import write_bundle
from tests.cli.conftest import call
from tests.conftest_graphs import engine_of, photographs
from tests.small_resnet import SMALL
from tests.test_bundle import leftovers

MLSERVER_PYTHON = "DEPLOYKIT_MLSERVER_PYTHON"
"""The interpreter of an environment with mlserver, whose requirements and this environment's exclude each other."""

PYTRITON_PYTHON = "DEPLOYKIT_PYTRITON_PYTHON"
"""The interpreter of an environment with nvidia-pytriton, which carries a Triton and requires numpy below 2."""


@pytest.fixture(scope="module")
def onnx(tmp_path_factory) -> Path:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    return write_bundle(tmp_path_factory.mktemp("served") / "bundle", "onnxruntime")


@pytest.fixture(scope="module")
def ir(tmp_path_factory) -> Path:
    pytest.importorskip("openvino", reason="openvino is not installed")
    return write_bundle(tmp_path_factory.mktemp("served") / "bundle", "openvino")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("served") / "classifier", labels=NAMES, embed_preprocessing=True)


def triton_schema():
    """The messages of Triton's configuration, from its client; read alone, because the client needs gRPC."""
    package = importlib.util.find_spec("tritonclient")
    if package is None:
        pytest.skip("tritonclient is not installed")
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("triton_model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    if (known := sys.modules.setdefault(spec.name, module)) is module:
        spec.loader.exec_module(module)
    return known


def triton_config(path: Path):
    from google.protobuf import text_format

    schema = triton_schema()
    return text_format.Parse(path.read_text(), schema.ModelConfig()), schema


def test_triton_reads_the_configuration_of_an_engine_for_any_batch(onnx, tmp_path):
    done = write_repository(onnx, tmp_path / "models", layout="triton", name="tiny")
    config, schema = triton_config(tmp_path / "models" / "tiny" / "config.pbtxt")
    spec, manifest = read_manifest(onnx).input, read_manifest(onnx)
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", spec.batch.max)
    [images] = config.input
    assert (images.name, images.data_type, list(images.dims)) == (spec.name, schema.TYPE_FP32, [*spec.shape[1:]])
    assert [(each.name, list(each.dims)) for each in config.output] == [
        (each.name, [*each.shape[1:]]) for each in manifest.outputs
    ]
    assert list(config.dynamic_batching.preferred_batch_size) == sorted({spec.batch.opt, spec.batch.max} - {1})
    assert [each.kind for each in config.instance_group] == [schema.ModelInstanceGroup.KIND_CPU]
    for warm in config.model_warmup:
        assert list(warm.inputs[spec.name].dims) == [*spec.shape[1:]]
        assert warm.inputs[spec.name].zero_data
    assert {each.batch_size for each in config.model_warmup} == {1, spec.batch.opt}
    assert done.files == ("1/manifest.json", "1/manifest.sha256", "1/model.onnx", "config.pbtxt")
    assert config.default_model_filename == "model.onnx"
    assert done.start == f"tritonserver --model-repository={tmp_path / 'models'}"


def test_triton_is_told_the_batch_of_an_engine_for_one(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from deploykit.bundle import write_manifest, writing

    manifest, source = engine_of("onnxruntime", dynamic=False)
    with writing(tmp_path / "bundle") as staging:
        shutil.copytree(source, staging, dirs_exist_ok=True)
        write_manifest(staging, manifest)
    write_repository(tmp_path / "bundle", tmp_path / "models", layout="triton", name="tiny")
    config, _ = triton_config(tmp_path / "models" / "tiny" / "config.pbtxt")
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [*manifest.input.shape]
    assert [list(each.dims) for each in config.output] == [[1, *each.shape[1:]] for each in manifest.outputs]
    assert list(config.model_warmup[0].inputs["images"].dims) == [*manifest.input.shape]


def test_pixels_and_class_names_are_said(classifier, tmp_path):
    write_repository(classifier, tmp_path / "models", layout="triton", name="animals")
    config, schema = triton_config(tmp_path / "models" / "animals" / "config.pbtxt")
    assert (config.input[0].data_type, list(config.input[0].dims)) == (schema.TYPE_UINT8, [32, 32, 3])
    assert config.output[0].label_filename == "labels.txt"
    assert (tmp_path / "models" / "animals" / "labels.txt").read_text().split() == NAMES


@pytest.mark.parametrize("layout", ["triton", "ovms"])
def test_the_engine_in_the_repository_gives_the_same_features(ir, tmp_path, layout):
    import openvino

    write_repository(ir, tmp_path / "models", layout=layout, name="tiny", version=3)
    folder = tmp_path / "models" / "tiny" / "3"
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    if layout == "ovms":
        [entry] = json.loads((tmp_path / "models" / "config.json").read_text())["model_config_list"]
        assert (entry["config"]["name"], entry["config"]["base_path"]) == ("tiny", "tiny")
        settings = entry["config"]["plugin_config"]
        assert {path.name for path in folder.iterdir()} == {"model.xml", "model.bin"}
    compiled = openvino.Core().compile_model(str(folder / "model.xml"), "CPU", settings)
    images = photographs(2)
    results = compiled([images])
    with load_bundle(ir) as model:
        for name, level in model(images).items():
            np.testing.assert_allclose(results[name], level, rtol=1e-5, atol=1e-5)


def test_models_and_versions_are_added_beside_the_others(onnx, ir, tmp_path):
    root = tmp_path / "models"
    for name, version in (("tiny", 1), ("tiny", 2), ("other", 1)):
        write_repository(ir, root, layout="ovms", name=name, version=version)
    entries = json.loads((root / "config.json").read_text())["model_config_list"]
    assert [each["config"]["name"] for each in entries] == ["tiny", "other"] or len(entries) == 2
    assert sorted(path.name for path in (root / "tiny").iterdir()) == ["1", "2"]
    with pytest.raises(SpecError, match=r"2 is there already"):
        write_repository(ir, root, layout="ovms", name="tiny", version=2)
    with pytest.raises(SpecError, match="no version of that model"):
        write_repository(onnx, root, layout="triton", name="tiny", version=3)
    assert sorted(path.name for path in (root / "tiny").iterdir()) == ["1", "2"]
    write_repository(onnx, tmp_path / "triton", layout="triton", name="tiny", version=1)
    write_repository(onnx, tmp_path / "triton", layout="triton", name="tiny", version=2)
    assert sorted(path.name for path in (tmp_path / "triton/tiny").iterdir()) == ["1", "2", "config.pbtxt"]


def test_a_bundle_for_mlserver_is_the_bundle(onnx, tmp_path):
    write_repository(onnx, tmp_path / "models", layout="kserve", name="tiny")
    folder = tmp_path / "models" / "tiny" / "v1"
    assert open_bundle(folder / "bundle") == open_bundle(onnx)
    settings = json.loads((folder / "model-settings.json").read_text())
    assert settings["implementation"] == "deploykit.serving.mlserver_model.BundleModel"
    assert settings["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 32, 32]}]
    assert settings["max_batch_size"] == read_manifest(onnx).input.batch.max


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layout": "trition"}, "Did you mean 'triton'"),
        ({"layout": "ovms"}, "opens no onnxruntime engines"),
        ({"layout": "triton", "name": "../up"}, "the name of the model"),
        ({"layout": "triton", "name": ""}, "the name of the model"),
        ({"layout": "triton", "version": 0}, "version is 0"),
        ({"layout": 3}, "layout"),
    ],
)
def test_what_cannot_be_served_is_refused(onnx, tmp_path, options, said):
    with pytest.raises(SpecError, match=said):
        write_repository(onnx, tmp_path / "models", **options)
    assert not (tmp_path / "models" / "tiny").exists()


def test_nothing_half_written_stays(onnx, ir, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(StorageError, match="disk is full"):
            write_repository(onnx, tmp_path / "models", layout="triton", name="tiny")
    assert not (tmp_path / "models" / "tiny").exists()
    assert leftovers(tmp_path) == []
    damaged = shutil.copytree(onnx, tmp_path / "damaged")
    (damaged / "model.onnx").write_bytes(b"damage")
    with pytest.raises(BundleError):
        write_repository(damaged, tmp_path / "models", layout="triton", name="tiny")
    (tmp_path / "models" / "config.json").write_text("[]")
    with pytest.raises(SpecError, match="not the configuration"):
        write_repository(ir, tmp_path / "models", layout="ovms", name="tiny")
    (tmp_path / "file").write_text("mine")
    with pytest.raises((SpecError, StorageError)):
        write_repository(onnx, tmp_path / "file", layout="triton", name="tiny")
    assert not (tmp_path / "models" / "tiny").exists()


EXPORT = ("export", SMALL, "--runtime", "onnxruntime", "--image-size", "32")


@pytest.mark.slow
def test_an_export_adds_its_bundle(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    monkeypatch.chdir(tmp_path)
    done = call(*EXPORT, "--layout", "triton", "-o", "bundle", "--json")
    assert done.code == 0, done.err
    assert done.json()["served"]["name"] == SMALL
    config, _ = triton_config(tmp_path / "models" / SMALL / "config.pbtxt")
    assert list(config.input[0].dims) == [1, 3, 32, 32]


def test_an_export_refuses_a_layout_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = call(*EXPORT, "--layout", "ovms")
    assert (refused.code, list(tmp_path.iterdir())) == (2, [])
    assert "opens no onnxruntime engines" in refused.err
    alone = call(*EXPORT, "--repository", "served")
    assert (alone.code, list(tmp_path.iterdir())) == (2, [])
    assert "no layout was given" in alone.err
    several = call("export", SMALL, "--target", "raspberry-pi-5", "--target", "raspberry-pi-4", "--layout", "triton")
    assert (several.code, list(tmp_path.iterdir())) == (2, [])
    assert "for one target" in several.err
    (tmp_path / "served" / SMALL / "1").mkdir(parents=True)
    taken = call(*EXPORT, "--layout", "triton", "--repository", "served")
    assert (taken.code, [path.name for path in tmp_path.iterdir()]) == (2, ["served"])
    assert f"{SMALL}/1 is there already. Give another --repository" in taken.err


def test_deploykit_in_triton_serves_any_runtime(onnx, tmp_path):
    done = write_repository(onnx, tmp_path / "models", layout="triton-python", name="tiny", version=2)
    config, _ = triton_config(tmp_path / "models" / "tiny" / "config.pbtxt")
    assert (config.backend, config.default_model_filename) == ("python", "model.py")
    assert open_bundle(tmp_path / "models" / "tiny" / "2" / "bundle") == open_bundle(onnx)
    assert "TritonPythonModel" in (tmp_path / "models" / "tiny" / "2" / "model.py").read_text()
    assert done.notes == ()


def test_the_command_says_what_was_written(ir, tmp_path):
    done = call("repository", ir, "--layout", "triton", "-o", tmp_path / "models", "--name", "tiny")
    assert done.code == 0, done.err
    assert "1/model.xml" in done.out
    assert "Note: " in done.out
    assert f"Next: tritonserver --model-repository={tmp_path / 'models'}" in done.out
    again = call("repository", ir, "--layout", "triton", "-o", tmp_path / "models", "--name", "tiny", "--json")
    assert (again.code, again.json()["error"]) == (2, "SpecError")
    assert deploykit.write_repository is write_repository


# ---- a real server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def asked(url: str, body: object = None) -> tuple[int, dict]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return answer.status, json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def wait_until_ready(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError):
            if asked(f"{address}/v2/health/ready")[0] == 200:
                return
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)


def check_answers(address: str, images: np.ndarray, expected: dict[str, np.ndarray]) -> None:
    """Ask a server by the Open Inference Protocol: the same features, and an error for another size of images."""
    _, metadata = asked(f"{address}/v2/models/tiny")
    assert metadata["inputs"][0]["name"] == "images"
    tensor = {"name": "images", "datatype": "FP32", "shape": [*images.shape], "data": images.ravel().tolist()}
    status, answer = asked(f"{address}/v2/models/tiny/infer", {"inputs": [tensor]})
    assert status == 200, answer
    outputs = {each["name"]: np.array(each["data"], np.float32).reshape(each["shape"]) for each in answer["outputs"]}
    assert outputs.keys() == expected.keys()
    for name, level in expected.items():
        np.testing.assert_allclose(outputs[name], level, rtol=1e-5, atol=1e-6)
    status, answer = asked(f"{address}/v2/models/tiny/infer", {"inputs": [tensor | {"shape": [2, 3, 16, 64]}]})
    assert status == 400
    assert "expected" in json.dumps(answer)


@contextlib.contextmanager
def mlserver(folder: Path, python: str):
    """MLServer with the models of a folder; gives its address."""
    ports = {name: str(free_port()) for name in ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT")}
    settings = {f"MLSERVER_{name}": port for name, port in ports.items()}
    environment = {
        **os.environ,
        **settings,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MLSERVER_PARALLEL_WORKERS": "0",
    }
    command = [str(Path(python).with_name("mlserver")), "start", str(folder)]
    address, log = f"http://127.0.0.1:{ports['HTTP_PORT']}", folder.parent / "log.txt"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until_ready(address, server, log)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=60)


@contextlib.contextmanager
def tritonserver(folder: Path, python: str):
    """Triton of nvidia-pytriton's wheel, which has the Python backend alone; gives its address."""
    asked_for = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'), sysconfig.get_python_version())"]
    packages, version = subprocess.run(asked_for, capture_output=True, text=True, check=True).stdout.split()
    home = Path(packages)
    backends, port = folder.parent / "backends", free_port()
    shutil.copytree(home / "pytriton/tritonserver/backends", backends)
    stub = home / f"pytriton/tritonserver/python_backend_stubs/{version}/triton_python_backend_stub"
    Path(shutil.copy(stub, backends / "python")).chmod(0o755)
    # Its Python reads no PYTHONPATH: these paths stand for a deploykit that is installed there.
    paths = [str(Path(__file__).parents[2]), packages]
    for model in folder.rglob("model.py"):
        model.write_text(f"import sys\n\nsys.path[:0] = {paths!r}\n{model.read_text()}")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(home / "nvidia_pytriton.libs")}
    program = home / "pytriton/tritonserver/bin/tritonserver"
    command = [str(program), f"--model-repository={folder}", f"--backend-directory={backends}", "--allow-metrics=false"]
    command += ["--allow-grpc=false", f"--http-port={port}"]
    log = folder.parent / "log.txt"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.mark.slow
def test_triton_answers_with_the_same_features(onnx, tmp_path):
    python = os.environ.get(PYTRITON_PYTHON)
    if python is None:
        pytest.skip(f"${PYTRITON_PYTHON} names no environment with nvidia-pytriton, which is not installed here")
    write_repository(onnx, tmp_path / "models", layout="triton-python", name="tiny")
    images = photographs(2)
    with tritonserver(tmp_path / "models", python) as address, load_bundle(onnx) as model:
        check_answers(address, images, model(images))


@pytest.mark.slow
def test_mlserver_answers_with_the_same_features(onnx, tmp_path):
    python = os.environ.get(MLSERVER_PYTHON)
    if python is None:
        if importlib.util.find_spec("mlserver") is None:
            pytest.skip(
                f"mlserver is not installed; ${MLSERVER_PYTHON} names the interpreter of an environment with it"
            )
        python = sys.executable
    write_repository(onnx, tmp_path / "models", layout="kserve", name="tiny")
    images = photographs(2)
    with mlserver(tmp_path / "models", python) as address, load_bundle(onnx) as model:
        check_answers(address, images, model(images))
