"""What a checkpoint says of itself, from every place where it may say it."""

from __future__ import annotations

import argparse
import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.backbones.checkpoint_config import CheckpointConfig, read_config
from deploykit.errors import WeightsError

PREPROCESSING = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bilinear",
    "crop_pct": 0.9,
    "crop_mode": "squash",
}
TIMM = {
    "architecture": "resnet18",
    "num_classes": 2,
    "num_features": 512,
    "label_names": ["cat", "dog"],
    "pretrained_cfg": {**PREPROCESSING, "input_size": [3, 64, 96], "num_classes": 2, "license": "mit"},
}
KEYS = (*TIMM, *PREPROCESSING, "input_size", "img_size", "model", "classes", "id2label", "label_descriptions", "args")
ARGUMENTS = argparse.Namespace(
    model="resnet18", num_classes=2, mean=[0.5], std=[0.2], interpolation="", crop_pct=None, img_size=64, lr=0.1
)


def read(folder, *, content=None, metadata=None, config=None):
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return read_config(folder / "model.safetensors", content or {}, metadata or {})


def check_timm(config):
    assert (config.architecture, config.num_classes, config.image_size) == ("resnet18", 2, (64, 96))
    assert config.labels == ("cat", "dog")
    assert config.preprocessing == {
        **PREPROCESSING,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
    }
    assert config.says_preprocessing


def test_a_file_that_says_nothing_says_nothing(tmp_path):
    assert read(tmp_path, content={"epoch": 3}, metadata={"format": "pt"}) == CheckpointConfig()


def test_timms_configuration_beside_the_file_is_read(tmp_path):
    config = read(tmp_path, config=TIMM)
    check_timm(config)
    assert config.source == str(tmp_path / "config.json")


@pytest.mark.parametrize(
    "metadata",
    [
        {"config": json.dumps(TIMM)},
        {"format": "pt", **{key: json.dumps(value) for key, value in TIMM.items()}},
        {"format": "pt", "timm": json.dumps(TIMM | TIMM["pretrained_cfg"])},
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in TIMM.items()},
    ],
)
def test_the_metadata_of_a_safetensors_file_is_read(tmp_path, metadata):
    config = read(tmp_path, metadata=metadata)
    check_timm(config)
    assert config.source == "the metadata of model.safetensors"


def test_metadata_goes_before_the_file_beside_it(tmp_path):
    config = read(tmp_path, config=TIMM | {"label_names": ["a", "b"]}, metadata={"config": json.dumps(TIMM)})
    assert config.labels == ("cat", "dog")


def test_a_flat_configuration_of_older_timm_is_read(tmp_path):
    flat = {**{key: TIMM[key] for key in ("architecture", "num_classes", "label_names")}, **TIMM["pretrained_cfg"]}
    check_timm(read(tmp_path, config=flat))


def test_timms_training_arguments_say_what_was_not_the_architectures_own(tmp_path):
    config = read(tmp_path, content={"arch": "resnet18", "args": ARGUMENTS})
    assert (config.architecture, config.num_classes, config.image_size) == ("resnet18", 2, (64, 64))
    own = argparse.Namespace(**vars(ARGUMENTS) | {"mean": None, "std": None, "num_classes": None})
    plain = read(tmp_path, content={"args": own})
    assert plain.preprocessing == {}
    assert plain.says_preprocessing


def test_arguments_of_another_script_say_nothing(tmp_path):
    assert read(tmp_path, content={"args": argparse.Namespace(lr=0.1, model="mine")}) == CheckpointConfig()


@pytest.mark.parametrize(
    "said",
    [
        {"classes": ["cat", "dog"]},
        {"class_names": ("cat", "dog")},
        {"class_to_idx": {"dog": 1, "cat": 0}},
        {"idx_to_class": {0: "cat", 1: "dog"}},
        {"id2label": {"0": "cat", "1": "dog"}},
    ],
    ids=lambda said: next(iter(said)),
)
def test_class_names_beside_the_tensors_are_read(tmp_path, said):
    assert read(tmp_path, content=said).labels == ("cat", "dog")


@pytest.mark.parametrize("said", [{"labels": 3}, {"classes": [1, 2]}, {"labels": {"a": "b"}}, {"classes": []}])
def test_what_only_sounds_like_class_names_is_passed_over(tmp_path, said):
    assert read(tmp_path, content=said) == CheckpointConfig()


def test_placeholders_are_no_class_names_and_synsets_get_their_description(tmp_path):
    assert read(tmp_path, config={**TIMM, "label_names": None, "id2label": {"0": "LABEL_0"}}).labels is None
    synsets = {"label_names": ["n01440764", "n01443537"], "label_descriptions": {"n01440764": "tench"}}
    assert read(tmp_path, config={**TIMM, **synsets}).labels == ("tench", "n01443537")


def test_a_configuration_of_something_else_is_passed_over(tmp_path):
    assert read(tmp_path, config={"name": "my app", "debug": True}) == CheckpointConfig()
    assert read(tmp_path, config=[1, 2]) == CheckpointConfig()


def test_a_mark_of_the_byte_order_is_passed_over(tmp_path):
    assert read(tmp_path, config="\ufeff" + json.dumps(TIMM)) == read(tmp_path, config=TIMM)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{broken", "not readable JSON"),
        ({**TIMM, "num_classes": "two"}, "num_classes='two'"),
        ({**TIMM, "pretrained_cfg": {"interpolation": "magic"}}, "does not say how images are prepared"),
        ({**TIMM, "pretrained_cfg": {"std": [0, 0, 0]}}, "does not say how images are prepared"),
        ({**TIMM, "pretrained_cfg": {"mean": "grey"}}, "does not say how images are prepared"),
        ({**TIMM, "label_names": ["a", ""]}, "label_names"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_name(tmp_path, config, message):
    with pytest.raises(WeightsError, match=message) as caught:
        read(tmp_path, config=config)
    assert "config.json" in str(caught.value)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2000)
    | st.floats()
    | st.sampled_from(["", "resnet18", "0", "bilinear"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "0", "1"]), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(said=st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=6))
def test_whatever_a_file_says_is_taken_or_a_weights_error(tmp_path_factory, said):
    metadata = {key: json.dumps(value) for key, value in said.items()}
    for content, header in (({"args": argparse.Namespace(**said), **said}, {}), ({}, metadata)):
        with contextlib.suppress(WeightsError):
            read(tmp_path_factory.getbasetemp(), content=content, metadata=header)
