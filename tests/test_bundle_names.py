"""What a name stands for beside folders of the same name, and options beside a bundle."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from deploykit import create_backbone, load_bundle
from deploykit.bundle import open_bundle
from deploykit.errors import BundleError, SpecError
from deploykit.facade import named_bundle
from deploykit.spec import BatchRange, Fp32, Int8

BUNDLE = Path(__file__).parent / "data" / "bundles-0.1.0" / "onnxruntime-int8"

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """The working directory, with bundles under names of variants, of an alias, of timm, and under another name."""
    for name in ("resnet18", "vit", "timm/resnet18", "mine"):
        shutil.copytree(BUNDLE, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_the_bundle(model) -> bool:
    manifest = getattr(model, "manifest", None)
    return manifest is not None and manifest.runtime == "onnxruntime"


@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_the_name_of_a_variant_or_an_alias_is_that(beside, name):
    model = create_backbone(name, num_classes=10, image_size=32)
    assert not is_the_bundle(model)
    assert model.spec.num_classes == 10


def test_the_name_of_a_timm_model_is_that(beside, timm):
    assert not is_the_bundle(create_backbone("timm/resnet18", num_classes=10))


@pytest.mark.parametrize(
    "path",
    [
        "./resnet18",
        "resnet18/",
        "resnet18/.",
        Path("resnet18"),
        "./vit",
        Path("timm/resnet18"),
        "./timm/resnet18",
        "mine",
        "mine/",
        b"resnet18",
    ],
)
def test_a_path_is_the_bundle_and_options_beside_it_are_compared(beside, path):
    with create_backbone(path) as model:
        assert is_the_bundle(model)
    with pytest.raises(SpecError, match=r"num_classes=10, and the bundle has"):
        create_backbone(path, num_classes=10)


def test_an_absolute_path_and_a_link_are_the_bundle(beside):
    (beside / "link").symlink_to("resnet18")
    for path in (str(beside / "resnet18"), beside / "link", "link"):
        with create_backbone(path) as model:
            assert is_the_bundle(model)


@pytest.mark.parametrize(
    "options",
    [
        {"features_only": False},
        {"output_indices": (0,)},
        {"output_stride": 16},
        {"num_classes": 7},
        {"in_channels": 1},
        {"image_size": 64},
        {"patch_size": 8},
        {"hierarchical": True},
        {"runtime": "openvino"},
        {"runtime": "torch"},
        {"precision": "fp32"},
        {"precision": Fp32()},
        {"batch_size": 2},
        {"batch_size": (1, 2, 64)},
        {"embed_preprocessing": True},
        {"target": "x86-avx2"},
        {"pretrained": True},
        {"pretrained": "weights.safetensors"},
        {"calibration": "photos"},
    ],
    ids=str,
)
def test_every_option_that_differs_is_refused_by_name(options):
    (name,) = options
    with pytest.raises(SpecError, match=rf"is a bundle, and what was asked for.*{name}"):
        create_backbone(BUNDLE, **options)


def test_options_that_are_what_it_holds_are_taken():
    manifest = load_bundle(BUNDLE).manifest
    batch = manifest.input.batch
    options = {
        "features_only": True,
        "runtime": "onnxruntime",
        "precision": Int8(),
        "image_size": 32,
        "output_indices": None,
        "batch_size": batch if isinstance(batch, BatchRange) else int(batch),
        "pretrained": False,
    }
    create_backbone(BUNDLE, **options).close()


@pytest.mark.parametrize("name", [5, 1.5, ["resnet18"], object(), None])
def test_what_is_no_name_is_a_spec_error(name):
    with pytest.raises(SpecError, match="expected a backbone's name, a module, or the path of a bundle"):
        create_backbone(name)
    with pytest.raises(SpecError, match=r"folder is .*; expected a text or bytes or a path"):
        load_bundle(name)


def test_an_unknown_name_that_is_a_folder_says_what_the_folder_holds(beside):
    (beside / "photos").mkdir()
    (beside / "photos" / "cat.jpg").write_text("x")
    for path in ("photos", "./photos", Path("photos"), beside / "photos"):
        with pytest.raises(BundleError, match=r"a path, but not a bundle: .*holds cat\.jpg"):
            create_backbone(path)


def test_names_that_are_not_utf_8_are_paths_too(beside):
    Path("mine").rename(os.fsdecode(b"mine-\xff"))
    for path in (b"mine-\xff", os.fsdecode(b"./mine-\xff"), Path(os.fsdecode(b"mine-\xff"))):
        assert named_bundle(path) is not None
        assert open_bundle(named_bundle(path)).runtime == "onnxruntime"
    with pytest.raises(BundleError) as caught:
        load_bundle(b"absent-\xff")
    str(caught.value).encode("utf-8")


@pytest.mark.parametrize("name", ["a\0b", "./a\0b", "x" * 5000 + "/y"])
def test_a_name_that_no_file_can_have_is_a_typed_error(name):
    with pytest.raises((SpecError, BundleError)):
        create_backbone(name)
    with pytest.raises(BundleError):
        load_bundle(name)
