"""The C++ example reads a bundle and normalises as deploykit does; with ONNX Runtime's headers it runs the engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploykit import load_bundle
from deploykit.bundle import read_manifest
from deploykit.images.preprocess import normalize
from tests.backends.bundles import write_bundle

HOSTS = Path(__file__).parent.parent.parent / "examples" / "hosts"
INCLUDE = "ONNXRUNTIME_INCLUDE"
FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", str(HOSTS))


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX") or "g++")
    if found is None:
        pytest.skip("g++ is not installed")
    return found


def ran(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("hosts") / "bundle", "onnxruntime")


@pytest.fixture(scope="module")
def picture(bundle) -> Path:
    """A picture of the engine's size."""
    spec = read_manifest(bundle).input
    pixels = np.random.default_rng(0).integers(0, 256, (spec.height, spec.width, 3), np.uint8)
    path = bundle.parent / "picture.ppm"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def printer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("built") / "print_bundle"
    built = ran(compiler(), *FLAGS, Path(__file__).parent / "print_bundle.cpp", "-o", path)
    assert built.returncode == 0, built.stderr
    return path


def test_the_header_reads_the_manifest(printer, bundle):
    manifest = read_manifest(bundle)
    spec, how = manifest.input, manifest.input.preprocessing
    done = ran(printer, bundle)
    assert done.stdout.splitlines() == [
        f"onnxruntime {manifest.engine} fp32",
        f"images 1 3 {spec.height} {spec.width} float32",
        f"{how.interpolation} {how.crop_mode} {how.crop_pct}",
        *(f"{level.name} {level.index} {level.channels} {level.stride}" for level in manifest.backbone.levels),
    ]


def test_pixels_become_what_deploykit_makes_of_them(printer, bundle, picture, tmp_path):
    manifest = read_manifest(bundle)
    done = ran(printer, bundle, picture, tmp_path / "tensor")
    assert done.returncode == 0, done.stderr
    expected = normalize(np.asarray(Image.open(picture)), manifest.input.preprocessing)
    found = np.fromfile(tmp_path / "tensor", np.float32)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[: len(text) // 2], r"manifest.json is damaged at byte \d+"),
        (lambda text: text + "}", "goes on behind its end"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "of a newer deploykit"),
        (lambda text: text.replace('"mean"', '"means"'), "has no mean"),
        (lambda text: "[" * 100000, "nested too deeply"),
    ],
    ids=["half", "more", "newer", "lacking", "deep"],
)
def test_a_damaged_manifest_is_said_and_nothing_crashes(printer, bundle, tmp_path, change, said):
    text = json.dumps(json.loads((bundle / "manifest.json").read_text()))
    (tmp_path / "manifest.json").write_text(change(text))
    done = ran(printer, tmp_path)
    assert done.returncode == 1
    assert re.search(said, done.stderr)


def test_a_picture_of_another_size_is_refused(printer, bundle, tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "small.ppm")
    done = ran(printer, bundle, tmp_path / "small.ppm", tmp_path / "tensor")
    assert done.returncode == 1
    assert re.search(r"small.ppm is 20x10; the engine takes \d+x\d+ in RGB", done.stderr)


def test_the_engine_gives_its_levels_in_cpp(bundle, picture, tmp_path):
    headers = Path(os.environ.get(INCLUDE, "/usr/include/onnxruntime"))
    if not (headers / "onnxruntime_cxx_api.h").is_file():
        pytest.skip(f"ONNX Runtime's C++ headers are absent; set {INCLUDE} to their folder")
    onnxruntime = pytest.importorskip("onnxruntime")
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)
    program, place = tmp_path / "features", f"-Wl,-rpath,{tmp_path}"
    built = ran(compiler(), *FLAGS, "-isystem", headers, HOSTS / "features.cpp", library, place, "-o", program)
    assert built.returncode == 0, built.stderr
    done = ran(program, bundle, picture)
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"^(\w+) +([\d x]+?) +rms ([\d.]+)  stride (\d+)$", done.stdout, re.MULTILINE)
    with load_bundle(bundle) as model:
        images = normalize(np.asarray(Image.open(picture)), model.input_spec.preprocessing)
        features = model(images[None])
        strides = {level.name: level.stride for level in model.feature_info}
    assert [name for name, *_ in printed] == list(features)
    for name, shape, rms, stride in printed:
        values = np.asarray(features[name])
        assert shape == " x ".join(map(str, values.shape))
        assert float(rms) == pytest.approx(float(np.sqrt(np.square(values).mean())), abs=2e-5)
        assert int(stride) == strides[name]
