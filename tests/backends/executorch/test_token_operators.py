"""What a transformer calls, in operators that the delegate has: the same numbers, and what is not handled stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from deploykit.backends.executorch.passes import DIALECT
from deploykit.backends.executorch.token_operators import rewrite_tokens
from deploykit.fusion.program import export_program
from deploykit.spec import InputSpec
from tests.calibration.conftest import Case
from tests.conftest_graphs import sqnr_db

GONE = ("layer_norm", "scaled_dot_product_attention", "chunk", "split", "select", "mean")


def operators(module: torch.fx.GraphModule) -> set[str]:
    return {str(node.target).split(".")[1] for node in module.graph.nodes if "aten." in str(node.target)}


def test_a_transformer_keeps_its_numbers_to_rounding(tokens: Case):
    program = DIALECT.render(tokens.program, None, tokens.images).graph.program
    assert operators(program.graph_module) & set(GONE) == {"mean"}  # of tokens, which is not of a map
    images = torch.from_numpy(tokens.images[:1])
    with torch.no_grad():
        outputs = zip(tokens.program.program.module()(images), program.module()(images), strict=True)
    assert all(sqnr_db(expected.numpy(), found.numpy()) >= 120 for expected, found in outputs)


class Row(nn.Module):
    def forward(self, images):
        return (images.flatten(2)[:, 1] + images.flatten(2).split([1, 2], 1)[1].sum(1),)


class Plain(nn.Module):
    """A norm without weights, and attention with a scale of its own."""

    def forward(self, images):
        x = functional.layer_norm(images, (8,), eps=0.1)
        return (functional.scaled_dot_product_attention(x, x * 2, x, scale=0.3),)


class Masked(nn.Module):
    def forward(self, images):
        x = functional.layer_norm(images, (8, 8))
        return (functional.scaled_dot_product_attention(x, x, x, is_causal=True), x[:, -1])


@pytest.mark.parametrize(("network", "stays"), [(Row, ()), (Plain, ()), (Masked, GONE[:2])])
def test_an_operator_is_rewritten_or_stays(network: type[nn.Module], stays: tuple[str, ...]):
    module = export_program(network(), InputSpec(height=8, width=8)).module()
    images = torch.linspace(-1, 2, 192).reshape(1, 3, 8, 8)
    expected = module(images)
    rewrite_tokens(module)
    module.recompile()
    assert operators(module) & set(GONE[:2]) == set(stays)
    for one, other in zip(expected, module(images), strict=True):
        torch.testing.assert_close(other, one)
