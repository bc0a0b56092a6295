from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from deploykit.fusion.merge_branches import merge_branches
from deploykit.fusion.pipeline import EXPORT_PASSES, run_passes
from deploykit.fusion.program import export_program
from deploykit.spec import InputSpec, SizeRange
from tests.backbones.realistic import randomize, settle
from tests.fusion.graphs import Calls, calls, check_with_dynamic_batch, is_left_alone, rewrites, traced, vector
from tests.fusion.test_fold_batchnorm import norm_of
from tests.tiers import examples


def conv(kernel=3, groups=1, *, padding=None, stride=1, width=4, bias=True, **settings) -> nn.Conv2d:
    """A convolution whose outputs of any odd kernel and dilation have one size."""
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    step = settings.get("dilation", 1)
    padding = [step * (side // 2) for side in sides] if padding is None else padding
    return nn.Conv2d(4, width, kernel, stride, padding, groups=groups, bias=bias, **settings)


def block(function, **layers) -> Calls:
    return Calls(function, **layers).eval()


@settings(max_examples=examples(6, whole=12), deadline=None)
@given(
    kernels=st.lists(st.sampled_from([1, 3, 5, (1, 3), (3, 1), (5, 3)]), min_size=1, max_size=4),
    groups=st.sampled_from([1, 2, 4]),
    stride=st.integers(1, 2),
    identities=st.sampled_from(["none", "itself", "norm", "scaled", "both"]),
    biases=st.booleans(),
    normed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_branches_of_one_input_become_the_largest_of_them(*, kernels, groups, stride, identities, biases, normed, seed):
    assume(stride == 1 or identities == "none")
    kernels = [*kernels, 5]  # within which all others lie
    convolutions = nn.ModuleList(conv(kernel, groups, stride=stride, bias=biases) for kernel in kernels)
    norms = nn.ModuleList(norm_of(4) if normed else nn.Identity() for _ in kernels)

    def summed(m, x):
        x = x.relu()
        parts = [norm(layer(x)) for layer, norm in zip(m.convolutions, m.norms, strict=True)]
        if identities in ("itself", "both"):
            parts.insert(0, x)
        if identities in ("norm", "both"):
            parts.append(m.norm(x))
        if identities == "scaled":
            parts.insert(1, x * m.gamma)
        return sum(parts[1:], parts[0]).relu()

    module = block(summed, convolutions=convolutions, norms=norms, norm=norm_of(4), gamma=vector(4, 1, 1))
    graph = traced(module)
    counts = {record.name: record.rewrites for record in run_passes(graph, torch.randn(1, 4, 12, 12))}
    added = {"none": 0, "itself": 1, "norm": 1, "scaled": 1, "both": 2}[identities]
    assert counts["merge-branches"] == len(kernels) - 1 + added
    assert (calls(graph, "conv2d"), calls(graph, "relu")) == (1, 2)
    assert calls(graph, "add", "mul", "batch_norm") == 0


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ({"first": conv(1), "second": conv(1)}, (1, 1)),
        ({"first": conv(1, 4), "second": conv(1, 4), "third": conv(1, 4)}, (1, 1)),
        ({"first": conv(3, 4), "second": conv(3, 4)}, (3, 3)),
        ({"first": conv(7, 4, stride=2, width=8), "second": conv(3, 4, stride=2, width=8)}, (7, 7)),
        ({"first": conv(3, dilation=2), "second": conv(1), "third": conv(3, dilation=2)}, (3, 3)),
        ({"first": conv(3, padding="same"), "second": conv(1, padding="valid")}, (3, 3)),
        ({"first": conv(2, padding=1, stride=2), "second": conv(4, padding=2, stride=2)}, (4, 4)),
        ({"first": conv((3, 1)), "second": conv(3), "third": conv((1, 3))}, (3, 3)),
        ({"first": conv(3, padding=0), "second": conv(5, padding=1)}, (5, 5)),
    ],
    ids=str,
)
def test_kernels_of_each_kind_become_one_of_their_union(layers, shape):
    def summed(m, x):
        first, *others = (getattr(m, name)(x) for name in layers)
        return sum(others, first)

    graph = traced(block(summed, **layers))
    assert rewrites(graph, merge_branches) == len(layers) - 1
    (weight,) = (value for name, value in graph.state_dict().items() if name.endswith("weight"))
    assert weight.shape[2:] == shape


def test_signs_and_factors_of_a_sum_and_a_term_of_another_input_stay():
    def summed(m, x):
        other = x.exp()
        inner = torch.sub(m.first(x), m.second(x), alpha=3)
        return torch.add(other - inner, x, alpha=0.5)

    graph = traced(block(summed, first=conv(3), second=conv(1)))
    assert rewrites(graph, merge_branches) == 2
    assert (calls(graph, "conv2d"), calls(graph, "add", "sub")) == (1, 1)


def test_a_merged_sum_is_a_branch_of_the_sum_behind_it():
    """FastViT's mixer: ``x + gamma * (branches(x) - norm(x))``."""

    def mixed(m, x):
        x = x.relu()
        return x + m.gamma * (m.first(x) + m.second(x) - m.norm(x))

    layers = {"first": conv(3, 4), "second": conv(1, 4), "norm": norm_of(4), "gamma": vector(4, 1, 1)}
    graph = traced(block(mixed, **layers))
    assert rewrites(graph, merge_branches) == 3
    assert (calls(graph, "conv2d"), calls(graph, "add", "sub", "mul", "batch_norm")) == (1, 0)


def test_a_norm_behind_the_sum_goes_into_it():
    """RepViT's mixer: ``norm(conv3(x) + conv1(x) + x)``."""
    layers = {"first": conv(3, 4, bias=False), "second": conv(1, 4, bias=False), "norm": norm_of(4)}
    graph = traced(block(lambda m, x: m.norm(m.first(x) + m.second(x) + x).relu(), **layers))
    assert rewrites(graph, merge_branches) == 2
    assert (calls(graph, "conv2d"), calls(graph, "add", "batch_norm")) == (1, 0)


def test_what_has_no_larger_kernel_to_join_makes_a_pair_of_its_own():
    """Two depthwise and two dense branches: one convolution each, and their sum."""
    layers = {"first": conv(3, 4), "second": conv(1), "third": conv(1, 4), "fourth": conv(1)}
    graph = traced(block(lambda m, x: m.first(x) + m.second(x) + m.third(x) + m.fourth(x), **layers))
    assert rewrites(graph, merge_branches) == 2
    assert (calls(graph, "conv2d"), calls(graph, "add")) == (2, 1)


def test_lines_and_volumes():
    def summed(m, x):
        line = x.flatten(2)
        volume = x.unsqueeze(1)
        return m.line(line) + m.point(line) + line, m.cube(volume) + m.dot(volume)

    layers = {
        "line": nn.Conv1d(4, 4, 3, padding=1),
        "point": nn.Conv1d(4, 4, 1),
        "cube": nn.Conv3d(1, 2, 3, padding=1),
        "dot": nn.Conv3d(1, 2, 1),
    }
    graph = traced(block(summed, **layers))
    assert rewrites(graph, merge_branches) == 3
    assert calls(graph, "conv1d", "conv3d") == 2


def test_a_branch_that_is_read_elsewhere_stays_and_the_others_merge():
    def summed(m, x):
        read = m.second(x)
        return m.first(x) + read + m.third(x), read

    graph = traced(block(summed, first=conv(3), second=conv(1), third=conv(1)))
    assert rewrites(graph, merge_branches) == 1
    assert (calls(graph, "conv2d"), calls(graph, "add")) == (2, 1)


def test_a_graph_of_any_batch_is_still_traced():
    check_with_dynamic_batch(
        block(lambda m, x: m.first(x) + m.second(x) + x, first=conv(3), second=conv(1)), merge_branches
    )


def test_a_graph_of_any_image_size_is_merged_too():
    layers = {"first": conv(3, stride=2), "second": conv(1, stride=2), "third": conv(5, stride=2)}
    sizes = SizeRange(min=8, opt=16, max=32, step=2)
    spec = InputSpec(channels=4, height=16, width=16, sizes=sizes)
    graph = traced(block(lambda m, x: m.first(x) + m.second(x) + m.third(x), **layers), spec)
    expected = [graph(torch.ones(1, 4, side, side))[0] for side in (8, 16)]
    assert merge_branches(graph) == 2
    for one in expected:
        found = graph(torch.ones(1, 4, 2 * one.shape[2], 2 * one.shape[3]))[0]
        torch.testing.assert_close(found, one)


def test_the_module_that_was_traced_keeps_its_numbers():
    module = block(lambda m, x: m.first(x) + m.second(x), first=conv(3), second=conv(1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert rewrites(traced(module), merge_branches) == 1
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def _with_parts(m, x):
    first, second = m.first(x), m.second(x)
    return first + second, first, second


def _with_inner_sum(m, x):
    inner = m.first(x) + m.second(x.relu())
    return inner + m.third(x), inner


NEAR_MISSES = {
    "both branches are read elsewhere": (_with_parts, {"first": conv(3), "second": conv(1)}),
    "the inner sum is a level": (_with_inner_sum, {"first": conv(3), "second": conv(1), "third": conv(1)}),
    "other inputs": (lambda m, x: m.first(x) + m.second(x.relu()), {"first": conv(3), "second": conv(1)}),
    "one weight twice": (lambda m, x: m.first(x) + m.first(x), {"first": conv(3)}),
    "an activation between": (lambda m, x: m.first(x).relu() + m.second(x), {"first": conv(3), "second": conv(1)}),
    "multiplied": (lambda m, x: m.first(x) * m.second(x), {"first": conv(3), "second": conv(1)}),
    "broadcast": (
        lambda m, x: m.first(x) + m.second(x),
        {"first": conv(3), "second": nn.Conv2d(4, 1, 3, padding=1)},
    ),
    "other groups": (lambda m, x: m.first(x) + m.second(x), {"first": conv(3), "second": conv(3, 4)}),
    "other dilations": (lambda m, x: m.first(x) + m.second(x), {"first": conv(3), "second": conv(3, dilation=2)}),
    "other strides": (
        lambda m, x: m.first(x) + m.second(x),
        {"first": conv(12, padding=0), "second": conv(12, padding=0, stride=2)},
    ),
    "a cross": (lambda m, x: m.first(x) + m.second(x), {"first": conv((1, 5)), "second": conv((5, 1))}),
    "an identity of more channels": (
        lambda m, x: torch.cat([m.first(x), m.second(x)], 1) + torch.cat([x, x], 1),
        {"first": conv(3), "second": conv(3)},
    ),
    "identities alone": (lambda m, x: x.relu() + m.norm(x) + x, {"norm": norm_of(4)}),
    "no convolution": (lambda m, x: x + x.relu(), {}),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_alone(name):
    function, layers = NEAR_MISSES[name]
    assert is_left_alone(block(function, **layers), merge_branches)


def test_norms_in_training_stay_between_the_branches():
    def summed(m, x):
        return m.one(m.first(x)) + m.two(m.second(x)) + m.three(x)

    layers = {"first": conv(3), "second": conv(1), "one": norm_of(4), "two": norm_of(4), "three": norm_of(4)}
    graph = traced(Calls(summed, **layers), training=True)
    before = calls(graph, "conv2d", "batch_norm", "add")
    assert merge_branches(graph) == 0
    assert calls(graph, "conv2d", "batch_norm", "add") == before


def test_a_kernel_that_float_cannot_hold_is_left_alone():
    module = block(lambda m, x: m.first(x) + m.second(x), first=conv(3), second=conv(1))
    with torch.no_grad():
        module.first.weight.fill_(3e38)
        module.second.weight.fill_(3e38)
    assert merge_branches(traced(module)) == 0


def for_inference(model: nn.Module) -> int:
    """How many convolutions a network of timm has after its authors' own reparametrization."""
    from timm.utils.model import reparameterize_model

    return sum(isinstance(module, nn.Conv2d) for module in reparameterize_model(nn.Sequential(model)).modules())


def fused(model: nn.Module, side: int, channels: int = 3):
    """The graph of a network with drawn weights and the statistics of some images, after all passes."""
    torch.manual_seed(0)
    some = torch.randn(4, channels, side, side)
    settle(randomize(model).eval(), some)
    module = Calls(lambda m, x: m.model(x), model=model).eval()
    spec = InputSpec(channels=channels, height=side, width=side)
    graph = export_program(module, spec).module(check_guards=False)
    return graph, {record.name: record.rewrites for record in run_passes(graph, some[:1], EXPORT_PASSES)}


def timm_block(name: str) -> nn.Module:
    from timm.models import byobnet, fastvit, repvit

    make = {
        "RepVGG": lambda: byobnet.RepVggBlock(4, 4),
        "RepVGG, strided": lambda: byobnet.RepVggBlock(4, 8, stride=2),
        "MobileOne": lambda: byobnet.MobileOneBlock(4, 4, num_conv_branches=4),
        "MobileOne, pointwise": lambda: byobnet.MobileOneBlock(4, 8, kernel_size=1, num_conv_branches=3),
        "MobileOne, depthwise": lambda: byobnet.MobileOneBlock(4, 4, stride=2, group_size=1, num_conv_branches=2),
        "FastViT's mixer": lambda: fastvit.RepMixerBlock(4, layer_scale_init_value=0.1),
        "FastViT's large kernel": lambda: fastvit.ReparamLargeKernelConv(4, 8, 7, 2, group_size=1, small_kernel=3),
        "RepViT": lambda: repvit.RepViTBlock(4, 2, 3, False, nn.GELU),
    }
    return make[name]()


@pytest.mark.parametrize(
    "name",
    [
        "RepVGG",
        "RepVGG, strided",
        "MobileOne",
        "MobileOne, pointwise",
        "MobileOne, depthwise",
        "FastViT's mixer",
        "FastViT's large kernel",
        "RepViT",
    ],
)
def test_blocks_of_timm_have_the_convolutions_of_their_own_reparametrization(timm, name):
    model = timm_block(name)
    graph, counts = fused(model, 12, channels=4)
    assert counts["merge-branches"] > 0
    assert calls(graph, "conv2d") == for_inference(model)
    assert calls(graph, "batch_norm") == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobileone_s0", "repvgg_a0", "fastvit_t8", "repvit_m1"])
def test_networks_of_timm_have_the_convolutions_of_their_own_reparametrization(timm, name):
    model = timm.create_model(name, num_classes=10)
    graph, counts = fused(model, 64)
    assert counts["merge-branches"] > 0
    assert calls(graph, "conv2d") == for_inference(model)


def test_branches_that_reach_to_neither_border_alone_do_so_together():
    """One starts first and the other ends last: with a stride, the union may still fit between."""

    def summed(m, x):
        x = nn.functional.pad(x, (0, 0, 0, 3))
        return m.first(x) + m.second(x)

    first = nn.Conv2d(4, 4, (2, 1), (4, 1), (1, 0))
    layers = {"first": first, "second": nn.Conv2d(4, 4, (3, 1), (4, 1))}
    graph = traced(block(summed, **layers))
    assert rewrites(graph, merge_branches) == 1
    (weight,) = (value for name, value in graph.state_dict().items() if name.endswith("weight"))
    assert weight.shape == (4, 4, 4, 1)


def test_a_shift_gives_a_branch_without_a_bias_one():
    layers = {"inner": nn.Sequential(conv(3, 4, bias=False)), "norm": norm_of(4)}
    graph = traced(block(lambda m, x: _of(lambda y: m.inner(y) + m.norm(y), x.relu()), **layers))
    assert rewrites(graph, merge_branches) == 1
    assert graph.get_parameter("inner.0.bias").abs().max() > 0


def _of(function, value):
    return function(value)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.even(x) + m.other(x),
        lambda m, x: _of(lambda y: y + m.strided(y), x.mean((2, 3), keepdim=True)),
    ],
    ids=["zeros on one side only", "an identity beside a stride"],
)
def test_branches_without_a_common_grid_stay(function):
    layers = {"even": conv(2, padding="same"), "other": conv(2, padding="same"), "strided": conv(1, 4, stride=2)}
    assert is_left_alone(block(function, **layers), merge_branches)
