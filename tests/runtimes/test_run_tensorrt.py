from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys

import pytest

from deploykit.errors import DeviceUnavailable, IncompatibleEngine, MissingDependency
from deploykit.runtimes import run_tensorrt
from deploykit.runtimes.run_tensorrt import TensorRTRuntime, cuda_capabilities
from tests.conftest_graphs import engine_of, open_engine, photographs, reference, sqnr_db

no_gpu = pytest.mark.skipif(bool(cuda_capabilities()), reason="there is a CUDA device")


@no_gpu
@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_a_plan_does_not_open_without_a_gpu_and_the_message_says_where_it_does(device: str):
    with pytest.raises(DeviceUnavailable, match=r"NVIDIA GPU of compute capability sm86.*no CUDA device.*Copy"):
        open_engine(*engine_of("tensorrt"), device)
    assert TensorRTRuntime.devices() == ()


@no_gpu
def test_no_tensorrt_runtime_is_made_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    import tensorrt_rtx

    def forbidden(*_: object) -> None:
        raise AssertionError("TensorRT's runtime can end the process here")

    monkeypatch.setattr(tensorrt_rtx, "Runtime", forbidden)
    with pytest.raises(DeviceUnavailable):
        open_engine(*engine_of("tensorrt"))


def test_a_plan_for_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_tensorrt, "cuda_capabilities", lambda: ("sm120",))
    with pytest.raises(IncompatibleEngine, match=r"sm86.*sm120.*target='sm120'"):
        open_engine(*engine_of("tensorrt"))


@no_gpu
def test_a_gpu_without_a_torch_that_can_use_it_is_a_missing_dependency(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_tensorrt, "cuda_capabilities", lambda: ("sm86",))
    with pytest.raises(MissingDependency, match="cuda-python"):
        open_engine(*engine_of("tensorrt"))


def test_another_version_is_refused_before_the_device_is_looked_for():
    manifest, folder = engine_of("tensorrt")
    with pytest.raises(IncompatibleEngine, match=r"exactly 1\.0\.0"):
        open_engine(dataclasses.replace(manifest, runtime_version="1.0.0"), folder)


def test_a_missing_driver_means_no_device(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert cuda_capabilities() == ()


@pytest.mark.parametrize(("status", "expected"), [(100, ()), (0, ("sm89", "sm89"))], ids=["no device", "two"])
def test_the_driver_is_asked_for_every_device(status: int, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    class Driver:
        """libcuda's four calls, with two GPUs of compute capability 8.9."""

        def cuInit(self, flags: int) -> int:  # noqa: N802
            return status

        def cuDeviceGetCount(self, count: object) -> int:  # noqa: N802
            count._obj.value = 2  # type: ignore[attr-defined]
            return 0

        def cuDeviceGet(self, device: object, ordinal: int) -> int:  # noqa: N802
            return 0

        def cuDeviceGetAttribute(self, value: object, attribute: int, device: object) -> int:  # noqa: N802
            value._obj.value = {75: 8, 76: 9}[attribute]  # type: ignore[attr-defined]
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert cuda_capabilities() == expected


def test_importing_the_adapters_imports_no_runtime_and_no_torch():
    code = (
        "import sys; from deploykit.runtimes.base import RUNTIMES, load_runtime; [load_runtime(n) for n in RUNTIMES];"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'openvino', 'tensorrt_rtx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_capabilities(), reason="no CUDA device")
def test_a_plan_gives_torchs_numbers_on_its_gpu():
    images = photographs(3)
    with open_engine(*engine_of("tensorrt")) as model:
        for expected, actual in zip(reference(images), model(images).values(), strict=True):
            assert sqnr_db(expected, actual) >= 100
