from __future__ import annotations

import pytest
import torch
from torch import nn

from deploykit.fusion.pipeline import run_passes
from deploykit.fusion.split_activations import split_activations
from tests.fusion.graphs import Calls, calls, check_with_dynamic_batch, images, is_left_alone, rewrites, traced
from tests.fusion.test_fold_batchnorm import norm_of

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "clamp": nn.Hardtanh(-1, 3),
    "leaky": nn.LeakyReLU(0.2),
    "silu": nn.SiLU(),
    "hard-swish": nn.Hardswish(),
    "gelu": nn.GELU(approximate="tanh"),
    "sigmoid": nn.Sigmoid(),
}


def mixed(m, x):
    """Parts of a map through kernels of several sizes, as in MixNet."""
    parts = zip(m.kernels, x.split([1, 3], 1), strict=True)
    return m.act(m.norm(torch.cat([kernel(part) for kernel, part in parts], 1)))


def layers(act: nn.Module | None = None, norm: nn.Module | None = None):
    kernels = nn.ModuleList([nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(3, 6, 5, padding=2, groups=3)])
    return {"kernels": kernels, "act": act or nn.ReLU(), "norm": norm or nn.Identity()}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_kernel_takes_its_activation_along(name):
    graph = traced(Calls(mixed, **layers(ACTIVATIONS[name])).eval())
    assert rewrites(graph, split_activations) == 1
    (join,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    assert len(join.args[0]) == 2 and not {node.target for node in join.args[0]} & {torch.ops.aten.conv2d.default}


def test_a_norm_between_goes_into_the_kernels_first():
    graph = traced(Calls(mixed, **layers(norm=norm_of(7))).eval())
    counts = {record.name: record.rewrites for record in run_passes(graph, images())}
    assert (counts["fold-batchnorm"], counts["split-activations"]) == (1, 1)
    assert (calls(graph, "batch_norm"), calls(graph, "relu")) == (0, 2)


def test_a_graph_of_any_batch_is_still_traced():
    check_with_dynamic_batch(Calls(mixed, **layers()), split_activations)


def _read_elsewhere(m, x):
    joined = torch.cat([kernel(part) for kernel, part in zip(m.kernels, x.split([1, 3], 1), strict=True)], 1)
    return joined.relu(), joined


def _a_part_read_elsewhere(m, x):
    first, second = (kernel(part) for kernel, part in zip(m.kernels, x.split([1, 3], 1), strict=True))
    return torch.cat([first, second], 1).relu(), first


def _one_twice(m, x):
    first = m.kernels[0](x[:, :1])
    return torch.cat([first, first], 1).relu()


def _no_convolution(m, x):
    return torch.cat([m.kernels[0](x[:, :1]), x], 1).relu()


@pytest.mark.parametrize("function", [_read_elsewhere, _a_part_read_elsewhere, _one_twice, _no_convolution])
def test_near_misses_are_left_alone(function):
    assert is_left_alone(Calls(function, **layers()), split_activations)
