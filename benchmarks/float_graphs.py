"""Our FP32 graphs beside timm's: the same architecture exported by torch.onnx.export, in two runtimes.

Timm's is what ``torch.onnx.export(model, images, dynamo=True, optimize=True)`` writes for the timm model of the
same name with our backbone's weights, read by the runtime as it is; ours is the engine that deploykit exports.
Both take one image, give logits at FP32, and run with the same settings; all take turns in one process. The
control is a second session of timm's graph: what it is off 1 by is noise.
"""

from __future__ import annotations

import onnx
from _side_by_side import Comparison, main, stock_graph

from deploykit.backbones.base import BaseBackbone
from deploykit.optional import require

NETWORKS = (
    "resnet50",
    "resnetv2_50",
    "efficientnet_b0",
    "mobilenetv3_large_100",
    "regnety_008",
    "vit_small_patch16_224",
    "vit_small_r26_s32_224",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "mobilevit_s",
    "coatnet_0_rw_224",
)
"""One of each family."""


def timm_graph(name: str, backbone: BaseBackbone) -> onnx.ModelProto:
    """Timm's model of a backbone's name, with its weights."""
    model = require("timm").create_model(name).eval()
    model.load_state_dict(backbone.state_dict())
    return stock_graph(model, backbone.input_spec.height)


if __name__ == "__main__":
    main(Comparison(description=__doc__, networks=NETWORKS, column="timm", baseline=timm_graph))
