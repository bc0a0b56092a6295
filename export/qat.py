"""A backbone for quantization-aware training: a module that rounds where its engine will, and what it has learned."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from deploykit.arrays import FloatArray
from deploykit.backbones.base import BaseBackbone
from deploykit.backbones.weights import weights_digest
from deploykit.calibration.added_modules import HOLDER
from deploykit.calibration.dialect import Dialect
from deploykit.calibration.fake_quantized_network import FakeQuantizedNetwork, IntegerLayer
from deploykit.calibration.float_network import FloatNetwork
from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.placement import IntegerWeight, place
from deploykit.calibration.plan import QuantizationPlan, constants_digest
from deploykit.calibration.rounded_weight import RoundedWeight
from deploykit.errors import CalibrationError
from deploykit.feature_dict import Features
from deploykit.onnx_values import floats_of
from deploykit.spec import Int8


@dataclass(frozen=True, kw_only=True, eq=False)
class QatSource:
    """What a network for training was made of: the backbone, its INT8 settings, the images, and the runtime."""

    backbone: BaseBackbone
    settings: Int8
    images: CalibrationSet | None
    runtime: str | None


class QatNetwork(nn.Module):
    """A fused backbone that rounds weights and activations as an INT8 engine does; all of it can be trained.

    It is called like its backbone, in training and in evaluation mode alike: BatchNorm is folded into the weights and
    dropout is gone, as in the engine. The parameters are the weights, the biases, and the logarithms of the scales.
    `plan` is what it rounds to now.

    Args:
        source: what it is made of.
        network: the backbone in FP32; it stays as it is.
        plan: where to begin.
        dialect: what the runtime rounds.
    """

    def __init__(self, source: QatSource, network: FloatNetwork, plan: QuantizationPlan, dialect: Dialect) -> None:
        super().__init__()
        self.source = source
        self.quantized = FakeQuantizedNetwork(network, plan, dialect)
        self._names = network.outputs
        for name, parameter in self.quantized.module.named_parameters():
            if not name.startswith(HOLDER) and parameter.is_floating_point():
                parameter.requires_grad_(True)

    @property
    def plan(self) -> QuantizationPlan:
        """The plan with what the parameters are now."""
        return self.quantized.learned_plan()

    def forward(self, images: Tensor) -> Any:
        """Map ``(N, C, H, W)`` to what the backbone gives: logits, the embedding, or features by level name."""
        outputs = dict(zip(self._names, self.quantized(images), strict=True))
        spec, info = self.source.backbone.spec, self.source.backbone.feature_info
        if spec.features_only:
            return Features({level.name: outputs[level.name] for level in info}, info.by_index())
        return outputs[spec.head_name]

    def train(self, mode: bool = True) -> QatNetwork:
        """Set the mode; it computes the same in both."""
        for module in self.modules():
            module.training = mode
        return self

    @torch.no_grad()
    def outputs_of(self, images: FloatArray) -> dict[str, FloatArray]:
        """Return every level and the head for ``(N, C, H, W)`` images, one at a time, with all roundings."""
        device = next(self.parameters()).device
        parts = [self.quantized(torch.from_numpy(image[None]).to(device)) for image in images]
        columns = zip(*parts, strict=True)
        return {name: torch.cat(column).cpu().numpy() for name, column in zip(self._names, columns, strict=True)}

    def put_into(self, program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
        """Put the trained weights into the fused program of the backbone, each as the value that it rounds to.

        Raises:
            CalibrationError: the program is another network's.
        """
        state, constants, trained = program.state_dict, program.constants, self._float_state()
        shapes = {
            name: tensor.shape for name, tensor in [*constants.items(), *state.items()] if hasattr(tensor, "shape")
        }
        unlike = [name for name, tensor in trained.items() if shapes.get(name) != tensor.shape]
        if unlike:
            raise CalibrationError(
                f"the trained network has {', '.join(unlike[:4])} and the backbone that is exported has not: it was "
                "changed after prepare_qat. Fix: export the backbone as it was, or prepare it again."
            )
        for name, tensor in trained.items():
            if name in state:
                state[name] = nn.Parameter(tensor, requires_grad=False)
            else:
                constants[name] = tensor
        return program

    def plan_of(self, model: ir.Model) -> QuantizationPlan:
        """Return the plan for the master graph of a program that `put_into` gave.

        Raises:
            CalibrationError: a layer of the plan is not in it.
        """
        start, layers, found = self.quantized.start, self.quantized.layers, place(model).weights
        if missing := [name for name in start.placement.weights if name not in found]:
            raise CalibrationError(
                f"the nodes {', '.join(missing[:4])} of the plan are not in the exported network. Report it with the "
                "network."
            )
        uses = {
            name: replace(use, weight=found[name].weight, bias=found[name].bias)
            for name, use in start.placement.weights.items()
        }
        digest = weights_digest(self)
        return replace(
            start,
            key=hashlib.sha256(f"{start.key} trained {digest}".encode()).hexdigest(),
            weights_digest=digest,
            constants_digest=constants_digest(model),
            placement=replace(start.placement, weights=uses),
            ranges=start.ranges | {name: quantizer.range() for name, quantizer in self.quantized.quantizers.items()},
            weights={name: _rounded(layer, _constant(model, uses[name].weight)) for name, layer in layers.items()},
            bias_shift={
                name: shift for name, layer in layers.items() if (shift := _shift(layer, uses[name], model)).any()
            },
        )

    def _float_state(self) -> dict[str, Tensor]:
        """Return the parameters of the float network by name; a bias that two layers share stays as it was."""
        held = self.quantized.module.state_dict()
        state = {name: tensor.detach().cpu() for name, tensor in held.items() if not name.startswith(HOLDER)}
        layers = self.quantized.layers.values()
        readers = Counter(layer.bias_name for layer in layers)
        for layer in layers:
            integers, scales = layer.weight.quantized()
            steps = scales.reshape(-1, *[1] * (integers.ndim - 1))
            state[layer.weight_name] = torch.from_numpy(integers.astype(np.float32) * steps)
            if layer.bias is not None and layer.bias_name is not None and readers[layer.bias_name] == 1:
                state[layer.bias_name] = layer.bias.detach().cpu().clone()
        return state


def _constant(model: ir.Model, name: str) -> FloatArray:
    return floats_of(model.graph.initializers[name])


def _rounded(layer: IntegerLayer, weight: FloatArray) -> RoundedWeight:
    integers, scales = layer.weight.quantized()
    if layer.use.axis == 1:
        integers = np.ascontiguousarray(integers.T)
    return RoundedWeight.of(weight, layer.use.axis, integers, scales)


def _shift(layer: IntegerLayer, use: IntegerWeight, model: ir.Model) -> FloatArray:
    """Return what a layer's bias is more than that of the graph."""
    if layer.bias is None:
        return np.zeros(0, np.float32)
    before = np.float32(0) if use.bias is None else _constant(model, use.bias)
    return np.asarray(layer.bias.detach().cpu().numpy() - before, np.float32)
