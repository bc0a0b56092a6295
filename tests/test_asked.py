"""Options beside a bundle: those that are given must be what it holds, those that are not ask for nothing."""

from __future__ import annotations

import pytest

from deploykit.asked import check_asked
from deploykit.errors import BundleError, SpecError
from deploykit.spec import BatchRange, Int8
from deploykit.unset import UNSET
from tests.test_bundle import make

HELD = {
    "features_only": True,
    "output_indices": (1,),
    "output_stride": 32,
    "num_classes": 1000,
    "in_channels": 3,
    "image_size": (224, 224),
    "patch_size": None,
    "hierarchical": False,
    "runtime": "onnxruntime",
    "precision": "int8",
    "batch_size": (1, 2, 4),
    "embed_preprocessing": False,
    "target": None,
}
OTHERS = {
    "features_only": False,
    "output_indices": (1, 2),
    "output_stride": 16,
    "num_classes": 10,
    "in_channels": 1,
    "image_size": 192,
    "patch_size": 8,
    "hierarchical": True,
    "runtime": "openvino",
    "precision": "fp32",
    "batch_size": 1,
    "embed_preprocessing": True,
    "target": "x86-avx2",
}
DEFAULTS = {
    "features_only": False,
    "runtime": "torch",
    "precision": "fp32",
    "batch_size": 1,
}
"""What `create_backbone` takes where these are not given, of which the bundle has none."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("asked") / "bundle"
    make(path)
    return path


def check(folder, *, pretrained: bool = False, calibrated: bool = False, **options: object) -> None:
    unset = dict.fromkeys(HELD, UNSET)
    refused = {"pretrained": pretrained, "calibration": calibrated}
    check_asked(folder, unset | options, refused=refused)


def test_what_is_not_given_asks_for_nothing(folder):
    check(folder)


def test_every_option_that_the_bundle_holds_may_be_given(folder):
    check(folder, **HELD)
    for name, value in HELD.items():
        check(folder, **{name: value})


@pytest.mark.parametrize("name", OTHERS)
def test_every_option_that_the_bundle_does_not_hold_is_named_with_both_values(folder, name):
    with pytest.raises(SpecError) as caught:
        check(folder, **HELD | {name: OTHERS[name]})
    message = str(caught.value)
    assert f"{name}={OTHERS[name]!r}, and the bundle has " in message
    assert message.count("and the bundle has") == 1
    assert "Fix: leave these options out, or export another bundle with them." in message


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_that_is_given_is_compared_too(folder, name):
    with pytest.raises(SpecError, match=f"{name}="):
        check(folder, **{name: DEFAULTS[name]})


def test_all_that_differs_is_told_at_once(folder):
    with pytest.raises(SpecError) as caught:
        check(folder, runtime="openvino", precision="fp16", num_classes=1000, pretrained=True, calibrated=True)
    message = str(caught.value)
    assert "runtime='openvino', and the bundle has 'onnxruntime'" in message
    assert "precision='fp16', and the bundle has 'int8'" in message
    assert "pretrained was given, which a bundle has inside" in message
    assert "calibration was given, which a bundle has inside" in message
    assert "num_classes" not in message


@pytest.mark.parametrize(
    "options",
    [
        {"precision": Int8(min_sqnr_db=3)},
        {"batch_size": BatchRange(min=1, opt=2, max=4)},
        {"batch_size": "dynamic"},
        {"output_indices": None},
        {"image_size": None},
        {"image_size": 224},
    ],
    ids=str,
)
def test_other_spellings_of_what_the_bundle_holds_are_taken(folder, options):
    check(folder, **options)


def test_a_value_that_nothing_can_have_is_refused_as_elsewhere(folder):
    with pytest.raises(SpecError, match="Did you mean 'int8'"):
        check(folder, precision="int4")


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path):
    with pytest.raises(BundleError):
        check(tmp_path)
