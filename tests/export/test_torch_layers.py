"""The walk beside torch: the network of a bundle is made again, and a wrong layer is named by its module."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import deploykit
from deploykit.bundle import read_manifest, write_manifest
from deploykit.errors import SpecError, WeightsError
from deploykit.export.torch_layers import torch_layers
from deploykit.spec import Fp16
from tests.cli.conftest import call
from tests.small_resnet import SMALL

SIDE = 32


class Network(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, images):
        deep = self.second(self.first(images).relu()).relu()
        return self.head(deep.mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network().eval()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> tuple[Path, Path]:
    """A small network in FP32, and its checkpoint."""
    root = tmp_path_factory.mktemp("torch-layers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = deploykit.create_backbone(SMALL, image_size=SIDE, num_classes=10)
    torch.save(backbone.state_dict(), root / "trained.pth")
    deploykit.export_backbone(backbone, root / "bundle", runtime="onnxruntime", precision="fp32")
    return root / "bundle", root / "trained.pth"


def changed(bundle: Path, folder: Path, weight: str, factor: float) -> Path:
    """A copy of a bundle of which one weight is another, signed again."""
    shutil.copytree(bundle, folder)
    model = onnx.load(folder / "model.onnx")
    (tensor,) = (each for each in model.graph.initializer if each.name.endswith(weight))
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((array * factor).astype(array.dtype), tensor.name))
    onnx.save(model, folder / "model.onnx")
    return signed(folder)


def signed(folder: Path, **changes) -> Path:
    """Write the manifest of a bundle's files as they are now."""
    manifest = read_manifest(folder)
    for name in ("manifest.json", "manifest.sha256"):
        (folder / name).unlink()
    write_manifest(folder, dataclasses.replace(manifest, **changes))
    return folder


def test_an_engine_gives_in_each_layer_what_torch_gives(bundle):
    folder, weights = bundle
    done = call("verify", folder, "--layers", "--weights", weights, "--json")
    found = done.json()
    assert done.code == 0
    assert found["culprit"] is None
    layers = found["layers"]["layers"]
    assert (found["layers"]["reference"], found["layers"]["min_own_db"]) == ("torch fp32", 80.0)
    assert {"conv1", "layer1.0.conv1", "layer4.0.conv2", "fc"} <= {layer["module"] for layer in layers}
    assert min(min(layer["own_db"], layer["whole_db"]) for layer in layers) > 100


def test_one_percent_of_a_weight_is_found_at_its_module(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, weights = bundle
    wrong = changed(folder, tmp_path / "wrong", "layer2.0.conv1.weight", 1.01)
    text = call("verify", wrong, "--layers", "--weights", weights).out
    assert "(torch: layer2.0.conv1), Conv" in " ".join(text.split())
    assert {"wrong-culprit.onnx", "wrong-culprit.npz"} <= {path.name for path in tmp_path.iterdir()}


def test_only_the_weights_that_were_exported_will_do(bundle, tmp_path):
    folder, weights = bundle
    with pytest.raises(WeightsError, match=r"random weights, which are not those.*pretrained=<file>"):
        torch_layers(folder)
    state = torch.load(weights, weights_only=True)
    state["conv1.weight"] *= 2
    torch.save(state, tmp_path / "other.pth")
    done = call("verify", folder, "--layers", "--weights", tmp_path / "other.pth")
    assert done.code != 0
    assert "which are not those that the bundle was exported with" in done.err
    assert "--weights FILE" in done.err


@pytest.mark.parametrize("options", [{"batch_size": "dynamic"}, {"embed_preprocessing": True}, {"precision": Fp16()}])
def test_a_module_of_the_users_own_is_given_in_python(network, tmp_path, options):
    images = np.random.default_rng(0).standard_normal((4, 3, SIDE, SIDE)).astype(np.float32)
    folder = tmp_path / "own"
    asked = {"runtime": "onnxruntime", "precision": "fp32", "image_size": SIDE, "calibration": images, **options}
    if "embed_preprocessing" in options:
        asked |= {"calibration": None}
    deploykit.export_backbone(network, folder, **asked)
    report = torch_layers(folder, network)
    assert report.culprit is None
    assert {"first", "second", "head"} <= {layer.module for layer in report.layers}
    wrong = torch_layers(changed(folder, tmp_path / "wrong", "second.weight", 1.02), network)
    assert [layer.module for layer in wrong.layers if layer.own_db < 40] == ["second"]
    assert sum(layer.whole_db < 40 for layer in wrong.layers) > 1, "what comes after inherits it"
    assert wrong.culprit.module == "second"
    with pytest.raises(SpecError, match=r"is network, a module of your own.*give the module"):
        torch_layers(folder)
    with pytest.raises(WeightsError, match="weights of the module, which are not those"):
        torch_layers(folder, Network().eval())


@pytest.mark.slow
def test_an_engine_for_a_range_of_sizes_is_walked_at_the_size_of_its_images(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = deploykit.create_backbone("resnet18", output_indices=(0, 1), features_only=True)
    folder = tmp_path / "sizes"
    deploykit.export_backbone(backbone, folder, runtime="onnxruntime", precision="fp32", image_size=(32, 64, 96))
    report = torch_layers(folder, backbone)
    assert report.culprit is None
    assert len(report.layers) > 5


def test_another_network_and_scaled_channels_are_refused(bundle, tmp_path, network):
    folder, weights = bundle
    with pytest.raises(
        SpecError, match=r"another than the bundle's: .*levels none, in the bundle stem, .*name network, in the"
    ):
        torch_layers(folder, network)
    scaled = signed(shutil.copytree(folder, tmp_path / "scaled"), fusions={"equalize-channels": 3})
    with pytest.raises(SpecError, match="scaled against each other"):
        torch_layers(scaled, pretrained=weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "file.pth"], "--weights goes with --layers"),
        (["--layers", "--weights", "a", "--in-runtime", "openvino"], "--in-runtime and --weights were given"),
        (["--layers", "--reference", "a", "--pretrained"], "--reference and --pretrained were given"),
        (["--layers", "--checkpoint-key", "model"], "--checkpoint-key goes with --weights"),
    ],
)
def test_options_that_do_not_go_together_are_named(bundle, options, message):
    done = call("verify", bundle[0], *options)
    assert done.code == 2
    assert message in done.err
