from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from deploykit.fusion.fold_batchnorm import fold_batchnorm
from deploykit.fusion.pipeline import EXACT_DB, FusionPass, run_passes
from deploykit.fusion.program import export_program
from tests.fusion.graphs import SPEC, Calls, Tuple, check_with_dynamic_batch, images, is_left_alone, rewrites, traced
from tests.tiers import examples

FOLD = (FusionPass(name="fold-batchnorm", rewrite=fold_batchnorm, min_sqnr_db=EXACT_DB),)


def norm_of(channels: int, *, affine: bool = True, eps: float = 1e-5, seed: int = 0, kind=nn.BatchNorm2d) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    norm = kind(channels, affine=affine, eps=eps)
    with torch.no_grad():
        norm.running_mean.normal_(0, 0.5, generator=generator)
        norm.running_var.uniform_(0.05, 4, generator=generator)
        if affine:
            norm.weight.normal_(1, 0.5, generator=generator)
            norm.bias.normal_(0, 0.5, generator=generator)
    return norm


def norms_left(module) -> int:
    return len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default))


@settings(max_examples=examples(10, whole=25), deadline=None, derandomize=True)
@given(
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    padding=st.sampled_from([0, 1, 2, "same"]),
    bias=st.booleans(),
    affine=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3]),
    zeros=st.booleans(),
    seed=st.integers(0, 99),
)
def test_folding_keeps_the_numbers_for_every_setting(
    *, kernel, stride, dilation, groups, padding, bias, affine, eps, zeros, seed
):
    assume(padding != "same" or stride == 1)
    settings_of = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    convolution = nn.Conv2d(4, 8, kernel, **settings_of)
    if zeros:
        nn.init.zeros_(convolution.weight[2:4])
    norm = norm_of(8, affine=affine, eps=eps, seed=seed)
    module = export_program(Tuple(convolution, norm).eval(), SPEC).module()
    (record,) = run_passes(module, images(seed), FOLD)
    assert record.rewrites == 1
    assert record.sqnr_db >= EXACT_DB
    assert norms_left(module) == 0


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(4, 8, 3), norm_of(8)

    def forward(self, inputs):
        before = self.convolution(inputs)
        return self.norm(before), before


class SharedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(4, 4, 3), norm_of(4)

    def forward(self, inputs):
        return (self.convolution(self.norm(self.convolution(inputs))),)


@pytest.mark.parametrize(
    "module",
    [
        UsedTwice(),
        SharedWeight(),
        Tuple(nn.Conv2d(4, 8, 3), nn.ReLU(), norm_of(8)),
        Tuple(norm_of(4), nn.Conv2d(4, 8, 3, padding=1)),
        Tuple(norm_of(4), nn.ZeroPad2d(1), nn.Conv2d(4, 8, 3)),
        Tuple(norm_of(4), nn.ReLU(), nn.Conv2d(4, 8, 3)),
        Tuple(norm_of(4), nn.ConvTranspose2d(4, 8, 3)),
        Tuple(norm_of(4), nn.Linear(12, 8)),
        Calls(lambda m, x: _and_its_layer(m, m.norm(x)), norm=norm_of(4), layer=nn.Conv2d(4, 8, 3)),
    ],
    ids=[
        "output used twice",
        "shared weight",
        "relu between",
        "before a padded convolution",
        "before a pad",
        "before a relu",
        "before a transposed convolution",
        "along another axis than the linear's",
        "read by more than the convolution",
    ],
)
def test_near_misses_are_left_alone(module):
    assert is_left_alone(module, fold_batchnorm)


def test_a_norm_in_training_mode_is_left_alone():
    module = Tuple(nn.Conv2d(4, 8, 3), norm_of(8)).eval()
    module[1].track_running_stats = False
    module[1].running_mean = module[1].running_var = None
    graph = export_program(module, SPEC).module()
    assert fold_batchnorm(graph) == 0


def test_each_of_two_norms_goes_into_its_own_convolution():
    module = Tuple(nn.Conv2d(4, 8, 3), norm_of(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), norm_of(4, seed=1))
    graph = export_program(module.eval(), SPEC).module()
    (record,) = run_passes(graph, images(), FOLD)
    assert record.rewrites == 2
    assert norms_left(graph) == 0


def _and_its_layer(m, normed):
    return normed, m.layer(normed)


LAYERS = {
    "conv1d": Calls(
        lambda m, x: m.norm(m.layer(x.flatten(2))),
        layer=nn.Conv1d(4, 8, 3, groups=2),
        norm=norm_of(8, kind=nn.BatchNorm1d),
    ),
    "transposed": Tuple(nn.ConvTranspose2d(4, 8, 3, stride=2), norm_of(8)),
    "transposed in groups": Tuple(nn.ConvTranspose2d(4, 8, 3, groups=2, bias=False), norm_of(8)),
    "transposed conv1d": Calls(
        lambda m, x: m.norm(m.layer(x.flatten(2))),
        layer=nn.ConvTranspose1d(4, 8, 3),
        norm=norm_of(8, kind=nn.BatchNorm1d),
    ),
    "linear": Calls(
        lambda m, x: m.norm(m.layer(x.flatten(1))),
        layer=nn.Linear(576, 8, bias=False),
        norm=norm_of(8, kind=nn.BatchNorm1d),
    ),
    "before a convolution": Tuple(nn.ReLU(), norm_of(4), nn.Conv2d(4, 8, 3, stride=2, dilation=2)),
    "before a convolution in groups": Tuple(nn.ReLU(), norm_of(4), nn.Conv2d(4, 8, 3, groups=4, bias=False)),
    "before a 1x1 convolution with 'same'": Tuple(nn.ReLU(), norm_of(4), nn.Conv2d(4, 8, 1, padding="same")),
    "before a linear": Calls(
        lambda m, x: m.layer(m.norm(x.mean((2, 3)))), layer=nn.Linear(4, 8), norm=norm_of(4, kind=nn.BatchNorm1d)
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_takes_the_norm(name):
    graph = traced(LAYERS[name])
    assert rewrites(graph, fold_batchnorm) == 1
    assert norms_left(graph) == 0
    check_with_dynamic_batch(LAYERS[name], fold_batchnorm)


def test_a_norm_between_two_convolutions_goes_into_the_first():
    graph = traced(Tuple(nn.Conv2d(4, 8, 3), norm_of(8), nn.Conv2d(8, 8, 1, bias=False)))
    second = graph.state_dict()["2.weight"].clone()
    assert rewrites(graph, fold_batchnorm) == 1
    assert torch.equal(graph.state_dict()["2.weight"], second)


def test_a_variance_of_zero_without_epsilon_is_left_alone():
    module = Tuple(nn.Conv2d(4, 8, 3), norm_of(8, eps=0.0))
    nn.init.zeros_(module[1].running_var[2:3])
    graph = traced(module)
    assert fold_batchnorm(graph) == 0


def joined(m, x):
    first, second = m.first(x), m.second(x.relu())
    return m.norm(torch.cat([first, second.transpose(2, 3)], 1))


def test_a_norm_behind_a_concatenation_goes_into_each_layer_that_it_joins():
    layers = {"first": nn.Conv2d(4, 3, 3), "second": nn.Conv2d(4, 5, 3, bias=False), "norm": norm_of(8)}
    graph = traced(Calls(joined, **layers).eval())
    assert rewrites(graph, fold_batchnorm) == 1
    assert norms_left(graph) == 0
    check_with_dynamic_batch(Calls(joined, **layers), fold_batchnorm)


def joined_with_itself(m, x):
    first = m.first(x)
    return m.norm(torch.cat([first, first], 1))


def joined_with_another(m, x):
    return m.norm(torch.cat([m.first(x), x.relu()[:, :, 1:-1, 1:-1]], 1))


def joined_and_read_elsewhere(m, x):
    first, second = m.first(x), m.first_2(x)
    return m.norm(torch.cat([first, second], 1)), second


def joined_along_rows(m, x):
    return m.norm(torch.cat([m.first(x), m.first_2(x)], 2))


@pytest.mark.parametrize("function", [joined_with_itself, joined_with_another, joined_and_read_elsewhere])
def test_a_norm_behind_a_concatenation_of_anything_else_is_left_alone(function):
    layers = {"first": nn.Conv2d(4, 4, 3), "first_2": nn.Conv2d(4, 4, 3), "norm": norm_of(8)}
    assert is_left_alone(Calls(function, **layers).eval(), fold_batchnorm)


def test_a_norm_behind_maps_joined_along_rows_goes_whole_into_each():
    layers = {"first": nn.Conv2d(4, 8, 3), "first_2": nn.Conv2d(4, 8, 3), "norm": norm_of(8)}
    assert rewrites(traced(Calls(joined_along_rows, **layers).eval()), fold_batchnorm) == 1
