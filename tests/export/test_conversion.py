"""Engines of other precisions are held to FP32's conversion first, and errors name the operator at fault."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import affine_grid, grid_sample, interpolate

from deploykit import create_backbone, export_backbone, verify_bundle
from deploykit.errors import ExportError, ParityError
from deploykit.export import conversion
from deploykit.progress import StageStarted

IMAGES = np.random.default_rng(0).normal(size=(24, 3, 32, 32)).astype(np.float32)


class Between(nn.Module):
    """A function of a map, as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, features):
        return self.function(features)


def network(inner) -> nn.Module:
    torch.manual_seed(0)
    inner = inner if isinstance(inner, nn.Module) else Between(inner)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), inner, nn.Conv2d(8, 8, 3)).eval()


def engine(module, runtime, precision):
    settings = {"calibration": IMAGES} if precision == "int8" else {}
    return create_backbone(module, runtime=runtime, precision=precision, image_size=32, cache=False, **settings)


def aligned_nearest(features):
    """What OpenVINO 2026.4 samples elsewhere, and has no equal form."""
    turned = torch.tensor([[[0.9, 0.3, 0.1], [-0.2, 1.1, -0.1]]]).expand(features.shape[0], -1, -1)
    grid = affine_grid(turned, features.shape, align_corners=True)
    return grid_sample(features, grid, mode="nearest", align_corners=True)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_operator_that_the_runtime_converts_wrongly_is_named_at_every_precision(precision):
    pytest.importorskip("openvino", reason="openvino is not installed")
    with pytest.raises(ParityError) as caught:
        engine(network(aligned_nearest), "openvino", precision)
    message = str(caught.value)
    assert "openvino converts GridSample" in message
    assert "aten.grid_sampler" in message
    assert "at '1' (Between)" in message
    assert "expected at least 80" in message
    assert "export at fp32" not in message


FORMS = {
    "windows that hang over": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "circular padding": nn.CircularPad2d((2, 1, 0, 1)),
    "circular convolution": nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    "antialiased by a size": lambda x: interpolate(x, size=(7, 11), mode="bicubic", antialias=True),
    "antialiased by a factor": lambda x: interpolate(x, scale_factor=0.4, mode="bilinear", antialias=True),
    "a divisor": nn.AvgPool2d(3, 2, 1, divisor_override=5),
}


class Branches(nn.Module):
    """Every form between two convolutions of its own."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleDict({name: network(inner) for name, inner in FORMS.items()})

    def forward(self, images):
        return {name: branch(images) for name, branch in self.branches.items()}


@pytest.mark.parametrize(
    ("runtime", "precision"), [("openvino", "fp32"), ("openvino", "int8"), ("onnxruntime", "int8")]
)
def test_an_equal_form_gives_torchs_numbers_up_to_the_border(runtime, precision):
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    module = Branches().eval()
    with torch.no_grad():
        expected = module(torch.from_numpy(IMAGES[:1]))
    found = engine(module, runtime, precision)(IMAGES[:1])
    limit = 1e-8 if precision == "fp32" else 4e-3
    wrong = {}
    for name, features in expected.items():
        for part in (np.s_[...], np.s_[..., -1], np.s_[..., -1, :]):
            right = features.numpy()[part]
            error = np.square(found[name][part] - right).sum() / np.square(right).sum()
            if not error < limit:
                wrong[name] = error
    assert not wrong


def test_what_a_runtime_refuses_is_named():
    pytest.importorskip("openvino", reason="openvino is not installed")

    def transformed(features):
        return torch.fft.rfft2(features, s=(40, 40)).abs()[..., :12, :12]

    with pytest.raises((ExportError, ParityError), match=r"openvino converts DFT"):
        engine(network(transformed), "openvino", "fp32")


def stages_of(module, folder, **options) -> list[str]:
    stages = []

    def note(event):
        if isinstance(event, StageStarted):
            stages.append(event.name)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_backbone(module, folder, image_size=32, progress=note, **options)
    return stages


def test_the_proof_comes_before_the_engine_and_not_for_fp32(tmp_path):
    module = network(nn.ReLU())
    stages = stages_of(module, tmp_path / "int8", runtime="onnxruntime", precision="int8", calibration=IMAGES)
    assert stages.index("plan") < stages.index("conversion") < stages.index("lower")
    assert "conversion" not in stages_of(module, tmp_path / "fp32", runtime="onnxruntime")
    quantized, plain = (verify_bundle(tmp_path / name) for name in ("int8", "fp32"))
    found = quantized.errors()
    assert set(found["conversion"]) == {level.name for level in quantized.levels}
    for level in quantized.levels:
        assert level.conversion_db > 100 > level.sqnr_db
        assert level.quantization_db == pytest.approx(level.sqnr_db, abs=3)  # the same error, on other images
        assert level.runtime_db > level.quantization_db
    assert not any(plain.errors().values())
    text = str(quantized.render().caption)
    for kind in ("the conversion to the runtime", "int8 against fp32 in this runtime", "same graph node by node"):
        assert kind in text


def test_the_proof_is_left_out_where_the_device_is_absent(tmp_path, monkeypatch):
    from deploykit.backends.onnxruntime.adapter import OnnxRuntime

    monkeypatch.setattr(OnnxRuntime, "devices", classmethod(lambda cls: ()))
    stages = stages_of(network(nn.ReLU()), tmp_path / "b", runtime="onnxruntime", precision="fp16")
    assert "conversion" not in stages


def test_a_wrong_fp32_engine_stops_an_int8_export_within_its_own_budget(tmp_path, monkeypatch):
    run = conversion.compare

    def slightly_wrong(expected, found, **settings):
        return run(expected, {name: features * 1.01 for name, features in found.items()}, **settings)

    monkeypatch.setattr(conversion, "compare", slightly_wrong)
    with pytest.raises(ParityError, match=r"otherwise than torch already in fp32, before int8: \w+: 40\.0 dB"):
        engine(network(nn.ReLU()), "onnxruntime", "int8")
