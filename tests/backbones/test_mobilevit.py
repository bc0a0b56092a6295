"""MobileViT and MobileViTv2 against timm, and as graphs."""

from dataclasses import replace

import pytest
import torch

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.mobilevit import VARIANTS, MobileViT
from tests.backbones import against_timm, transformers

OPS = {
    "Add", "MatMul", "Mul", "Conv", "Sigmoid", "Transpose", "Reshape", "LayerNormalization", "GroupNormalization",
    "Split", "Softmax", "Concat", "ReduceSum", "ReduceMean", "Relu", "Gemm",
}  # fmt: skip


class Shallow(MobileViT):
    """The same variants with one transformer block in each stage."""

    variants = {name: replace(variant, depths=(1, 1, 1)) for name, variant in VARIANTS.items()}  # noqa: RUF012


@pytest.mark.parametrize("size", [(64, 128), (72, 104)], ids=["even", "odd"])
@pytest.mark.parametrize("name", VARIANTS)
def test_everything_is_timms(timm, name, size):
    transformers.assert_equals_timm(timm, MobileViT, name, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_everything_is_timms_at_the_native_size(timm, name):
    transformers.assert_equals_timm(timm, MobileViT, name)


def test_default_weights_and_preprocessing_are_timms(timm):
    against_timm.assert_sources_are_timms(timm, MobileViT)


def test_receptive_fields_of_the_convolutional_levels_are_the_measured_ones():
    model = transformers.build(MobileViT, "mobilevit_s", features_only=True)
    stated = [level.receptive_field for level in model.all_levels]
    assert stated[2:] == [0, 0, 0]
    assert stated[:2] == [against_timm.measured_receptive_field(model, level, side=96) for level in range(2)]


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_survive_checkpointing(name):
    transformers.assert_gradients_survive_checkpointing(Shallow, name, image_size=(64, 64), num_classes=10)


def test_a_shallow_level_does_not_run_the_deep_stages():
    model = MobileViT("mobilevit_s", BackboneOptions(features_only=True, output_indices=(1,))).eval()
    model.stages[2].register_forward_hook(lambda *_: pytest.fail("stage2 ran"))
    assert list(model(torch.randn(1, 3, 64, 64))) == ["stage1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_exports_with_a_dynamic_batch(tmp_path, name):
    model = transformers.build(Shallow, name, image_size=(64, 128))
    transformers.assert_exports(model, tmp_path / "mobilevit.onnx", OPS)
