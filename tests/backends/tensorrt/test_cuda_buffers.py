from __future__ import annotations

import numpy as np
import pytest

from deploykit.backends.tensorrt import cuda_buffers
from deploykit.backends.tensorrt.cuda_driver import cuda_capabilities
from deploykit.errors import DeployKitError, MissingDependency


def test_without_torch_and_cuda_python_the_lighter_one_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_buffers, "torch_has_cuda", lambda: False)
    monkeypatch.setattr(cuda_buffers, "_has_cuda_python", lambda: False)
    with pytest.raises(MissingDependency, match=r"cuda-python.*pip install cuda-python"):
        cuda_buffers.buffers_for(0)


def test_torch_comes_first_and_cuda_python_second(monkeypatch: pytest.MonkeyPatch):
    made: list[str] = []
    monkeypatch.setattr(cuda_buffers, "TorchBuffers", lambda ordinal: made.append("torch"))
    monkeypatch.setattr(cuda_buffers, "CudaPythonBuffers", lambda ordinal: made.append("cuda-python"))
    monkeypatch.setattr(cuda_buffers, "_has_cuda_python", lambda: True)
    for here in (True, False):
        monkeypatch.setattr(cuda_buffers, "torch_has_cuda", lambda here=here: here)
        cuda_buffers.buffers_for(0)
    assert made == ["torch", "cuda-python"]


@pytest.mark.skipif(bool(cuda_capabilities()), reason="there is a CUDA device")
def test_a_failed_call_of_cuda_is_an_error_with_its_name():
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    with pytest.raises(DeployKitError, match=r"cudaSetDevice failed with cudaError"):
        cuda_buffers.CudaPythonBuffers(0)


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_capabilities(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["TorchBuffers", "CudaPythonBuffers"])
def test_what_is_uploaded_comes_back(kind: str):
    if kind == "CudaPythonBuffers":
        pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    buffers = getattr(cuda_buffers, kind)(0)
    for shape in ((4, 4), (8, 8), (2, 2)):
        sent = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        back = np.empty_like(sent)
        buffers.upload("images", sent)
        buffers.download("images", back)
        buffers.synchronize()
        assert np.array_equal(sent, back)
    buffers.close()
