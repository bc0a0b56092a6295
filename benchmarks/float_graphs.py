"""Our FP32 graphs beside timm's: the same architecture exported by torch.onnx.export, in two runtimes.

Columns are timm's model through torch.onnx.export (opset 21, any batch, traced from two images), the same
timm model through deploykit (``timm/NAME``), and deploykit's own backbone. Batch 1, random weights,
logits; all three take turns in one process, and the figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import warnings

import numpy as np
import onnx
import torch
from _from_tests import declare_torchvision_operators
from _timing import RUNTIMES, alternate
from fusion import engine_graph

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.custom import build_timm
from deploykit.backbones.registry import build_backbone
from deploykit.export.to_onnx import OPSET

MODELS = (
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


def stock_graph(name: str, side: int) -> onnx.ModelProto:
    """Timm's model as torch.onnx.export gives it."""
    import timm

    model = timm.create_model(name).eval()
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            model,
            (torch.randn(2, 3, side, side),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def main() -> None:
    """Print a row a backbone and runtime, then the geometric means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help="backbones (default: one of each family)")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds (default: %(default)s)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    library = declare_torchvision_operators()
    ratios: dict[tuple[str, str], list[float]] = {}
    heads = ("timm ms", "timm/ ms", "ours ms", "timm/ : timm", "ours : timm")
    print(f"{'backbone':<30} {'runtime':<12}" + "".join(f"{head:>14}" for head in heads))
    for name in options.models:
        backbones = {
            "through": build_timm(name, BackboneOptions()).eval(),
            "ours": build_backbone(name, BackboneOptions()).eval(),
        }
        side = backbones["ours"].input_spec.height
        images = np.random.default_rng(1).normal(size=(1, 3, side, side)).astype(np.float32)
        stock = stock_graph(name, side)
        for runtime, open_graph in RUNTIMES.items():
            calls = {"stock": open_graph(stock)}
            for column, backbone in backbones.items():
                calls[column] = open_graph(engine_graph(backbone, runtime, fused=True))
            found = alternate(calls, images, options.rounds)
            row = "".join(f"{found[column]:14.2f}" for column in ("stock", "through", "ours"))
            for column in ("through", "ours"):
                ratio = found[column] / found["stock"]
                ratios.setdefault((runtime, column), []).append(ratio)
                row += f"{ratio:14.3f}"
            print(f"{name:<30} {runtime:<12}{row}", flush=True)
    for runtime in RUNTIMES:
        means = "".join(f"{statistics.geometric_mean(ratios[runtime, column]):14.3f}" for column in ("through", "ours"))
        print(f"{'geometric mean':<30} {runtime:<12}{'':42}{means}")
    del library


if __name__ == "__main__":
    main()
