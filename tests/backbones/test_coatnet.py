"""CoAtNet against timm, and as a graph whose position biases are constants."""

from dataclasses import replace

import pytest
import torch

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.coatnet import VARIANTS, CoAtNet
from deploykit.backbones.relative_position import resize_table
from deploykit.errors import SpecError
from tests.backbones import against_timm, transformers

NAME = "coatnet_0_rw_224"
OPS = {
    "Add", "MatMul", "Mul", "Conv", "Sigmoid", "Transpose", "Reshape", "LayerNormalization", "BatchNormalization",
    "Split", "Softmax", "ReduceMean", "Relu", "Gemm", "Gelu", "AveragePool",
}  # fmt: skip


class Shallow(CoAtNet):
    """One block of each kind and stride."""

    variants = {NAME: replace(VARIANTS[NAME], depths=(1, 1, 2, 1))}  # noqa: RUF012


def test_shallow_stages_are_timms(timm):
    transformers.assert_equals_timm(timm, Shallow, NAME, (96, 160), depths=(1, 1, 2, 1))


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, (96, 160)], ids=str)
def test_everything_is_timms(timm, size):
    transformers.assert_equals_timm(timm, CoAtNet, NAME, size)


def test_default_weights_and_preprocessing_are_timms(timm):
    against_timm.assert_sources_are_timms(timm, CoAtNet)


# timm's own interpolation warns.
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning", "ignore:torch.searchsorted:UserWarning")
@pytest.mark.parametrize("size", [(14, 14), (4, 9), (20, 5)], ids=str)
def test_position_biases_are_resampled_as_timm_does(timm, size):
    from timm.layers import resize_rel_pos_bias_table

    table = torch.randn(13 * 13, 3)
    rows = (2 * size[0] - 1) * (2 * size[1] - 1)
    expected = resize_rel_pos_bias_table(table, new_window_size=size, new_bias_shape=(rows, 3))
    torch.testing.assert_close(resize_table(table, size), expected, rtol=1e-4, atol=1e-5)


def test_a_native_checkpoint_loads_at_another_size():
    weights = Shallow(NAME, BackboneOptions()).state_dict()
    model = Shallow(NAME, BackboneOptions(image_size=(96, 160)))
    model.load_state_dict(model.adapt_state_dict(weights), strict=True)


def test_a_size_that_is_no_multiple_of_32_is_refused():
    with pytest.raises(SpecError, match=r"\(96, 160\)"):
        CoAtNet(NAME, BackboneOptions(image_size=(100, 160)))


def test_gradients_survive_checkpointing():
    transformers.assert_gradients_survive_checkpointing(Shallow, NAME, image_size=(64, 64), num_classes=10)


@pytest.mark.slow
def test_exports_with_a_dynamic_batch(tmp_path):
    model = transformers.build(Shallow, NAME, image_size=(64, 96))
    transformers.assert_exports(model, tmp_path / "coatnet.onnx", OPS)
