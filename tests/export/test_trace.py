from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from deploykit import create_backbone
from deploykit.backbones.user_module import wrap_module
from deploykit.errors import ExportError
from deploykit.export.trace import output_names, trace
from deploykit.spec import BatchRange, InputSpec
from tests.small_resnet import SMALL

SPEC = InputSpec(height=64, width=64)


def backbone_of(**options):
    return create_backbone(SMALL, image_size=64, **options)


def test_the_outputs_are_the_levels_and_then_the_head():
    assert output_names(backbone_of(output_indices=(3, 1))) == ("stage1", "stage3", "logits")
    assert output_names(backbone_of(num_classes=0, output_indices=(4,))) == ("stage4", "embedding")
    assert output_names(backbone_of(features_only=True, output_indices=(2,))) == ("stage2",)


def test_a_program_gives_what_the_backbone_gives_in_eval_mode():
    backbone = backbone_of(num_classes=7).train()
    program = trace(backbone, InputSpec(batch=BatchRange(), height=64, width=64))
    assert backbone.training
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    images = torch.randn(3, 3, 64, 64)
    found = program.module()(images)
    with torch.no_grad():
        expected = backbone.eval().forward_everything(images)
    assert len(found) == len(output_names(backbone)) == len(expected)
    for one, other in zip(found, expected.values(), strict=True):
        np.testing.assert_array_equal(one.detach().numpy(), other.numpy())


def test_what_cannot_be_traced_is_an_export_error():
    backbone = backbone_of()
    backbone.forward_head = lambda trunk: trunk.sum().item() and trunk
    with pytest.raises(ExportError, match=r"cannot trace the backbone at \(1, 3, 64, 64\)"):
        trace(backbone, SPEC)


@pytest.mark.parametrize(
    ("forward", "held"),
    [
        (lambda images: torch.cat([image * 2 for image in images.split(1)]), "specialized it to be a constant"),
        (lambda images: images + torch.zeros(4, 1, 1, 1)[: images.shape[0]], "<= 4"),
    ],
    ids=["loop", "slice"],
)
def test_a_forward_that_fixes_the_batch_says_so(forward, held):
    class Net(nn.Conv2d):
        def forward(self, images):
            return forward(super().forward(images))

    spec = InputSpec(height=8, width=8, batch=BatchRange())
    with pytest.raises(ExportError, match=rf"some sizes of batch alone \(.*{held}.*ask for one batch_size"):
        trace(wrap_module(Net(3, 4, 1), 8), spec)
