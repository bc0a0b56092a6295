"""Features: a dict by level name that takes indices, through copies, pickles, compilers and exports."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from deploykit import Features, create_backbone
from deploykit.errors import SpecError, UnknownLevel
from tests.small_resnet import SMALL

INDICES = {2: "stage2", 3: "stage3", 4: "stage4"}


@pytest.fixture
def features() -> Features[np.ndarray]:
    return Features({"stage2": np.zeros(2), "stage4": np.ones(1)}, INDICES)


@pytest.fixture(scope="module")
def backbone():
    return create_backbone(SMALL, features_only=True, output_indices=(2, 4), image_size=32)


def test_a_level_is_found_by_name_and_by_index(features):
    assert features[2] is features["stage2"]
    assert features[np.int64(4)] is features["stage4"]
    assert features.get(4) is features["stage4"]
    assert (2 in features, "stage2" in features, 3 in features, "2" in features) == (True, True, False, False)


def test_it_stays_a_dict_of_names(features):
    assert isinstance(features, dict)
    assert list(features) == ["stage2", "stage4"]
    assert dict(**features).keys() == {"stage2", "stage4"}
    assert len(features) == 2
    assert features == {"stage2": features[2], "stage4": features[4]}


@pytest.mark.parametrize("key", [0, 3, -1, "stage3", None, 2.5])
def test_an_absent_level_lists_those_that_are_there(features, key):
    with pytest.raises(UnknownLevel, match=r"there are 2 \(stage2\), 4 \(stage4\)"):
        features[key]
    with pytest.raises(KeyError):
        features[key]
    with pytest.raises(SpecError):
        features[key]
    assert features.get(key) is None
    assert features.get(key, 7) == 7


@pytest.mark.parametrize(
    "change",
    [copy.copy, copy.deepcopy, Features.copy, lambda given: pickle.loads(pickle.dumps(given))],  # noqa: S301
    ids=["copy", "deepcopy", "method", "pickle"],
)
def test_copies_take_indices_too(features, change):
    same = change(features)
    assert type(same) is Features
    np.testing.assert_array_equal(same[4], features["stage4"])


def test_features_without_levels_are_a_plain_dict():
    with pytest.raises(UnknownLevel, match=r"no level 0 .*there are \['a'\]"):
        Features({"a": 1})[0]


def test_numpy_and_torch_answers_take_indices(backbone):
    images = np.zeros((1, 3, 32, 32), np.float32)
    for answer in (backbone(images), backbone(torch.from_numpy(images))):
        assert list(answer) == ["stage2", "stage4"]
        assert answer[4] is answer["stage4"]


def test_a_pytree_of_features_keeps_the_kind(features):
    leaves, spec = pytree.tree_flatten(features)
    assert len(leaves) == 2
    doubled = pytree.tree_map(lambda feature: feature * 2, features)
    assert type(doubled) is Features
    assert doubled[4] == 2
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


class Selects(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images):
        features = self.backbone(images)
        return [features[index] for index in (2, 4) if index in features]


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_program_may_index_features_and_return_them(backbone, strict, tmp_path):
    images = torch.zeros(1, 3, 32, 32)
    indexed = torch.export.export(Selects(backbone), (images,), strict=strict).module()(images)
    torch.testing.assert_close(indexed[1], backbone(images)[4])
    program = torch.export.export(backbone, (images,), strict=strict)
    torch.export.save(program, tmp_path / "features.pt2")
    answer = torch.export.load(tmp_path / "features.pt2").module()(images)
    assert type(answer) is Features
    torch.testing.assert_close(answer[2], backbone(images)["stage2"])


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's own
def test_a_compiled_backbone_answers_with_features(backbone):
    images = torch.zeros(1, 3, 32, 32)
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images)[4], backbone(images)["stage4"])
    selects = torch.compile(Selects(backbone), backend="eager", fullgraph=True)
    torch.testing.assert_close(selects(images)[1], backbone(images)["stage4"])
