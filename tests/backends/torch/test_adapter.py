from __future__ import annotations

import numpy as np
import pytest
import torch

from deploykit import create_backbone
from deploykit.backends.torch.adapter import PixelBackbone
from deploykit.errors import SpecError
from deploykit.images.preprocess import normalize
from deploykit.spec import Bf16
from tests.small_resnet import SMALL

OPTIONS = {"image_size": 64, "features_only": True, "output_indices": (1, 3)}


@pytest.fixture(scope="module")
def model() -> PixelBackbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = create_backbone(SMALL, embed_preprocessing=True, **OPTIONS)
    assert isinstance(made, PixelBackbone)
    return made.eval()


def pixels(height: int = 64, width: int = 64, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def test_pixels_give_the_features_of_normalised_images(model):
    given = pixels()
    given.flags.writeable = False
    expected = model.backbone(normalize(given, model.input_spec.preprocessing))
    found = model(given)
    assert list(found) == list(expected) == ["stage1", "stage3"]
    for name, feature in found.items():
        assert isinstance(feature, np.ndarray)
        np.testing.assert_allclose(feature, expected[name], rtol=1e-4, atol=1e-4)


def test_torch_in_gives_torch_out_with_gradients_of_the_weights(model):
    features = model(torch.from_numpy(pixels()))
    features["stage3"].sum().backward()
    assert model.backbone.conv1.weight.grad is not None
    np.testing.assert_allclose(features["stage1"].detach().numpy(), model(pixels())["stage1"], rtol=1e-4, atol=1e-4)


def test_it_has_the_interface_of_every_model(model):
    assert (model.input_spec.dtype, model.input_spec.layout) == ("uint8", "NHWC")
    assert model.feature_info.names() == ["stage1", "stage3"]
    assert (model.runtime, model.device, model.precision.name) == ("torch", "cpu", "fp32")
    with model as entered:
        assert entered is model


def test_a_family_that_takes_any_size_takes_it_here_too(model):
    assert model(pixels(96, 128))["stage1"].shape == (2, 16, 24, 32)
    fixed = create_backbone("vit_tiny_patch16_224", image_size=32, embed_preprocessing=True).eval()
    assert fixed(pixels(32, 32)).shape == (2, 1000)
    with pytest.raises(SpecError, match=r"\(2, 64, 64, 3\); expected .*32, 32, 3\) uint8 NHWC"):
        fixed(pixels())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pixels().astype(np.float32), "without mean and std"),
        (pixels().transpose(0, 3, 1, 2), "look like NCHW"),
        (torch.from_numpy(pixels()).float(), r"torch\.uint8"),
        (torch.from_numpy(pixels()).permute(0, 3, 1, 2), "look like NCHW"),
        ("cat.jpg", "load_images"),
    ],
    ids=["float array", "NCHW array", "float tensor", "NCHW tensor", "path"],
)
def test_what_is_no_pixels_is_named(model, images, message):
    with pytest.raises(SpecError, match=message):
        model(images)


def test_half_precision_keeps_float32_outputs():
    model = create_backbone(SMALL, precision="bf16", embed_preprocessing=True, **OPTIONS).eval()
    assert model.precision == Bf16()
    assert model(pixels())["stage3"].dtype == np.float32
    assert model(torch.from_numpy(pixels()))["stage3"].dtype == torch.float32


def test_a_module_of_the_users_own_keeps_its_type_when_another_is_asked_for():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2, 1), torch.nn.BatchNorm2d(4)).half()
    with create_backbone(module, image_size=16) as model:
        assert next(model.parameters()).dtype == torch.float32
    with create_backbone(module.float(), image_size=16, precision="bf16") as model:
        assert next(model.parameters()).dtype == torch.bfloat16
    assert module[0].weight.dtype == module[1].running_mean.dtype == torch.float32
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_module_that_writes_into_its_input_leaves_the_callers(as_tensor):
    class InPlace(torch.nn.Conv2d):
        def forward(self, images):
            return super().forward(images.sub_(0.5).mul_(2))

    images = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    given = torch.from_numpy(images.copy()) if as_tensor else images.copy()
    model = create_backbone(InPlace(3, 4, 1), image_size=16)
    with torch.no_grad():
        once, again = (np.asarray(model(given)["stem"]) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    np.testing.assert_array_equal(np.asarray(given), images)
