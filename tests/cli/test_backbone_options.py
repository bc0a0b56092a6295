"""The options that say which backbone a command takes: shared, and honest about a checkpoint of the user's own."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from safetensors.torch import save_file

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.registry import build
from deploykit.cli import export, sensitivity
from deploykit.cli.backbone_options import chosen_backbone
from deploykit.cli.spellings import as_options
from deploykit.errors import SpecError

NAME = "mobilenetv3_small_075"
CONFIG = {
    "architecture": NAME,
    "num_classes": 3,
    "label_names": ["cat", "dog", "owl"],
    "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
}


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return build(NAME, BackboneOptions(num_classes=3)).state_dict()


@pytest.fixture
def folder(tmp_path, monkeypatch, state):
    """A working folder with a checkpoint of three classes that says nothing of itself."""
    monkeypatch.chdir(tmp_path)
    torch.save(state, "mine.pth")
    return tmp_path


@pytest.fixture
def planned(call, folder):
    """What a dry run of an export plans, and what it told."""

    def plan(*words):
        done = call("export", *words, "--runtime", "onnxruntime", "--image-size", "64", "--dry-run", "--json")
        assert done.code == 0, done.err
        return done.json()["plan"], done.err

    return plan


def test_every_command_that_takes_a_backbone_has_the_same_options():
    shared = list(inspect.signature(chosen_backbone).parameters)
    for command in (export.export, sensitivity.sensitivity):
        assert list(inspect.signature(command).parameters)[: len(shared)] == shared


def test_classes_are_those_of_the_file(planned):
    plan, told = planned("mine.pth", "--backbone", NAME)
    assert (plan["backbone"]["num_classes"], plan["outputs"]) == (3, ["logits"])
    assert told == ""


def test_other_classes_are_refused_in_the_commands_words(call, folder):
    words = ("export", "mine.pth", "--backbone", NAME, "--runtime", "onnxruntime", "-o", "out")
    done = call(*words, "--num-classes", "10")
    assert done.code == 6
    assert "for 3 classes (classifier.weight (3, 1024)), and --num-classes 10 was asked for" in done.err
    assert "leave out --num-classes" in done.err
    assert "--new-head draws a new classifier" in done.err
    assert [entry.name for entry in folder.iterdir()] == ["mine.pth"]
    assert call(*words, "--num-classes", "10", "--new-head", "--dry-run").code == 0


def test_a_file_that_says_whose_it_is_needs_no_backbone(planned, folder, state):
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(state, "model.safetensors")
    plan, _ = planned("model.safetensors")
    assert (plan["backbone"]["name"], plan["weights"]) == (NAME, "model.safetensors")
    assert plan["input"]["preprocessing"]["mean"] == [0.5] * 3


def test_a_file_that_says_nothing_needs_one(call, folder):
    done = call("export", "mine.pth", "--runtime", "onnxruntime")
    assert done.code == 2
    assert "mine.pth is a checkpoint that does not say which backbone it belongs to. Add --backbone NAME" in done.err


def test_averaged_weights_are_told_and_can_be_chosen(call, folder, state):
    torch.save({"model": state, "model_ema": state | {"conv_stem.weight": state["conv_stem.weight"] * 2}}, "both.pth")
    words = ("export", "both.pth", "--backbone", NAME, "--runtime", "onnxruntime", "--dry-run")
    told = call(*words)
    assert told.code == 0
    assert "warning: both.pth holds averaged weights (EMA) in model_ema beside the raw ones in model" in told.err
    assert "Choose with --checkpoint-key 'model_ema' or --checkpoint-key 'model'" in told.err
    assert call(*words, "--checkpoint-key", "model").err == ""
    wrong = call(*words, "--checkpoint-key", "ema")
    assert wrong.code == 6
    assert "it has model, model_ema" in wrong.err


def test_preprocessing_is_given_field_by_field(planned):
    words = ("--mean", "0.5", "--std", "0.1,0.2,0.3", "--interpolation", "bilinear", "--crop-pct", "0.9")
    plan, _ = planned("mine.pth", "--backbone", NAME, *words, "--crop-mode", "squash")
    assert plan["input"]["preprocessing"] == {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.1, 0.2, 0.3],
        "interpolation": "bilinear",
        "crop_pct": 0.9,
        "crop_mode": "squash",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mean", "grey"), "--mean is 'grey'; expected one number"),
        (("--std", "0.5,0.5"), "mean has 3 channels and std has 2"),
        (("--std", "0"), "every value must be above 0"),
        (("--crop-pct", "2"), "crop_pct is 2"),
        (("--interpolation", "magic"), "interpolation is 'magic'"),
        (("--labels", "absent.txt"), "the label file absent.txt cannot be read"),
        (("--labels", "mine.pth"), "it is not UTF-8 text"),
        (("--hierarchical",), "only a plain ViT"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("command", ["export", "sensitivity"])
def test_words_that_cannot_be_are_usage_errors(call, folder, command, words, message):
    done = call(command, NAME, "--runtime", "onnxruntime", "--image-size", "64", *words)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_labels_are_counted(call, folder):
    (folder / "names.txt").write_text("cat\ndog\n")
    words = ("export", "mine.pth", "--backbone", NAME, "--runtime", "onnxruntime", "--dry-run", "--labels")
    few = call(*words, "names.txt")
    assert few.code == 2
    assert "there are 2 labels and the classifier has 3 classes" in few.err
    (folder / "names.json").write_text('{"0": "cat", "1": "dog", "2": "owl"}')
    assert call(*words, "names.json").code == 0


def test_messages_say_options_as_the_command_does():
    assert as_options("Fix: num_classes=0 or new_head=True; leave num_classes out.") == (
        "Fix: --num-classes 0 or --new-head; leave out --num-classes."
    )


def test_choosing_twice_is_refused():
    with pytest.raises(SpecError, match="Leave out --weights"):
        chosen_backbone("mine.pth", backbone=NAME, weights="other.pth")
    with pytest.raises(SpecError, match="is no checkpoint file"):
        chosen_backbone("resnet18", backbone=NAME)
