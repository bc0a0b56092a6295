"""The seed's contract: subclasses that define forward alone, selectors and pyramids around any backbone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from deploykit import (
    BaseBackbone,
    FeatureCache,
    FeaturePyramid,
    Features,
    FeatureSelector,
    WithNeck,
    build_fpn,
    create_backbone,
)
from deploykit.backbones.registry import ALIASES, resolve_name
from deploykit.errors import SpecError, UnknownLevel
from deploykit.spec import Preprocessing


class Own(BaseBackbone):
    """Three convolutions of stride 4, 2 and 2, and whatever ``give`` makes of their maps."""

    def __init__(self, give):
        super().__init__()
        self.build_backbone({"width": 4, "give": give})

    def build_backbone(self, config):
        width = config["width"]
        self.convs = nn.ModuleList(
            nn.Conv2d(3 if stride == 4 else width, width, 3, stride=stride, padding=1) for stride in (4, 2, 2)
        )
        self.give = config["give"]

    def forward(self, x):
        maps = []
        for conv in self.convs:
            x = conv(x)
            maps.append(x)
        return self.give(maps)


def by_name(maps):
    return dict(zip(("a", "b", "c"), maps, strict=True))


IMAGES = torch.rand(2, 3, 32, 32)


@pytest.fixture(scope="module")
def resnet():
    return create_backbone("resnet18", features_only=True, output_indices=(1, 2, 3), image_size=32)


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "a", "b")])
def test_a_dict_of_maps_takes_the_index_of_each_stride(order):
    own = Own(lambda maps: {name: by_name(maps)[name] for name in order}).eval()
    features = own(IMAGES)
    assert list(features) == list(order)
    assert [features[index] is features[name] for index, name in ((1, "a"), (2, "b"), (3, "c"))] == [True] * 3
    with pytest.raises(UnknownLevel):
        features[0]


def test_other_answers_stay_what_forward_returns():
    assert isinstance(Own(list)(IMAGES), list)
    assert isinstance(Own(tuple)(IMAGES), tuple)
    assert Own(lambda maps: maps[-1].mean((2, 3)))(IMAGES).shape == (2, 4)
    assert Own(lambda maps: None)(IMAGES) is None
    assert type(Own(lambda maps: {"a": maps[0], "pooled": maps[0].mean((2, 3))})(IMAGES)) is dict


@pytest.mark.parametrize("give", [by_name, list, lambda maps: maps[0], lambda maps: {"x": {"y": maps[0]}}])
def test_numpy_in_gives_numpy_out(give):
    own = Own(give).eval()
    images = IMAGES.numpy()
    before = images.copy()
    flat, expected = own(images), own(IMAGES)
    while not isinstance(expected, torch.Tensor):
        first = next(iter(expected)) if isinstance(expected, dict) else 0
        flat, expected = flat[first], expected[first]
    np.testing.assert_allclose(flat, expected.detach().numpy(), rtol=1e-6)
    np.testing.assert_array_equal(images, before)


def test_the_subclass_itself_is_complete_with_nothing_in_it():
    class Empty(BaseBackbone):
        def __init__(self, config):
            super().__init__()
            self.build_backbone(config)

        def build_backbone(self, config):
            pass

        def forward(self, x):
            pass

    empty = Empty({})
    assert empty(IMAGES) is None
    assert not empty.is_described
    with pytest.raises(SpecError, match="empty"):
        create_backbone(empty)


def test_what_a_subclass_lacks_is_named():
    class NoBuild(BaseBackbone):
        def __init__(self):
            super().__init__()
            self.build_backbone({})

    class NoForward(BaseBackbone):
        pass

    with pytest.raises(SpecError, match=r"NoBuild has no build_backbone\(config\)"):
        NoBuild()
    with pytest.raises(SpecError, match=r"noforward defines no forward\(images\)"):
        NoForward()(IMAGES)


@pytest.mark.parametrize("images", ["photo.jpg", None, [1, 2], np.array(["a"])])
def test_what_is_no_image_is_a_spec_error(images):
    with pytest.raises(SpecError, match="expected a numpy"):
        Own(list)(images)


def test_it_becomes_a_backbone_with_levels():
    backbone = create_backbone(Own(by_name), image_size=32, preprocessing=Preprocessing(crop_pct=0.5))
    assert backbone.is_described
    assert [(level.index, level.name, level.stride) for level in backbone.feature_info] == [
        (1, "a", 4),
        (2, "b", 8),
        (3, "c", 16),
    ]
    assert backbone.input_spec.preprocessing.crop_pct == 0.5
    assert type(backbone(IMAGES)) is Features
    labelled = create_backbone(Own(lambda maps: maps[-1].mean((2, 3))), image_size=32, labels=["w", "x", "y", "z"])
    assert (labelled.spec.num_classes, labelled.labels) == (4, ("w", "x", "y", "z"))


def test_it_stands_wherever_a_backbone_does():
    own = Own(by_name).eval()
    assert [tuple(feature.shape) for feature in FeatureSelector(own, (1, 3))(IMAGES)] == [(2, 4, 8, 8), (2, 4, 2, 2)]
    assert list(FeaturePyramid(own, 8)(IMAGES)) == ["p2", "p3", "p4"]
    images = torch.rand(1, 3, 224, 224)
    cached = FeatureCache(own)
    assert torch.equal(cached(images)[2], cached(images)["b"])
    assert cached.hits == 1
    joined = WithNeck(own, build_fpn(8)).eval()
    assert joined.feature_info.names() == list(joined(images)) == ["p2", "p3", "p4"]


# Selectors.


def test_a_selector_gives_a_list_in_the_order_of_the_indices(resnet):
    features = resnet(IMAGES)
    selected = FeatureSelector(resnet, output_indices=[3, 1, 3])(IMAGES)
    assert isinstance(selected, list)
    assert all(torch.equal(one, features[index]) for one, index in zip(selected, (3, 1, 3), strict=True))
    assert FeatureSelector(backbone=resnet, output_indices=(2,)).feature_info.names() == ["stage2"]


@pytest.mark.parametrize("kind", [FeatureSelector, FeaturePyramid])
def test_a_backbone_that_gives_logits_is_refused(kind):
    with pytest.raises(SpecError, match="gives logits, not feature maps"):
        kind(create_backbone("resnet18", image_size=32), (1,) if kind is FeatureSelector else 8)


@pytest.mark.parametrize("indices", [(0,), (4, 1), ()])
def test_a_selector_refuses_levels_that_the_backbone_lacks(resnet, indices):
    with pytest.raises(SpecError, match=r"to select; the backbone gives 1 \(stage1, stride 4\)"):
        FeatureSelector(resnet, indices)


def test_a_selector_needs_a_backbone_and_indices(resnet):
    with pytest.raises(SpecError, match="too little"):
        FeatureSelector(resnet)
    with pytest.raises(SpecError, match="too little"):
        FeatureSelector(output_indices=(1,))


# Pyramids.


def test_a_pyramid_around_a_backbone_is_the_neck_on_its_features(resnet):
    torch.manual_seed(0)
    around = FeaturePyramid(resnet, 8)
    neck = FeaturePyramid(resnet.feature_info, 8)
    neck.load_state_dict({name: value for name, value in around.state_dict().items() if "backbone" not in name})
    expected, found = neck(resnet(IMAGES)), around(IMAGES)
    assert list(found) == ["p2", "p3", "p4"]
    assert found[1] is found["p2"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert around.feature_info == neck.feature_info


@pytest.mark.parametrize("size", [(32, 32), (36, 52)])
@pytest.mark.parametrize("extra", [0, 1])
def test_a_pyramid_built_from_its_first_maps_equals_one_built_from_levels(resnet, size, extra):
    features = resnet(torch.rand(1, 3, *size))
    lazy = build_fpn(8, extra_levels=extra)
    assert (lazy.is_built, len(list(lazy.parameters()))) == (False, 0)
    lazy(features)
    neck = FeaturePyramid(resnet.feature_info, fpn_channels=8, extra_levels=extra)
    neck.load_state_dict(lazy.state_dict())
    assert lazy.factors == neck.factors
    expected, found = neck(features), lazy(features)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("give", [list, tuple])
def test_a_pyramid_takes_a_list_of_maps(give):
    pyramid = build_fpn(8)
    outputs = pyramid(Own(give)(IMAGES))
    assert {name: tuple(output.shape[2:]) for name, output in outputs.items()} == {
        "p2": (8, 8),
        "p3": (4, 4),
        "p4": (2, 2),
    }
    assert pyramid(Own(give)(torch.rand(1, 3, 40, 24)))["p2"].shape == (1, 8, 10, 6)


@pytest.mark.parametrize("channels", [0, -1, "256", 2.5])
def test_channels_that_cannot_be_are_refused(channels):
    with pytest.raises(SpecError, match="channels"):
        build_fpn(channels)


@pytest.mark.parametrize("maps", [{}, {"a": torch.ones(1, 2)}, []])
def test_a_pyramid_of_no_maps_is_refused(maps):
    with pytest.raises(SpecError, match="expected maps"):
        build_fpn(8)(maps)


def test_a_pyramid_is_not_made_inside_a_trace(resnet):
    with pytest.raises(Exception, match="Run it once before it is compiled"):
        torch.export.export(nn.Sequential(resnet, build_fpn(8)), (IMAGES,), strict=False)


def test_a_module_around_a_backbone_takes_its_images():
    how = Preprocessing(mean=(0.1,) * 3, std=(0.2,) * 3)
    inner = create_backbone("resnet18", features_only=True, output_indices=(2, 3), image_size=64, preprocessing=how)

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = inner
            self.fpn = build_fpn(8)

        def forward(self, x):
            return self.fpn(self.backbone(x))

    detector = Detector()
    backbone = create_backbone(detector)
    assert detector.fpn.is_built
    assert backbone.input_spec.preprocessing == how
    assert (backbone.spec.image_size, backbone.feature_info.names()) == ((64, 64), ["p3", "p4"])
    other = create_backbone(detector, image_size=96, preprocessing={"crop_pct": 0.5})
    assert other.spec.image_size == (96, 96)
    assert other.input_spec.preprocessing == Preprocessing(mean=(0.1,) * 3, std=(0.2,) * 3, crop_pct=0.5)


def test_a_neck_with_a_backbone_is_no_neck_of_another(resnet):
    with pytest.raises(SpecError, match="holds a backbone already"):
        WithNeck(resnet, FeaturePyramid(resnet, 8))


# Names and implications.


def test_hierarchical_implies_features_unless_logits_are_asked_for():
    pyramid = create_backbone("vit", patch_size=16, hierarchical=True, image_size=32)
    assert pyramid.spec.features_only
    assert pyramid.feature_info.reduction() == [4, 8, 16, 32]
    logits = create_backbone("vit", hierarchical=True, features_only=False, image_size=32)
    assert not logits.spec.features_only


@pytest.mark.parametrize(
    ("alias", "family"),
    [
        ("vision_transformer", "vit"),
        ("swin_transformer", "swin"),
        ("mobile_net", "mobilenet"),
        ("efficient", "efficientnet"),
        ("efficient_net", "efficientnet"),
    ],
)
def test_the_names_of_the_design_document_are_known(alias, family):
    assert resolve_name(alias) == resolve_name(family)
    assert set(ALIASES.values()) <= set(map(resolve_name, ALIASES.values()))
