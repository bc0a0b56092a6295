"""softmax(s + b) with b_j <= max(b) - 87 -> softmax(s + b') with b'_j = -1000: what is masked becomes exactly zero.

exp(-100), which a mask of -100 leaves, is a subnormal number, with which processors multiply many times slower.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from deploykit.fusion.constants import ATTENTION, add_constant, argument, constant, tidy
from deploykit.fusion.shape_chains import sources

SUBNORMAL = -87.0
"""exp() of less is no normal float32."""
SILENT = -1000.0
"""exp() of it is zero, and so it is beside any scores that differ by less than 900; half precision holds it."""


def silence_masks(module: GraphModule) -> int:
    """Lower what a constant bias of attention as good as masks, until its probability is zero.

    The same to FP32's rounding where the scores of one query differ by less than 70. Left alone:
    biases that are computed from the images, boolean masks, entries that are at -1000 or below.

    Returns:
        How many attentions got another bias.
    """
    silenced = sum(_silence(module, attention) for attention in sources(module, ATTENTION))
    if silenced:
        tidy(module)
    return silenced


def _silence(module: GraphModule, attention: Node) -> bool:
    read = argument(attention, 3, "attn_mask", None)
    bias = constant(module, read)
    if bias is None or not bias.is_floating_point() or not bias.numel():
        return False
    faint = (bias <= bias.amax(-1, keepdim=True) + SUBNORMAL) & (bias > SILENT)
    if not faint.any():
        return False
    lowered = torch.where(faint, torch.full_like(bias, SILENT), bias)
    silent = add_constant(module, f"{read.target}_silent", lowered)
    attention.replace_input_with(read, silent)
    return True
