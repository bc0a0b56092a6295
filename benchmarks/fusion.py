"""What deploykit's rewrites gain: a backbone's engine beside the plain export of the same backbone.

Unfused is what ``torch.onnx.export(backbone, images, dynamo=True, optimize=True)`` writes, with torch's own
translations and onnxscript's optimizer, read by the runtime as it is. Fused is the engine that deploykit
exports: its passes over the traced program, its ONNX translations of attention, linear layers and norms,
the passes of the runtime, and its lowering. Both have the same weights, take one image, give logits at
FP32, and run with the same settings; ONNX Runtime and OpenVINO run all of their own passes on both. All
take turns in one process. The control is a second session of the unfused graph: what it is off 1 by is noise.
"""

from __future__ import annotations

from _side_by_side import Comparison, main, stock_graph

NETWORKS = (
    "resnet50",
    "efficientnet_b0",
    "mobilenetv3_large_100",
    "regnety_008",
    "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "vit_small_r26_s32_224",
)

if __name__ == "__main__":
    main(
        Comparison(
            description=__doc__,
            networks=NETWORKS,
            column="unfused",
            baseline=lambda _, backbone: stock_graph(backbone, backbone.input_spec.height),
        )
    )
