"""Small networks as master graphs, for the tests of placement, plans and dialects."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.arrays import FloatArray
from deploykit.backbones.attention import TransformerBlock
from deploykit.backbones.window_attention import WindowAttention, WindowGrid
from deploykit.calibration.dialect import Dialect
from deploykit.calibration.float_network import FloatNetwork
from deploykit.calibration.plan import QuantizationPlan, calibrate
from deploykit.export.graphs import output_specs
from deploykit.export.to_onnx import to_onnx
from deploykit.fusion.pipeline import fuse
from deploykit.fusion.program import export_program
from deploykit.graph import Master, OnnxGraph, TorchProgram
from deploykit.processor import this_processor
from deploykit.spec import BatchRange, InputSpec, Int8
from tests.backbones.realistic import randomize

SIDE = 64


def conv_norm(source: int, target: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    padding = kernel // 2
    return nn.Sequential(
        nn.Conv2d(source, target, kernel, stride, padding, bias=False), nn.BatchNorm2d(target), nn.ReLU()
    )


class Residual(nn.Module):
    """What a ResNet has: a max-pool, a plain and a projected shortcut; and an attention on 1x1 maps."""

    outputs = ("stage1", "stage2", "logits")

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 16, 7, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.first = nn.Sequential(conv_norm(16, 16), conv_norm(16, 16)[:2])
        self.second = nn.Sequential(conv_norm(16, 32, 3, 2), conv_norm(32, 32)[:2])
        self.shortcut = conv_norm(16, 32, 1, 2)[:2]
        self.squeeze = nn.Conv2d(32, 8, 1)
        self.excite = nn.Conv2d(8, 32, 1)
        self.last = conv_norm(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        pooled = self.pool(self.stem(images))
        one = (self.first(pooled) + pooled).relu()
        two = (self.second(one) + self.shortcut(one)).relu()
        gate = self.excite(self.squeeze(two.mean((2, 3), keepdim=True)).relu()).sigmoid()
        deep = self.last(two * gate)
        return one, deep, self.head(deep.mean((2, 3)))


class Tokens(nn.Module):
    """What a vision transformer has: patches, two blocks with shared weights, and a head on the mean token."""

    outputs = ("tokens", "logits")

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, 8)
        self.block = TransformerBlock(48, 4)
        self.norm = nn.LayerNorm(48)
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.norm(self.block(self.block(self.patches(images).flatten(2).transpose(1, 2))))
        return tokens, self.head(tokens.mean(1))


class Windows(nn.Module):
    """What a Swin transformer has: attention inside plain and shifted windows, with position biases and a mask."""

    outputs = ("tokens", "logits")

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, 8)
        grids = [WindowGrid.fit((8, 8), 4, shifted=shifted) for shifted in (False, True)]
        self.norms = nn.ModuleList(nn.LayerNorm(48) for _ in grids)
        self.attentions = nn.ModuleList(WindowAttention(48, 4, grid) for grid in grids)
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.patches(images).permute(0, 2, 3, 1)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            tokens = tokens + attention(norm(tokens))
        return tokens, self.head(tokens.mean((1, 2)))


class Gated(nn.Module):
    """What MobileNetV3, EfficientNet and ResNetV2 have: SiLU, hard-swish, gates of both kinds, a norm before a layer.

    One level is a sigmoid that gates nothing.
    """

    outputs = ("stage1", "stage2", "sigmoid", "logits")

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 16, 3, 2)
        self.expand = nn.Conv2d(16, 48, 1)
        self.squeezes = nn.ModuleList(nn.Conv2d(48, 8, 1) for _ in range(2))
        self.excites = nn.ModuleList(nn.Conv2d(8, 48, 1) for _ in range(2))
        self.norm = nn.BatchNorm2d(48)
        self.project = nn.Conv2d(48, 48, 1)
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        one = F.silu(self.expand(self.stem(images)))
        two = one * self._scores(0, one).sigmoid()
        three = F.hardswish(self.project(self.norm(two).relu()))
        four = three * F.hardsigmoid(self._scores(1, three))
        return two, four, three.sigmoid(), self.head(four.mean((2, 3)))

    def _scores(self, index: int, features: Tensor) -> Tensor:
        scores: Tensor = self.excites[index](self.squeezes[index](features.mean((2, 3), keepdim=True)).relu())
        return scores


class Padded(nn.Module):
    """What EfficientNet-Lite has: zeros at the right and at the bottom alone, in front of strided convolutions."""

    outputs = ("stage1", "logits")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2)
        self.depthwise = nn.Conv2d(16, 16, 3, 2, groups=16)
        self.project = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        stem = self.stem(F.pad(images, (0, 1, 0, 1))).clamp(0, 6)
        one = self.project(self.depthwise(F.pad(stem, (0, 1, 0, 1))).clamp(0, 6))
        return one, self.head(one.mean((2, 3)))


Network: TypeAlias = Residual | Tokens | Windows | Gated | Padded


def both_forms(module: nn.Module, outputs: tuple[str, ...], images: FloatArray) -> Master:
    """The fused FP32 network of a module, for batches of one image like these."""
    spec = InputSpec(channels=images.shape[1], height=images.shape[2], width=images.shape[3])
    program = fuse(export_program(module.eval().requires_grad_(False), spec), spec, images).program
    model = to_onnx(program, spec, outputs)
    described = output_specs(model)
    return Master(
        onnx=OnnxGraph(input=spec, outputs=described, model=model),
        torch=TorchProgram(input=spec, outputs=described, program=program),
    )


def master_graph(module: nn.Module, outputs: tuple[str, ...], images: FloatArray) -> OnnxGraph:
    """The same as an ONNX graph."""
    return both_forms(module, outputs, images).onnx


def master_of(network: type[Network], images: FloatArray) -> Master:
    """One of the networks above, with realistic random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = randomize(network())
    return both_forms(module, network.outputs, images)


def float_network_of(network: type[Network], master: Master, images: FloatArray) -> FloatNetwork:
    """The same in torch for any batch, beside what `master_of` gave."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = randomize(network()).eval().requires_grad_(False)
    spec = replace(master.onnx.input, batch=BatchRange())
    program = fuse(export_program(module, spec), spec, images).program
    return FloatNetwork(
        model=master.onnx.model,
        traced=master.torch.program.module(),
        module=program.module(),
        outputs=network.outputs,
    )


def graph_of(network: type[Network], images: FloatArray) -> OnnxGraph:
    """The same as an ONNX graph."""
    return master_of(network, images).onnx


def plan_of(graph: OnnxGraph, images: FloatArray, settings: Int8 | None = None) -> QuantizationPlan:
    """The plan as an export for this processor makes it: no product of its weights saturates here."""
    settings = settings or Int8()
    if settings.reduce_range is None:
        settings = replace(settings, reduce_range=this_processor().saturates)
    return calibrate(graph.model, [image[None] for image in images], settings, key="0" * 64)


def written(dialect: Dialect, graph: OnnxGraph, plan: QuantizationPlan) -> ir.Model:
    """A copy of a master graph with an INT8 plan, as a dialect writes it."""
    _, *sides = graph.input.shape
    model: ir.Model = dialect.render(graph, plan, np.zeros((1, *sides), np.float32)).graph.model
    return model


def rounding_noise_db(expected: list[np.ndarray], found: list[np.ndarray]) -> list[float]:
    """The SQNR in dB of each output; infinite where it is exact."""
    with np.errstate(divide="ignore"):
        return [
            float(10 * np.log10(np.square(a.astype(np.float64)).sum() / np.square(a.astype(np.float64) - b).sum()))
            for a, b in zip(expected, found, strict=True)
        ]
