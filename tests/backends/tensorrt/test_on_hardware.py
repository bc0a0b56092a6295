"""Other devices than the processor, through ONNX Runtime and OpenVINO: each skips by name where it is absent."""

from __future__ import annotations

import pytest

from deploykit.backends.table import load_backend
from deploykit.backends.tensorrt.cuda_driver import cuda_capabilities
from tests.conftest_graphs import engine_of, open_engine, photographs, reference, sqnr_db


def _skip_without(runtime: str, device: str) -> None:
    if device not in load_backend(runtime).load_devices()():
        pytest.skip(f"{runtime} has no device {device!r} here")


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_capabilities(), reason="no CUDA device")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "tensorrt", "tensorrt-rtx"])
def test_a_provider_of_onnxruntime_gives_torchs_numbers(device: str, dynamic: bool):
    _skip_without("onnxruntime", device.partition(":")[0])
    images = photographs(3 if dynamic else 1)
    with open_engine(*engine_of("onnxruntime", dynamic=dynamic), device) as model:
        assert model.device == device
        assert model.seen_on()["device"] == device
        for expected, actual in zip(reference(images), model(images).values(), strict=True):
            assert sqnr_db(expected, actual) >= 80


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu", "npu"])
def test_a_device_of_openvino_gives_torchs_numbers(device: str):
    _skip_without("openvino", device)
    images = photographs(1)
    with open_engine(*engine_of("openvino", dynamic=False), device) as model:
        assert model.device == device
        for expected, actual in zip(reference(images), model(images).values(), strict=True):
            assert sqnr_db(expected, actual) >= 40
