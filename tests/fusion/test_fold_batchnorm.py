from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from deploykit.fusion.fold_batchnorm import fold_batchnorm
from deploykit.fusion.pipeline import EXACT_DB, run_passes
from deploykit.fusion.program import export_program
from deploykit.spec import InputSpec

SPEC = InputSpec(channels=4, height=12, width=12)


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(seed))


class Tuple(nn.Sequential):
    def forward(self, inputs):
        return (super().forward(inputs),)


def norm_of(channels: int, *, affine: bool = True, eps: float = 1e-5, seed: int = 0) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm2d(channels, affine=affine, eps=eps)
    with torch.no_grad():
        norm.running_mean.normal_(0, 0.5, generator=generator)
        norm.running_var.uniform_(0.05, 4, generator=generator)
        if affine:
            norm.weight.normal_(1, 0.5, generator=generator)
            norm.bias.normal_(0, 0.5, generator=generator)
    return norm


def norms_left(module) -> int:
    return len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default))


@settings(max_examples=25, deadline=None, derandomize=True)
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
    (record,) = run_passes(module, images(seed))
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


class NormFirst(Tuple):
    pass


@pytest.mark.parametrize(
    "module",
    [
        UsedTwice(),
        SharedWeight(),
        Tuple(nn.Conv2d(4, 8, 3), nn.ReLU(), norm_of(8)),
        NormFirst(norm_of(4), nn.Conv2d(4, 8, 3)),
        Tuple(nn.ConvTranspose2d(4, 8, 3), norm_of(8)),
    ],
    ids=["output used twice", "shared weight", "relu between", "norm first", "transposed"],
)
def test_near_misses_are_left_alone(module):
    traced = export_program(module.eval(), SPEC).module()
    expected = [output.detach().clone() for output in traced(images())]
    assert fold_batchnorm(traced) == 0
    assert norms_left(traced) == 1
    for one, other in zip(expected, traced(images()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_norm_in_training_mode_is_left_alone():
    module = Tuple(nn.Conv2d(4, 8, 3), norm_of(8)).eval()
    module[1].track_running_stats = False
    module[1].running_mean = module[1].running_var = None
    traced = export_program(module, SPEC).module()
    assert fold_batchnorm(traced) == 0


def test_each_of_two_norms_goes_into_its_own_convolution():
    module = Tuple(nn.Conv2d(4, 8, 3), norm_of(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), norm_of(4, seed=1))
    traced = export_program(module.eval(), SPEC).module()
    (record,) = run_passes(traced, images())
    assert record.rewrites == 2
    assert norms_left(traced) == 0
