"""What a runtime opens is what was verified, whatever happens to the bundle meanwhile."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

import deploykit
from deploykit.backends.engine_file import EngineFile, read_verified
from deploykit.backends.table import load_backend
from deploykit.bundle import open_bundle, read_manifest, write_manifest, writing
from deploykit.errors import BundleError, EngineMismatch
from deploykit.verification import Verification
from tests.backends.bundles import SCALE, write_bundle
from tests.conftest_graphs import RAN_HERE, photographs

every_runtime = pytest.mark.parametrize("runtime", RAN_HERE)
IN_MEMORY = ("onnxruntime", "openvino")


@pytest.fixture
def bundle(runtime: str, tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", runtime)


def spoil(folder: Path) -> None:
    """Overwrite every file in place, as a copy onto a bundle in use does."""
    for file in folder.iterdir():
        file.write_bytes(bytes(reversed(file.read_bytes())))


@every_runtime
def test_files_overwritten_once_the_engine_is_read_change_nothing(bundle, monkeypatch):
    images = photographs(1)
    with deploykit.load_bundle(bundle) as model:
        expected = model(images)["stage1"]
    read = EngineFile.__init__

    def read_then_spoil(self, manifest, folder):
        read(self, manifest, folder)
        spoil(folder)

    monkeypatch.setattr(EngineFile, "__init__", read_then_spoil)
    with deploykit.load_bundle(bundle) as model:
        np.testing.assert_array_equal(model(images)["stage1"], expected)


@every_runtime
def test_files_overwritten_or_cut_short_under_an_open_engine_change_nothing(bundle):
    images = photographs(1)
    with deploykit.load_bundle(bundle) as model:
        expected = model(images)["stage1"]
        spoil(bundle)
        np.testing.assert_array_equal(model(images)["stage1"], expected)
        for file in bundle.iterdir():
            os.truncate(file, 0)
        np.testing.assert_array_equal(model(photographs(1))["stage1"], expected)


@every_runtime
def test_an_engine_replaced_after_the_bundle_was_looked_at_is_refused(bundle, runtime, monkeypatch):
    engine = bundle / read_manifest(bundle).engine
    opened = deploykit.loading.open_bundle

    def open_then_replace(path, **options):
        manifest = opened(path, **options)
        content = bytearray(engine.read_bytes())
        content[-20] ^= 1
        engine.write_bytes(content)
        return manifest

    monkeypatch.setattr(deploykit.loading, "open_bundle", open_then_replace)
    with pytest.raises(BundleError, match=r"model\.\w+"):
        deploykit.load_bundle(bundle)


@pytest.mark.parametrize("runtime", IN_MEMORY)
def test_a_bundle_replaced_again_and_again_gives_one_or_the_other_or_an_error(runtime, tmp_path):
    images = photographs(1)
    one, other = write_bundle(tmp_path / "one", runtime), write_bundle(tmp_path / "other", runtime, scaled=True)
    right = [deploykit.load_bundle(folder)(images)["stem"] for folder in (one, other)]
    np.testing.assert_allclose(right[1], SCALE * right[0], rtol=1e-4, atol=1e-6)
    place = tmp_path / "place"
    shutil.copytree(one, place)
    stop = threading.Event()

    def replace() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            source = (one, other)[turn % 2]
            for file in sorted(source.iterdir(), reverse=bool(turn % 3)):  # file by file, as rsync does
                shutil.copyfile(file, place / file.name)

    writer = threading.Thread(target=replace)
    writer.start()
    seen = set()
    try:
        for _ in range(60):
            try:
                with deploykit.load_bundle(place) as model:
                    stem = model(images)["stem"]
            except BundleError:
                seen.add("refused")
                continue
            matches = [index for index, expected in enumerate(right) if np.array_equal(stem, expected)]
            assert matches, "a mixture of two bundles was opened"
            seen.add(matches[0])
    finally:
        stop.set()
        writer.join()
    assert "refused" in seen


@every_runtime
def test_the_bundle_is_read_once(bundle, monkeypatch):
    opened: list[str] = []
    real = os.open

    def count(path, *arguments, **options):
        opened.append(os.fspath(path) if not isinstance(path, int) else "")
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", count)
    deploykit.load_bundle(bundle).close()
    engine = str(bundle / read_manifest(bundle).engine)
    assert opened.count(engine) == 1


@pytest.mark.parametrize("runtime", ["onnxruntime"])
def test_a_private_copy_is_this_users_alone_and_goes_with_the_engine(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = EngineFile(open_bundle(bundle), bundle)
    path = Path(str(engine))
    assert path.read_bytes() == (bundle / "model.onnx").read_bytes()
    assert path != bundle / "model.onnx"
    assert os.fspath(engine) == str(path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    engine.close()
    assert not path.parent.exists()


@pytest.mark.parametrize("runtime", ["onnxruntime"])
def test_a_forked_child_leaves_its_parents_private_copy(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = EngineFile(open_bundle(bundle), bundle)
    path = Path(str(engine))
    for close in (True, False):
        child = os.fork()
        if child == 0:
            if close:
                engine.close()
            del engine
            gc.collect()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert path.exists()
    engine.close()
    assert not path.exists()


@pytest.mark.parametrize("runtime", ["onnxruntime"])
def test_files_that_the_manifest_does_not_name_are_not_read(bundle):
    (bundle / "notes.txt").write_text("beside")
    with pytest.raises(BundleError, match=r"notes\.txt is not recorded"):
        read_verified(read_manifest(bundle), bundle, "notes.txt")


@pytest.mark.parametrize("runtime", ["onnxruntime"])
def test_verify_compares_with_the_reference_of_the_engine_that_ran(bundle, tmp_path, monkeypatch):
    """A reference that is replaced while the engine is opened is not taken."""
    other = write_bundle(tmp_path / "other", "onnxruntime", scaled=True)
    read = EngineFile.__init__

    def read_then_replace(self, manifest, folder):
        read(self, manifest, folder)
        data = bytearray((other / "reference.npz").read_bytes())
        data[-1] ^= 1
        (bundle / "reference.npz").write_bytes(data)

    monkeypatch.setattr(EngineFile, "__init__", read_then_replace)
    with pytest.raises(EngineMismatch, match=r"reference\.npz is not the file that the manifest describes"):
        deploykit.verify_bundle(bundle)


@pytest.mark.parametrize("runtime", ["onnxruntime"])
def test_only_the_engine_that_ran_is_recorded(bundle, tmp_path, monkeypatch):
    other = write_bundle(tmp_path / "other", "onnxruntime", scaled=True)
    compare = Verification.report

    def compare_then_replace(*arguments, **options):
        report = compare(*arguments, **options)
        shutil.rmtree(bundle)
        shutil.copytree(other, bundle)
        return report

    monkeypatch.setattr(Verification, "report", compare_then_replace)
    with pytest.raises(BundleError, match="was replaced while its engine ran, so nothing is recorded"):
        deploykit.verify_bundle(bundle, record=True)
    assert read_manifest(bundle).status == "built"


@pytest.mark.parametrize("runtime", ["onnxruntime"])
def test_what_ran_is_recorded(bundle):
    assert deploykit.verify_bundle(bundle, record=True).passed
    manifest = open_bundle(bundle)
    assert manifest.status == "parity_checked"
    assert manifest.seen_on["device"] == "cpu"


LOAD = """
import resource, sys
import numpy as np
how, path, limit = sys.argv[1:4]
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
if how == "onnxruntime":
    import os; os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime
    before = peak()
    kept = onnxruntime.InferenceSession(path + "/model.onnx", providers=["CPUExecutionProvider"])
elif how == "openvino":
    sys.modules["openvino_telemetry"] = None
    import openvino
    core = openvino.Core(); core.available_devices
    before = peak()
    kept = core.compile_model(core.read_model(path + "/model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
else:
    import deploykit, deploykit.loading
    deploykit.load_bundle(limit).close()
    before = peak()
    kept = deploykit.load_bundle(path)
print(peak() - before)
"""


def wide_bundle(folder: Path, runtime: str, width: int) -> Path:
    """A bundle with one matrix product of ``width * width`` weights."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from deploykit.backends.backend import LowerOptions
    from deploykit.graph import OnnxGraph
    from deploykit.spec import InputSpec, TensorSpec
    from tests.conftest_graphs import ir, lower, manifest_of, tiny_graph

    weights = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32)
    side = int(width**0.5)
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["images", "shape"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ],
        "wide",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 1, side, side])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, width])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.array([1, width]), "shape")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    spec = InputSpec(batch=1, channels=1, height=side, width=side)
    outputs = (TensorSpec(name="logits", shape=(1, width)),)
    wide = OnnxGraph(input=spec, outputs=outputs, model=ir.from_proto(model))
    assert LowerOptions is not None
    with writing(folder) as staging:
        engine = lower(runtime, wide, staging)
        manifest = manifest_of(runtime, tiny_graph(features_only=False), engine)
        write_manifest(staging, dataclasses.replace(manifest, input=spec, outputs=outputs))
    return folder


@pytest.mark.parametrize("runtime", IN_MEMORY)
def test_opening_takes_at_most_one_engine_more_memory_than_the_runtime_itself(runtime, tmp_path):
    bundle, small = wide_bundle(tmp_path / "wide", runtime, 4096), wide_bundle(tmp_path / "small", runtime, 64)
    size = sum(file.stat().st_size for file in bundle.iterdir())
    assert size > 64e6

    def peak(how: str) -> int:
        command = [sys.executable, "-c", LOAD, how, str(bundle), str(small)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert peak("deploykit") < peak(runtime) + 1.1 * size


def test_class_names_are_those_of_the_manifest(tmp_path):
    """Names that were replaced since the bundle was written are refused."""
    bundle = wide_bundle(tmp_path / "bundle", "onnxruntime", 64)
    manifest = read_manifest(bundle)
    names = [f"class {index}" for index in range(manifest.backbone.num_classes)]
    (bundle / "labels.txt").write_text("\n".join(names) + "\n")
    manifest = write_manifest(bundle, dataclasses.replace(manifest, files={}))
    with deploykit.load_bundle(bundle) as model:
        assert list(model.labels) == names
    (bundle / "labels.txt").write_text("\n".join(reversed(names)) + "\n")
    adapter = load_backend(manifest.runtime).load_adapter()
    with pytest.raises(EngineMismatch, match=r"labels\.txt is not the file that the manifest describes"):
        adapter(manifest, bundle)
