"""Small networks as traced graphs, and what the tests of every pass ask of them."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from torch import nn

from deploykit.fusion.pipeline import EXACT_DB, FusionPass, run_passes
from deploykit.fusion.program import export_program
from deploykit.parity.metrics import sqnr_db
from deploykit.spec import BatchRange, InputSpec
from tests.tiers import examples

SPEC = InputSpec(channels=4, height=12, width=12)
DYNAMIC = InputSpec(batch=BatchRange(), channels=4, height=12, width=12)
few = settings(max_examples=examples(8, whole=20), deadline=None)


def images(seed: int = 0, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 4, 12, 12, generator=torch.Generator().manual_seed(seed))


class Calls(nn.Module):
    """A module from a function of (itself, images); keyword arguments become its attributes."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, inputs):
        outputs = self.function(self, inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)


class Tuple(nn.Sequential):
    def forward(self, inputs):
        return (super().forward(inputs),)


def traced(module: nn.Module, spec: InputSpec = SPEC, *, training: bool = False):
    return export_program(module.train(training), spec).module(check_guards=False)


def calls(graph, *targets) -> int:
    """How many calls of these operators (as aten's names, without overload) are in a graph."""
    names = [str(node.target).split(".")[1] for node in graph.graph.nodes if str(node.target).startswith("aten.")]
    return sum(name in targets for name in names)


def targets(graph) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def rewrites(graph, rewrite, seed: int = 0) -> int:
    """Run one pass that promises exactness; returns its count."""
    (record,) = run_passes(graph, images(seed), (FusionPass(name="it", rewrite=rewrite, min_sqnr_db=EXACT_DB),))
    return record.rewrites


def is_left_alone(module, rewrite, *, training: bool = False) -> bool:
    """Whether a pass counts nothing and leaves every operator and bit as it was."""
    graph = traced(module, training=training)
    before, expected = targets(graph), graph(images())
    count = rewrite(graph)
    same = all(torch.equal(one, other) for one, other in zip(expected, graph(images()), strict=True))
    return count == 0 and targets(graph) == before and same


def check_with_dynamic_batch(module: nn.Module, rewrite) -> None:
    """The pass applies to a graph of any batch, which then is traced again and takes other batches."""
    graph = traced(module.eval(), DYNAMIC)
    assert rewrite(graph) > 0
    again = export_program(graph, DYNAMIC).module()
    for count in (1, 3):
        with torch.no_grad():
            for one, other in zip(module(images(count=count)), again(images(count=count)), strict=True):
                assert sqnr_db(one.numpy(), other.numpy()) > 90


def layer_norm(channels: int, seed: int = 0, **settings) -> nn.LayerNorm:
    generator = torch.Generator().manual_seed(seed)
    norm = nn.LayerNorm(channels, **settings)
    with torch.no_grad():
        if norm.weight is not None:
            norm.weight.uniform_(0.5, 1.5, generator=generator)
        if norm.bias is not None:
            norm.bias.normal_(0, 0.5, generator=generator)
    return norm


def vector(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.random.default_rng(seed).normal(1, 0.5, shape).astype(np.float32)))
