"""Quantization-aware training from a network in FP32 to an engine, on scikit-learn's handwritten digits."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from deploykit import create_backbone, export_backbone, load_bundle, prepare_qat
from deploykit.calibration.plan import QuantizationPlan
from deploykit.errors import CalibrationError, SpecError
from deploykit.onnx_session import onnx_session
from deploykit.parity.metrics import sqnr_db
from deploykit.spec import Int8
from tests.backbones.realistic import randomize
from tests.small_resnet import SMALL

PLAIN = Int8(recipe="plain", min_sqnr_db=-30.0)
OPTIONS = {"image_size": 16, "in_channels": 1}
LOUD = 100.0


def conv_norm(source: int, target: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(source, target, 3, stride, 1, bias=False), nn.BatchNorm2d(target), nn.ReLU()]


class Digits(nn.Sequential):
    """A small classifier with a batch normalization behind each convolution."""

    def __init__(self) -> None:
        super().__init__(
            *(*conv_norm(1, 16, 2), *conv_norm(16, 24, 1), *conv_norm(24, 32, 2)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
        )


def plant_outliers(network: Digits) -> None:
    """Make some channels loud and their readers deaf to them: FP32 stays, and a range for the whole tensor suffers."""
    with torch.no_grad():
        for norm, reader in ((network[1], network[3]), (network[4], network[6])):
            norm.weight[:2] *= LOUD
            norm.bias[:2] *= LOUD
            reader.weight[:, :2] /= LOUD


def fit(network: nn.Module, images: torch.Tensor, classes: torch.Tensor, rate: float, passes: int) -> None:
    """A training loop in plain PyTorch."""
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    network.train()
    for _ in range(passes):
        for batch in torch.randperm(len(images)).split(50):
            loss = nn.functional.cross_entropy(network(images[batch]), classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()


class Case:
    """The digits in halves, a network that was trained on the first, and the bundle of post-training INT8."""

    def __init__(self, folder: Path) -> None:
        source = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed").load_digits()
        pixels = torch.from_numpy(source.images / 8 - 1).float()[:, None]
        images = nn.functional.interpolate(pixels, size=(16, 16), mode="bilinear")
        classes = torch.from_numpy(source.target)
        self.train, self.test = (images[:900], classes[:900]), (images[900:], classes[900:])
        self.calibration = self.train[0][:64].numpy()
        self.fp32 = Digits()
        fit(self.fp32, *self.train, rate=3e-3, passes=6)
        plant_outliers(self.fp32)
        self.post_training = folder / "post-training"
        export_backbone(
            self.fp32,
            self.post_training,
            runtime="onnxruntime",
            precision=PLAIN,
            calibration=self.calibration,
            **OPTIONS,
        )

    def accuracy(self, model: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float((model(self.test[0]).argmax(1) == self.test[1]).float().mean())

    def engine_accuracy(self, bundle: Path) -> float:
        return 100 * float((outputs_of(bundle, self.test[0]).argmax(1) == self.test[1].numpy()).mean())

    def prepare(self, **options):
        given = {"runtime": "onnxruntime", "precision": PLAIN, **OPTIONS, **options}
        return prepare_qat(self.fp32, self.calibration, **given)


def outputs_of(bundle: Path, images: torch.Tensor) -> np.ndarray:
    with load_bundle(bundle) as model:
        return np.concatenate([model(image[None]) for image in images.numpy()])


def as_written(bundle: Path, images: torch.Tensor) -> np.ndarray:
    """What the engine's graph says, node by node."""
    session = onnx_session(ir.load(bundle / "model.onnx"), optimize=False)
    return np.concatenate([session.run(["logits"], {"images": image[None]})[0] for image in images.numpy()])


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Case(tmp_path_factory.mktemp("qat"))


@pytest.fixture(scope="module")
def trained(case):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = case.prepare()
        before = network.plan
        fit(network, *case.train, rate=1e-3, passes=8)
    return network, before


@pytest.fixture(scope="module")
def bundle(case, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qat-bundle") / "engine"
    result = export_backbone(trained[0], folder, precision=PLAIN)
    assert result.parity.reference == "the trained network with its roundings"
    return folder


def test_training_wins_back_more_than_half_of_what_int8_loses(case, trained, bundle):
    fp32, lost = case.accuracy(case.fp32), case.engine_accuracy(case.post_training)
    assert fp32 > 90
    assert fp32 - lost >= 2
    assert case.engine_accuracy(bundle) > (fp32 + lost) / 2
    assert case.accuracy(trained[0]) > (fp32 + lost) / 2


def test_the_engine_gives_what_the_trained_network_gives(case, trained, bundle):
    images = case.test[0][:200]
    with torch.no_grad():
        expected = trained[0](images).numpy()
    assert sqnr_db(expected, outputs_of(bundle, images)) > 40
    assert sqnr_db(expected, as_written(bundle, images)) > 60  # but for sums next to the middle of two integers
    with torch.no_grad():
        assert sqnr_db(case.fp32(images).numpy(), expected) < 30  # it is another network than the one in FP32


def test_the_engine_has_the_nodes_of_the_post_training_one(case, bundle):
    kinds = [
        sorted(node.op_type for node in onnx.load(folder / "model.onnx").graph.node)
        for folder in (case.post_training, bundle)
    ]
    assert kinds[0] == kinds[1]


def test_the_bundle_has_the_trained_plan(trained, bundle):
    network, before = trained
    plan = QuantizationPlan.load(bundle)
    assert plan.ranges == network.plan.ranges
    assert plan.ranges != before.ranges
    assert plan.placement.reads == before.placement.reads


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, where it copies a graph module
def test_a_state_dict_and_a_deep_copy_have_all_that_was_learned(case, trained):
    network, _ = trained
    other = case.prepare()
    images = case.test[0][:8]
    with torch.no_grad():
        assert not torch.equal(other(images), network(images))
        other.load_state_dict(network.state_dict())
        assert torch.equal(other(images), network(images))
        assert torch.equal(copy.deepcopy(network)(images), network(images))
        assert torch.equal(other.train()(images), other.eval()(images))


def test_it_begins_with_the_plan_of_a_bundle(case):
    networks = [
        prepare_qat(case.fp32, plan, precision=PLAIN, **OPTIONS)
        for plan in (case.post_training, QuantizationPlan.load(case.post_training))
    ]
    assert networks[0].plan.ranges == pytest.approx(networks[1].plan.ranges)
    with torch.no_grad():
        assert torch.equal(*(network(case.test[0][:8]) for network in networks))


def test_features_come_by_name_and_all_parameters_learn(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = randomize(create_backbone(SMALL, image_size=32, features_only=True))
    images = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    network = prepare_qat(backbone.eval(), images)
    features = network(torch.from_numpy(images))
    assert list(features) == [level.name for level in backbone.feature_info]
    assert features[3] is features["stage3"]
    sum(feature.square().sum() for feature in features.values()).backward()
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert len(learned) > len(list(backbone.parameters()))
    assert all(parameter.grad is not None for parameter in learned)


def test_what_was_planned_for_another_network_is_told(case):
    with pytest.raises(CalibrationError, match="the plan was made for weights of digest"):
        prepare_qat(Digits(), case.post_training, precision=PLAIN, **OPTIONS)


def test_a_plan_of_an_equalized_network_needs_its_images(case, tmp_path):
    settings = Int8(recipe="fast", min_sqnr_db=-30.0)
    given = {"runtime": "onnxruntime", "precision": settings, "calibration": case.calibration, **OPTIONS}
    export_backbone(case.fp32, tmp_path / "fast", **given)
    with pytest.raises(CalibrationError, match="give the images that the plan was made of"):
        prepare_qat(case.fp32, tmp_path / "fast", precision=settings, **OPTIONS)
    network = prepare_qat(case.fp32, tmp_path / "fast", precision=settings, calibration=case.calibration, **OPTIONS)
    assert network.plan.placement.weights


@pytest.mark.parametrize(
    ("plan", "options", "error", "says"),
    [
        (None, {}, CalibrationError, "none was given. Fix: give a QuantizationPlan"),
        ("images", {"precision": "fp16"}, SpecError, "training with roundings is for 'int8'"),
        ("images", {"runtime": "onnxruntim"}, SpecError, "onnxruntime"),
        ("images", {"calibration": "images"}, CalibrationError, "plan and calibration are both images"),
        ("images", {"images_size": 16}, SpecError, "images_size"),
    ],
)
def test_what_it_cannot_begin_with_is_told(case, plan, options, error, says):
    images = {"images": case.calibration}
    chosen = {name: images.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(error, match=says):
        prepare_qat(case.fp32, images.get(plan, plan), **OPTIONS, **chosen)


def test_what_its_export_cannot_take_is_told(case, trained, tmp_path):
    network, _ = trained
    with pytest.raises(SpecError, match="trained with the roundings of 'int8'"):
        export_backbone(network, tmp_path / "engine", precision="fp16")
    with pytest.raises(SpecError, match="calibration was given beside a network that prepare_qat made"):
        export_backbone(network, tmp_path / "engine", calibration=case.calibration)
    coarse = case.prepare(precision=replace(PLAIN, reduce_range=False))
    with pytest.raises(SpecError, match="products of 8-bit weights saturate"):
        export_backbone(coarse, tmp_path / "engine", runtime="onnxruntime", target="x86-avx2")
    with pytest.raises(SpecError, match=r"export_backbone\(network, FOLDER"):
        create_backbone(network, runtime="onnxruntime")
    with pytest.raises(SpecError, match=r"its submodule '0' is what prepare_qat gave"):
        export_backbone(nn.Sequential(network), tmp_path / "engine", runtime="onnxruntime", **OPTIONS)
    assert not (tmp_path / "engine").exists()


def test_a_wrapped_network_is_exported_as_the_network_inside(case, trained, bundle, tmp_path):
    wrapped = nn.DataParallel(trained[0])
    result = export_backbone(wrapped, tmp_path / "engine", precision=PLAIN)
    assert result.manifest.precision == "int8"
    assert (tmp_path / "engine" / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()


class Fixed(nn.Module):
    """A convolution whose weight is a buffer that its state dict leaves out, as weights standardized once are."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("filters", torch.randn(8, 1, 3, 3, generator=generator), persistent=False)
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        return self.head(nn.functional.conv2d(images, self.filters).relu().mean((2, 3)))


def test_a_weight_that_no_state_dict_holds_is_trained_and_exported(case, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = prepare_qat(Fixed().eval(), case.calibration, runtime="onnxruntime", precision=PLAIN, **OPTIONS)
        fit(network, *case.train, rate=3e-3, passes=1)
    export_backbone(network, tmp_path / "engine", precision=PLAIN)
    images = case.test[0][:50]
    with torch.no_grad():
        assert sqnr_db(network(images).numpy(), outputs_of(tmp_path / "engine", images)) > 40
