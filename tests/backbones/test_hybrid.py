"""ViTs on a ResNetV2 stem against timm, and as graphs whose filters are constants."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.hybrid import VARIANTS, HybridViT, StandardisedConv
from deploykit.errors import SpecError
from tests.backbones import against_timm, transformers
from tests.backbones.realistic import randomize
from tests.backbones.test_vit import TRANSFORMER_OPS

SMALL = "vit_small_r26_s32_224"
HYBRID_OPS = TRANSFORMER_OPS | {"InstanceNormalization", "BatchNormalization", "Relu", "MaxPool"}

COMPILE_AND_RUN = """
import sys

import numpy as np
import openvino

graph, images, batch, outputs = sys.argv[1:]
core = openvino.Core()
model = core.read_model(graph)
if batch == "static":
    model.reshape(list(np.load(images).shape))
compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
np.save(outputs, compiled([np.load(images)])[0])
"""


class Shallow(HybridViT):
    """The same stems with three transformer blocks."""

    variants = {name: replace(variant, depth=3) for name, variant in VARIANTS.items()}  # noqa: RUF012


def test_three_blocks_are_timms(timm):
    transformers.assert_equals_timm(timm, Shallow, SMALL, (96, 160), depth=3)


def test_logits_are_timms_at_a_size_that_no_stride_divides(timm):
    reference = randomize(timm.create_model(SMALL, depth=3, img_size=(72, 101))).eval()
    model = transformers.build(Shallow, SMALL, reference.state_dict(), image_size=(72, 101))
    images = torch.randn(1, 3, 72, 101)
    with torch.no_grad():
        against_timm.assert_close(model(images), reference(images))


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, (96, 160)], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_everything_is_timms(timm, name, size):
    transformers.assert_equals_timm(timm, HybridViT, name, size)


def test_default_weights_and_preprocessing_are_timms(timm):
    against_timm.assert_sources_are_timms(timm, HybridViT)


def test_a_native_checkpoint_is_resampled_for_another_size():
    weights = Shallow(SMALL, BackboneOptions()).state_dict()
    model = Shallow(SMALL, BackboneOptions(image_size=(96, 160))).eval()
    model.load_state_dict(model.adapt_state_dict(weights), strict=True)
    assert model.pos_embed.shape == (1, 1 + 3 * 5, 384)


@pytest.mark.parametrize("options", [{"patch_size": 8}, {"hierarchical": True}], ids=str)
def test_options_of_a_plain_vit_are_refused(options):
    with pytest.raises(SpecError, match="plain ViT"):
        HybridViT(SMALL, BackboneOptions(**options))


def test_gradients_reach_the_filters_and_survive_checkpointing():
    transformers.assert_gradients_survive_checkpointing(Shallow, SMALL, image_size=(64, 64), num_classes=10)


def test_the_graphs_filters_follow_the_weights():
    conv = StandardisedConv(3, 8, 3).eval()
    conv.load_state_dict({"weight": torch.randn(8, 3, 3, 3)})
    filters = conv.get_buffer("filters")
    assert torch.equal(filters, conv.graph_constants()["filters"])
    torch.testing.assert_close(filters.mean((1, 2, 3)), torch.zeros(8), atol=1e-6, rtol=0)
    torch.testing.assert_close(filters.var((1, 2, 3), correction=0), torch.ones(8), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_exports_with_a_dynamic_batch(tmp_path):
    model = transformers.build(Shallow, SMALL, image_size=(64, 96))
    transformers.assert_exports(model, tmp_path / "hybrid.onnx", HYBRID_OPS)


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["static", "dynamic"])
@pytest.mark.parametrize("name", [SMALL, "vit_base_r50_s16_224"])
def test_openvino_compiles_all_norms_of_a_stem(tmp_path, name, batch):
    model = transformers.build(Shallow, name, num_classes=10)
    graph, images, outputs = (tmp_path / file for file in ("hybrid.onnx", "images.npy", "outputs.npy"))
    transformers.exported(model, graph, everything=False)
    np.save(images, np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32))
    # In a process of its own: OpenVINO that crashes would end the whole run of the tests.
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_AND_RUN, str(graph), str(images), batch, str(outputs)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"OpenVINO ended with {done.returncode}: {done.stderr[-500:]}"
    with torch.no_grad():
        expected = model(torch.from_numpy(np.load(images)))
    assert against_timm.sqnr_db(torch.from_numpy(np.load(outputs)), expected) >= 90
