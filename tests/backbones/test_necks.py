"""Necks by themselves, behind a backbone, and exported with it."""

import numpy as np
import pytest
import torch

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.necks import FeaturePyramid, FeatureSelector, PathAggregation, WithNeck
from deploykit.backbones.registry import build
from deploykit.errors import SpecError
from deploykit.export.to_onnx import to_onnx
from deploykit.export.trace import output_names, trace
from deploykit.onnx_session import onnx_session
from deploykit.parity.metrics import sqnr_db
from deploykit.spec import BatchRange, FeatureLevel, InputSpec
from tests.backbones.realistic import randomize


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    options = BackboneOptions(features_only=True, output_indices=(1, 2, 3, 4))
    return randomize(build("resnet18", options)).eval()


def shapes(features):
    return {name: tuple(feature.shape) for name, feature in features.items()}


def test_selector_picks_and_renames(resnet):
    selector = FeatureSelector(resnet.feature_info, {"stage4": "c5", "stage2": "c3"})
    features = resnet(torch.randn(1, 3, 64, 64))
    picked = selector(features)
    assert selector.feature_info.names() == list(picked) == ["c3", "c5"]
    assert picked["c5"] is features["stage4"]


@pytest.mark.parametrize("names", [["stage9"], [], {"stage1": "a", "stage2": "a"}])
def test_selector_refuses_what_is_not_there(resnet, names):
    with pytest.raises(SpecError):
        FeatureSelector(resnet.feature_info, names)


@pytest.mark.parametrize("size", [(64, 64), (72, 104)])
def test_pyramid_follows_the_paper(resnet, size):
    neck = FeaturePyramid(resnet.feature_info, channels=8)
    features = resnet(torch.randn(1, 3, *size))
    top = neck.lateral[3](features["stage4"])
    height, width = features["stage3"].shape[2:]
    doubled = top.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[:, :, :height, :width]
    merged = neck.lateral[2](features["stage3"]) + doubled
    outputs = neck(features)
    torch.testing.assert_close(outputs["p5"], neck.output[3](top))
    torch.testing.assert_close(outputs["p4"], neck.output[2](merged))


@pytest.mark.parametrize("extra", ["pool", "conv"])
def test_pyramid_levels_describe_its_maps_at_odd_sizes(resnet, extra):
    neck = FeaturePyramid(resnet.feature_info, channels=8, extra_levels=2, extra=extra)
    features = WithNeck(resnet, neck)(torch.randn(1, 3, 72, 104))
    assert shapes(features) == {
        level.name: (1, 8, -(-72 // level.stride), -(-104 // level.stride)) for level in neck.feature_info
    }
    assert neck.feature_info.names() == ["p2", "p3", "p4", "p5", "p6", "p7"]


def test_path_aggregation_carries_the_finest_level_to_the_deepest(resnet):
    neck = PathAggregation(resnet.feature_info, channels=8)
    features = dict(resnet(torch.randn(1, 3, 72, 104)))
    before = neck(features)
    after = neck({**features, "stage1": features["stage1"] + 1})
    assert neck.feature_info.names() == ["n2", "n3", "n4", "n5"]
    assert shapes(before)["n5"] == (1, 8, 3, 4)
    assert not torch.equal(before["n5"], after["n5"])


@pytest.mark.parametrize("neck", [FeaturePyramid, PathAggregation])
def test_receptive_fields_hold_the_inputs_that_a_value_sees(neck):
    torch.manual_seed(0)
    backbone = randomize(build("resnet18", BackboneOptions(features_only=True, output_indices=(1, 2))))
    model = WithNeck(backbone, neck(backbone.feature_info, channels=16)).eval()
    for level in model.feature_info:
        images = torch.randn(1, 3, 320, 320, requires_grad=True)
        feature = model(images)[level.name]
        middle = feature.shape[-1] // 2
        feature[0, :, middle, middle].sum().backward()
        seen = torch.nonzero(images.grad.abs().sum((0, 1, 2))).flatten()
        span = int(seen[-1] - seen[0]) + 1
        assert 0.5 * level.receptive_field <= span <= level.receptive_field, level


def test_neck_over_a_dilated_backbone_keeps_equal_strides():
    backbone = build("resnet18", BackboneOptions(features_only=True, output_indices=(2, 3, 4), output_stride=8))
    model = WithNeck(backbone, FeaturePyramid(backbone.feature_info, channels=8))
    assert set(shapes(model(torch.randn(1, 3, 64, 64))).values()) == {(1, 8, 8, 8)}


@pytest.mark.parametrize("levels", [np.array(["a", "b"]), ["stage1"], (1, 2)], ids=["array", "names", "indices"])
def test_levels_that_are_none_are_refused(levels):
    with pytest.raises(SpecError, match=r"levels is .*; expected a list or tuple of FeatureLevel or a Module or None"):
        FeaturePyramid(levels)


def test_strides_that_do_not_divide_are_refused():
    levels = [
        FeatureLevel(name=f"l{index}", index=index, channels=4, stride=stride, receptive_field=0)
        for index, stride in enumerate((8, 12))
    ]
    with pytest.raises(SpecError, match=r"\[8, 12\]"):
        FeaturePyramid(levels)


def test_backbone_with_neck_trains_and_freezes(resnet):
    model = WithNeck(resnet, FeaturePyramid(resnet.feature_info, channels=8)).train()
    model.freeze("stage4")
    model.train()
    sum(feature.sum() for feature in model(torch.randn(1, 3, 64, 64)).values()).backward()
    assert not resnet.bn1.training
    assert all(parameter.grad is None for parameter in resnet.parameters())
    assert all(parameter.grad is not None for parameter in model.neck.parameters())
    resnet.freeze(None)
    resnet.eval()


def test_a_backbone_with_a_neck_has_no_head_and_checkpoints_as_its_backbone(resnet):
    model = WithNeck(resnet, FeaturePyramid(resnet.feature_info, channels=8))
    with pytest.raises(SpecError, match=r"gives features only\. Call its \.backbone for logits"):
        model.forward_head(torch.zeros(1, 8, 4, 4))
    assert model.stage_modules() == resnet.stage_modules()
    model.set_grad_checkpointing()
    assert (model.grad_checkpointing, resnet.grad_checkpointing) == (True, True)
    model.set_grad_checkpointing(False)
    assert (model.grad_checkpointing, resnet.grad_checkpointing) == (False, False)


def test_an_unknown_kind_of_extra_levels_is_refused_with_the_known_ones(resnet):
    with pytest.raises(SpecError, match=r"extra is 'pol'\. Did you mean 'pool'"):
        FeaturePyramid(resnet.feature_info, extra_levels=1, extra="pol")


def test_a_coarser_map_that_is_too_small_when_doubled_is_stretched():
    """As of a backbone that rounds its sizes down: 7 pixels behind 3."""
    levels = [
        FeatureLevel(name=f"l{index}", index=index, channels=4, stride=stride, receptive_field=0)
        for index, stride in enumerate((8, 16))
    ]
    neck = FeaturePyramid(levels, channels=4)
    fine, coarse = torch.randn(1, 4, 7, 7), torch.randn(1, 4, 3, 3)
    top = neck.lateral[1](coarse)
    places = torch.arange(7) * 3 // 7
    merged = neck.lateral[0](fine) + top[:, :, places][:, :, :, places]
    torch.testing.assert_close(neck({"l0": fine, "l1": coarse})["p1"], neck.output[0](merged))


@pytest.mark.parametrize(
    ("neck", "size"),
    [
        (PathAggregation, (72, 104)),
        *(pytest.param(FeaturePyramid, size, marks=pytest.mark.slow) for size in ((64, 64), (72, 104))),
    ],
)
def test_exports_with_the_backbone_as_one_graph(resnet, neck, size):
    model = WithNeck(resnet, neck(resnet.feature_info, channels=16)).eval()
    spec = InputSpec(batch=BatchRange(), height=size[0], width=size[1])
    graph = to_onnx(trace(model, spec), spec, output_names(model))
    assert not {node.op_type for node in graph.graph} & {"Shape", "Gather", "Range"}
    session = onnx_session(graph)
    for batch in (1, 3):
        images = np.random.default_rng(batch).standard_normal((batch, 3, *size), dtype=np.float32)
        expected = model(images)
        outputs = dict(zip(output_names(model), session.run(None, {"images": images}), strict=True))
        assert list(outputs) == model.feature_info.names()
        assert min(sqnr_db(expected[name], outputs[name]) for name in outputs) >= 100
