"""The count of multiply-accumulates, against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.registry import FAMILIES, backbone_class, backbone_names
from deploykit.cli.export_check import shape_of
from deploykit.cli.macs import count_macs

FIRST = {
    family: next(name for name in backbone_names() if backbone_class(name).family == family) for family in FAMILIES
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_is_that_of_torch(family):
    backbone = shape_of(FIRST[family], BackboneOptions())
    shape = (1, 3, *backbone.spec.image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as reference:
        backbone.forward(torch.empty(shape, device="meta"))
    assert count_macs(backbone, shape) == reference.get_total_flops() // 2 > 0


def test_a_convolution_is_counted_by_hand():
    layer = torch.nn.Conv2d(3, 8, 5, stride=2, padding=2, device="meta")
    assert count_macs(layer, (2, 3, 16, 16)) == 2 * 8 * 8 * 8 * 3 * 5 * 5
