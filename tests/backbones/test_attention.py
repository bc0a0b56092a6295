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
    session = exported(model, (features,), (dynamic,), tmp_path / "norm.onnx")
    for images in (features, features[:2], features[:, :, :4] if any_side else features):
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            assert sqnr_db(torch.from_numpy(found), model(images)) >= 110


class Attention(nn.Module):
    """torch's attention, without or with a mask of one kind."""

    def forward(self, query, key, value, mask=None):
        return nn.functional.scaled_dot_product_attention(query, key, value, mask)


@pytest.mark.parametrize(
    ("lead", "mask"),
    [((2,), None), ((2,), torch.rand(5, 7) > 0.3), ((2, 4), torch.rand(5, 7)), ((2, 1, 4), None)],
    ids=["tokens", "boolean mask", "added mask", "five axes"],
)
def test_attention_of_any_rank_keeps_its_numbers(tmp_path, lead, mask):
    torch.manual_seed(0)
    query, key, value = torch.randn(*lead, 5, 8), torch.randn(*lead, 7, 8), torch.randn(*lead, 7, 6)
    given = (query, key, value) if mask is None else (query, key, value, mask)
    session = exported(Attention(), given, None, tmp_path / "attention.onnx")
    names = [each.name for each in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, map(torch.Tensor.numpy, given), strict=True)))
    assert sqnr_db(torch.from_numpy(found), Attention()(*given)) >= 110


def exported(model, inputs, dynamic_shapes, path):
    with warnings.catch_warnings():
        # torch.onnx warns through its own dependencies.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            inputs,
            path,
            dynamic_shapes=dynamic_shapes,
            opset_version=21,
            custom_translation_table=onnx_translations(),
            verbose=False,
        )
    return require("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
