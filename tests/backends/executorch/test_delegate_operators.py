"""What networks call, in operators that the delegate has: the same numbers, and what is not handled stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import deploykit
from deploykit.backbones.window_attention import WindowAttention, WindowGrid
from deploykit.backends.executorch.delegate_operators import rewrite_operators
from deploykit.backends.executorch.passes import DIALECT
from deploykit.backends.executorch.pooling import keep_pooled_sides
from deploykit.fusion.program import export_program
from deploykit.spec import InputSpec
from tests.calibration.conftest import Case
from tests.conftest_graphs import sqnr_db

GONE = ("layer_norm", "scaled_dot_product_attention", "chunk", "split", "select", "mean")


def operators(module: torch.fx.GraphModule) -> set[str]:
    return {str(node.target).split(".")[1] for node in module.graph.nodes if "aten." in str(node.target)}


def test_a_transformer_keeps_its_numbers_to_rounding(tokens: Case):
    program = DIALECT.render(tokens.program, None, tokens.images).graph.program
    assert operators(program.graph_module) & set(GONE) == {"mean"}  # of tokens, as of a map
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


class Biased(nn.Module):
    """Attention with a bias for each head, as inside windows, of two images at a time."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.linspace(0, 1, 192).reshape(1, 3, 8, 8))

    def forward(self, images):
        x = torch.cat((images, images * 0.5))
        return (functional.scaled_dot_product_attention(x, x, x, attn_mask=self.bias),)


class OneHead(nn.Module):
    """Attention of one head with a bias of two, three and four dimensions."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.linspace(0, 1, 64).reshape(8, 8))

    def forward(self, images):
        x = images.reshape(3, 1, 8, 8)
        biases = self.bias, self.bias[None], torch.stack([self.bias, self.bias * 2, -self.bias])[:, None]
        return tuple(functional.scaled_dot_product_attention(x, x, x, attn_mask=bias) for bias in biases)


class OneToken(nn.Module):
    """Attention of three heads over one token with a bias: each head gives its values."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.tensor([1.0, -2.0, 3.0]).reshape(1, 3, 1, 1))

    def forward(self, images):
        x = images.flatten(2).mean(2).reshape(1, 3, 1, 1)
        return (functional.scaled_dot_product_attention(x, -x, torch.cat((2 * x, x), 3), attn_mask=self.bias),)


class Choice(nn.Module):
    """Attention with a mask of truth values."""

    def forward(self, images):
        return (functional.scaled_dot_product_attention(images, images, images, attn_mask=images > 0),)


class Gated(nn.Module):
    """A norm over groups of channels, whose members differ in mean and in deviation, and a hard gate."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 6)
        self.norm.weight.data = torch.linspace(0.5, 1.5, 6)
        self.norm.bias.data = torch.linspace(-1, 1, 6)

    def forward(self, images):
        x = self.norm(torch.cat((images, 3 * images.square()), 1))
        return (functional.hardsigmoid(4 * x),)


@pytest.mark.parametrize(
    ("network", "stays"),
    [
        (Row, ()),
        (Plain, ()),
        (Masked, GONE[:2]),
        (Biased, ()),
        (OneHead, ()),
        (OneToken, ()),
        (Choice, GONE[1:2]),
        (Gated, ()),
    ],
)
def test_an_operator_is_rewritten_or_stays(network: type[nn.Module], stays: tuple[str, ...]):
    module = export_program(network(), InputSpec(height=8, width=8)).module()
    images = torch.linspace(-1, 2, 192).reshape(1, 3, 8, 8)
    expected = module(images)
    rewrite_operators(module)
    module.recompile()
    assert operators(module) & {*GONE[:2], "group_norm", "hardsigmoid"} == set(stays)
    assert network is not OneToken or "softmax" not in operators(module)
    for one, other in zip(expected, module(images), strict=True):
        torch.testing.assert_close(other, one)


class Means(nn.Module):
    """Of tokens, of a map with its channels last, of a map; and two that are no pools."""

    def forward(self, images):
        tokens = images.flatten(2)
        return (tokens.mean(1), images.mean((1, 2)), images.mean((2, 3)), tokens.mean(2), images.mean((1, 3)))


def test_means_of_tokens_and_of_maps_become_pools():
    module = export_program(Means(), InputSpec(height=8, width=8)).module()
    images = torch.linspace(-1, 2, 192).reshape(1, 3, 8, 8)
    expected = module(images)
    keep_pooled_sides(module)
    module.recompile()
    pools = [node.args[1:] for node in module.graph.nodes if node.target == torch.ops.aten.mean.dim]
    assert [pool == ([2, 3], True) for pool in pools] == [True, True, True, False, False]
    for one, other in zip(expected, module(images), strict=True):
        torch.testing.assert_close(other, one)


class Windowed(nn.Module):
    """Attention inside windows of four tokens a side, or of the one token there is."""

    def __init__(self, heads, side):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 32 // side, 32 // side)
        self.attention = WindowAttention(32, heads, WindowGrid.fit((side, side), 4, shifted=False))
        self.head = nn.Linear(32, 5)

    def forward(self, images):
        tokens = self.patches(images).permute(0, 2, 3, 1)
        return self.head((tokens + self.attention(tokens)).mean((1, 2)))


@pytest.mark.parametrize(("heads", "side"), [(1, 8), (4, 1)])
def test_attention_whose_scores_look_alike_in_two_orders_keeps_its_numbers(heads: int, side: int):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Windowed(heads, side).eval()
    with deploykit.create_backbone(network, runtime="executorch", precision="fp32", image_size=32) as engine:
        images = torch.linspace(-2, 2, 3 * 32 * 32).sin().reshape(1, 3, 32, 32)
        with torch.no_grad():
            assert sqnr_db(network(images).numpy(), engine(images.numpy())) > 90
