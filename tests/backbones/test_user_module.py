"""Modules of a user's own behind the interface of a backbone."""

import pytest
import torch
from torch import nn

from deploykit import create_backbone
from deploykit.backbones.necks import FeaturePyramid
from deploykit.backbones.user_module import wrap_module
from deploykit.errors import BundleError, SpecError

PYRAMID = [(0, "stem", 2), (1, "stage1", 4), (2, "stage2", 8), (3, "stage3", 16), (4, "stage4", 32)]


def indices_names_strides(backbone):
    return [(level.index, level.name, level.stride) for level in backbone.feature_info]


class Tiny(nn.Module):
    """Three convolutions of stride 2 and whatever ``give`` makes of their maps."""

    def __init__(self, give):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, 4, 3, stride=2, padding=1) for width in (1, 4, 4))
        self.give = give

    def forward(self, images):
        maps = []
        for conv in self.convs:
            images = conv(images)
            maps.append(images)
        return self.give(maps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_outputs_of_another_type_are_float32_as_those_of_an_engine(dtype):
    images = torch.randn(2, 1, 32, 32)
    backbone = wrap_module(Tiny(lambda maps: maps[-1].mean((2, 3)).to(dtype)), 32, in_channels=1)
    assert backbone(images).dtype == backbone.forward_everything(images)["logits"].dtype == torch.float32
    engine = create_backbone(backbone, runtime="onnxruntime", cache=False)
    torch.testing.assert_close(engine(images[:1]), backbone(images[:1]), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (nn.Conv2d, {}, SpecError, r"Conv2d is a class; .* Fix: give Conv2d\(\.\.\.\)"),
        ("runs/best.pth", {}, BundleError, r"name of a checkpoint; .*pretrained='runs/best\.pth'"),
        ("model.safetensors", {}, BundleError, "name of a checkpoint"),
        (
            Tiny(lambda maps: maps[-1].mean((2, 3))),
            {"output_indices": (1,), "in_channels": 1, "image_size": 32},
            SpecError,
            r"no levels \[1\]\. It gives no feature maps",
        ),
    ],
)
def test_what_is_given_in_place_of_a_module_is_named(name, options, error, message):
    with pytest.raises(error, match=message):
        create_backbone(name, **options)


def test_module_with_logits_is_a_classifier():
    backbone = wrap_module(Tiny(lambda maps: maps[-1].mean((2, 3))), 32, in_channels=1, name="mine")
    images = torch.randn(2, 1, 32, 32)
    assert (backbone.name, backbone.spec.num_classes, backbone.spec.output_names) == ("mine", 4, ("logits",))
    assert torch.equal(backbone(images), backbone.module(images))
    assert list(backbone.forward_everything(images)) == ["logits"]


@pytest.mark.parametrize("give", [list, tuple, lambda maps: list(reversed(maps))])
def test_module_with_maps_is_a_pyramid_by_stride(give):
    backbone = wrap_module(Tiny(give), (32, 64), in_channels=1)
    features = backbone(torch.randn(2, 1, 32, 64))
    assert indices_names_strides(backbone) == PYRAMID[:3]
    assert [tuple(feature.shape) for feature in features.values()] == [(2, 4, 16, 32), (2, 4, 8, 16), (2, 4, 4, 8)]


def test_module_with_a_dict_keeps_its_names_and_selects_levels():
    backbone = wrap_module(
        Tiny(lambda maps: {"deep": maps[2], "flat": maps[0]}), 32, in_channels=1, output_indices=(2,)
    )
    assert [level.name for level in backbone.all_levels] == ["flat", "deep"]
    assert list(backbone(torch.zeros(1, 1, 32, 32))) == ["deep"]


@pytest.mark.parametrize(
    ("give", "size", "message"),
    [
        (lambda maps: (maps[0], maps[0].mean((2, 3))), 32, "expected one"),
        (lambda maps: "text", 32, "expected one"),
        (lambda maps: [], 32, "expected one"),
        (lambda maps: maps[0].reshape(1, 7, -1), 32, "fails on images"),
    ],
)
def test_module_that_gives_something_else_is_refused(give, size, message):
    with pytest.raises(SpecError, match=message):
        wrap_module(Tiny(give), size, in_channels=1)


def test_module_is_probed_in_eval_mode_and_left_as_it_was_when_refused():
    module = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Flatten(0))
    module[1].eval()
    with pytest.raises(SpecError):
        wrap_module(module, 8)
    assert [part.training for part in module] == [True, False, True]
    assert int(module[1].num_batches_tracked) == 0


def test_a_pyramid_has_no_head_and_freezes_in_one_piece():
    backbone = wrap_module(Tiny(list), 32, in_channels=1)
    with pytest.raises(SpecError, match=r"tiny gives feature maps and has no head\. Wrap a module that ends in"):
        backbone.forward_head(torch.zeros(1, 4))
    assert list(backbone.stage_modules().values()) == [(), (), (backbone.module,)]
    backbone.freeze("stage1")
    assert all(parameter.requires_grad for parameter in backbone.parameters()), "the module goes with its last level"
    backbone.freeze("stage2")
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert wrap_module(backbone, 64) is backbone


def test_a_module_that_takes_one_image_at_a_time_is_taken():
    def one(maps):
        assert len(maps[0]) == 1, "one image at a time"
        return maps[-1].mean((2, 3))

    backbone = wrap_module(Tiny(one), 32, in_channels=1)
    assert backbone(torch.zeros(1, 1, 32, 32)).shape == (1, 4)


def test_a_module_that_fails_while_its_pyramid_is_made_is_named():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.neck = nn.Conv2d(1, 4, 3), FeaturePyramid(fpn_channels=4)

        def forward(self, images):
            return self.neck({"only": self.conv(images)}["absent"])

    with pytest.raises(SpecError, match=r"Detector fails on images \(1, 3, 32, 32\) \(RuntimeError\)\. Check image"):
        create_backbone(Detector(), image_size=32)


def test_options_of_named_backbones_are_refused_beside_a_module():
    with pytest.raises(SpecError, match=r"comes with its weights and its head; .* and got num_classes too"):
        create_backbone(Tiny(list), in_channels=1, num_classes=10)
