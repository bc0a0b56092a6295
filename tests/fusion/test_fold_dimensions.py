"""Six dimensions and more as five: the same elements in the same order, whatever the permutation."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

from deploykit.fusion.fold_dimensions import MOST_DIMENSIONS, beyond_five, fold_dimensions, permutations
from deploykit.fusion.program import export_program
from deploykit.spec import BatchRange, InputSpec


class _Windows(nn.Module):
    """Splits maps into windows and heads, three parts of seven dimensions, and puts them together again."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        split = images.reshape(-1, 4, 2, 4, 3, 2, 4).permute(4, 0, 2, 5, 1, 3, 6)
        query, key, value = (part.reshape(-1, 4, 16, 4) for part in split.chunk(3))
        mixed = torch.softmax(query @ key.transpose(2, 3), -1) @ value
        whole = mixed.reshape(-1, 2, 2, 4, 4, 4).permute(0, 3, 1, 4, 2, 5)
        return (whole.reshape(-1, 8, 8, 8), images.unflatten(1, (2, 2, 2)).transpose(-1, 1)[:, 3:].flatten(1))


class _Sorted(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (images.reshape(1, 2, 4, 2, 4, 24).sort(-1).values.reshape(1, 8, 8, 24),)


@pytest.mark.parametrize("shape", [(2, 3, 2, 3, 2, 3), (4, 2, 2, 3, 3, 2, 4), (1, 2, 3, 1, 2, 2, 3, 1)], ids=len)
def test_every_permutation_is_at_most_two_of_five_dimensions(shape):
    dimensions = range(len(shape))
    values = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for order in random.Random(0).sample(list(itertools.permutations(dimensions)), 6):
        steps = permutations(shape, order)
        assert 1 <= len(steps) <= 2
        permuted = values
        for step in steps:
            assert len(step.shape) <= MOST_DIMENSIONS
            permuted = permuted.reshape(step.shape).permute(step.order)
        assert torch.equal(permuted.flatten(), values.permute(order).flatten()), order


def test_a_window_partition_is_one_permutation_of_the_dimensions_that_move():
    (step,) = permutations((1, 4, 7, 4, 7, 96), (0, 1, 3, 2, 4, 5))
    assert (step.shape, step.order) == ((4, 7, 4, 7 * 96), (0, 2, 1, 3))


@pytest.mark.parametrize("batch", [2, BatchRange()], ids=["two", "dynamic"])
def test_a_program_gives_the_same_without_a_tensor_of_six_dimensions(batch):
    network = _Windows()
    spec = InputSpec(batch=batch, channels=8, height=8, width=24)
    module = export_program(network, spec).module(check_guards=False)
    assert list(beyond_five(module.graph)) == []
    fold_dimensions(module)
    images = torch.rand(batch if isinstance(batch, int) else 1, 8, 8, 24)
    for expected, found in zip(network(images), module(images), strict=True):
        assert torch.equal(found, expected)
    again = torch.export.export(module, (images,))
    ranks = [node.meta["val"].ndim for node in again.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert max(ranks) <= MOST_DIMENSIONS


def test_what_computes_on_six_dimensions_is_yielded_and_what_moves_them_is_not():
    module = export_program(_Sorted(), InputSpec(channels=8, height=8, width=24)).module()
    (node, rank), *others = beyond_five(module.graph)
    assert (node.target, rank) == (torch.ops.aten.sort.default, 6)
    assert others == []
