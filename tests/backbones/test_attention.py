"""The ONNX forms of operators that deploykit writes itself."""

import warnings

import pytest
import torch
from torch import nn

from deploykit.backbones.attention import onnx_translations
from deploykit.optional import require
from tests.backbones.against_timm import sqnr_db


class Normed(nn.Module):
    """A GroupNorm whose weight and bias are each there or not."""

    def __init__(self, groups, *, weight, bias):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.randn(8)) if weight else None
        self.bias = nn.Parameter(torch.randn(8)) if bias else None

    def forward(self, features):
        return nn.functional.group_norm(features, self.groups, self.weight, self.bias, eps=1e-3)


@pytest.mark.parametrize(
    ("shape", "groups", "weight", "bias", "any_side"),
    [
        ((3, 8, 5, 7), 4, True, True, False),
        ((3, 8, 9), 8, True, False, True),
        ((3, 8, 9), 2, False, True, False),
        ((3, 8, 5, 7), 1, False, False, False),
    ],
    ids=str,
)
def test_group_norm_keeps_its_numbers(tmp_path, shape, groups, weight, bias, any_side):
    torch.manual_seed(0)
    model, features = Normed(groups, weight=weight, bias=bias).eval(), 3 + 2 * torch.randn(shape)
    dynamic = {0: torch.export.Dim("batch"), **({2: torch.export.Dim("side")} if any_side else {})}
    path = tmp_path / "norm.onnx"
    with warnings.catch_warnings():
        # torch.onnx warns through its own dependencies.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (features,),
            path,
            dynamic_shapes=(dynamic,),
            opset_version=21,
            custom_translation_table=onnx_translations(),
            verbose=False,
        )
    session = require("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for images in (features, features[:2], features[:, :, :4] if any_side else features):
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            assert sqnr_db(torch.from_numpy(found), model(images)) >= 110
