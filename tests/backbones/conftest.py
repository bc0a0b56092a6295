"""timm beside a CPU torch: the reference that every family is held against."""

import warnings

import pytest
import torch

# torchvision's only wheels are CUDA builds: beside a CPU torch its import fails on these two operators.
_TORCHVISION_OPERATORS = ("nms", "qnms")


@pytest.fixture(scope="session")
def timm():
    """The module timm; skips by name where it is absent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = _declare_torchvision_operators()
        module = pytest.importorskip("timm", reason="timm is not installed")
    yield module
    del library


def _declare_torchvision_operators():
    """Hold the returned library as long as torchvision is in use: its operators die with it."""
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "DEF")
    for operator in _TORCHVISION_OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
