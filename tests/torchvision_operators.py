"""timm imports torchvision, whose only wheels are CUDA builds: beside a CPU torch two operators are missing."""

import torch

_OPERATORS = ("nms", "qnms")


def declare_torchvision_operators() -> torch.library.Library | None:
    """Let torchvision be imported; hold what this returns as long as it is in use: the operators die with it."""
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "DEF")
    for operator in _OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
