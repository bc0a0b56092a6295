from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import openvino
import pytest

from deploykit.backends.openvino import adapter
from deploykit.errors import BundleError, DeviceUnavailable
from tests.conftest_graphs import engine_of, open_engine, photographs, reference, sqnr_db

has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_inference_precision_is_pinned_to_float32_on_the_cpu(precision: str):
    manifest, folder = engine_of("openvino")
    settings = {"reduce_range": True} if precision == "int8" else {}  # nothing saturates, whichever processor this is
    other = dataclasses.replace(manifest, precision=precision, precision_settings=settings)
    with open_engine(other, folder) as model:
        assert model._compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32


@pytest.mark.skipif(not has_bf16, reason="this processor has no BF16")
def test_bf16_is_used_only_when_it_is_the_engines_precision():
    manifest, folder = engine_of("openvino")
    images = photographs(2)
    with open_engine(dataclasses.replace(manifest, precision="bf16"), folder) as model:
        assert model._compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.bf16
        assert 25 < sqnr_db(reference(images)[1], model(images)["stage1"]) < 70


def test_bf16_is_refused_where_the_device_does_not_list_it():
    class Core:
        def get_property(self, target: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    with pytest.raises(DeviceUnavailable, match="FP32, INT8 and not BF16"):
        adapter._pinned_precision(Core(), "CPU", "bf16")


def test_float16_engines_run_in_float16_off_the_cpu():
    assert adapter._pinned_precision(object(), "GPU", "fp16") == "f16"
    assert adapter._pinned_precision(object(), "GPU", "fp32") == "f32"


@pytest.mark.skipif("GPU" in openvino.Core().available_devices, reason="OpenVINO has a GPU here")
def test_a_gpu_that_is_not_here_is_refused():
    with pytest.raises(DeviceUnavailable, match=r"'gpu'.*cpu"):
        open_engine(*engine_of("openvino"), "gpu")


def test_a_model_on_another_device_than_the_one_asked_for_is_refused():
    class Compiled:
        def get_property(self, name: str) -> list[str]:
            return ["CPU"]

    with pytest.raises(DeviceUnavailable, match="asked for NPU and compiled the model for CPU"):
        adapter._check_device(Compiled(), "NPU")


@pytest.mark.skipif("NPU" in openvino.Core().available_devices, reason="OpenVINO has an NPU here")
def test_an_npu_that_is_not_here_is_refused():
    with pytest.raises(DeviceUnavailable, match=r"'npu'.*cpu"):
        open_engine(*engine_of("openvino"), "npu")


@pytest.mark.parametrize("content", [None, b"too short"], ids=["missing", "short"])
def test_weights_that_do_not_fit_the_ir_are_a_bundle_error(content: bytes | None, tmp_path: Path):
    manifest, folder = engine_of("openvino")
    shutil.copy(folder / "model.xml", tmp_path)
    if content is not None:
        (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.xml"):
        open_engine(manifest, tmp_path)


@pytest.mark.parametrize(
    ("before", "after"),
    [(b'type="Parameter"', b'type="Par\xebmeter"'), (b"<layers>", b"<l\xebyers>"), (b'names="', b'names="\xeb,')],
    ids=["operator", "element", "name"],
)
def test_bytes_that_are_no_text_are_a_bundle_error(before: bytes, after: bytes, tmp_path: Path):
    manifest, folder = engine_of("openvino")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    graph = (tmp_path / "model.xml").read_bytes()
    assert before in graph
    (tmp_path / "model.xml").write_bytes(graph.replace(before, after))
    with pytest.raises(BundleError, match=r"model\.xml"):
        open_engine(manifest, tmp_path)


def test_idle_requests_are_used_again():
    with open_engine(*engine_of("openvino")) as model:
        for seed in range(5):
            model(photographs(1, seed=seed))
        assert len(model._idle) == 1
