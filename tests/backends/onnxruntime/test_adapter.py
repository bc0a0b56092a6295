from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest

from deploykit.backends.onnxruntime import adapter
from deploykit.backends.onnxruntime.adapter import OnnxRuntime
from deploykit.errors import DeviceUnavailable, IncompatibleEngine
from tests.conftest_graphs import engine_of, open_engine

no_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA"
)


@no_cuda
def test_cuda_is_refused_where_the_provider_is_absent():
    with pytest.raises(DeviceUnavailable, match=r"'cuda'.*CPUExecutionProvider.*onnxruntime-gpu"):
        open_engine(*engine_of("onnxruntime"), "cuda")


@no_cuda
@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider':UserWarning")
def test_a_session_that_fell_back_to_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    # A provider that is built in and cannot start: onnxruntime then gives a CPU session and no error.
    monkeypatch.setattr(OnnxRuntime, "devices", classmethod(lambda cls: ("cpu", "cuda")))
    with pytest.raises(DeviceUnavailable, match="made a session on CPUExecutionProvider"):
        open_engine(*engine_of("onnxruntime"), "cuda")


@pytest.mark.parametrize("device", ["tensorrt", "tensorrt-rtx", "cuda:1", "cpu:1", "cuda:first"])
@no_cuda
def test_a_provider_that_is_absent_is_refused_with_those_that_are_here(device: str):
    with pytest.raises(DeviceUnavailable, match=rf"no device '{device}' here; it has cpu.*CPUExecutionProvider"):
        open_engine(*engine_of("onnxruntime"), device)


@pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers(), reason="needs a provider without kernels"
)
def test_nodes_that_fell_back_to_the_cpu_are_refused(monkeypatch: pytest.MonkeyPatch):
    # This provider is made and leads the session's list, and has a kernel for no node of the graph.
    monkeypatch.setitem(adapter.PROVIDERS, "azure", "AzureExecutionProvider")
    with pytest.raises(DeviceUnavailable, match=r"AzureExecutionProvider and made a session on CPU.*or for some"):
        open_engine(*engine_of("onnxruntime"), "azure")


def test_an_operator_that_the_runtime_lacks_is_incompatible(tmp_path: Path):
    manifest, folder = engine_of("onnxruntime")
    model = onnx.load(folder / manifest.engine)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / manifest.engine)
    with pytest.raises(IncompatibleEngine, match="NoSuchOperator"):
        open_engine(manifest, tmp_path)
