from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from deploykit.backends.onnxruntime import passes as onnxruntime
from deploykit.backends.openvino import passes as openvino
from deploykit.calibration import channel_groups, equalization
from deploykit.calibration.equalization import equalization_passes, equalize, image_limits
from deploykit.calibration.images import calibration_set
from deploykit.export.graphs import output_specs
from deploykit.export.to_onnx import to_onnx
from deploykit.fusion.pipeline import export_passes, fuse
from deploykit.fusion.program import export_program
from deploykit.graph import OnnxGraph
from deploykit.onnx_session import onnx_session
from deploykit.spec import Fp16, InputSpec, Int8
from tests.backbones.realistic import randomize
from tests.calibration.networks import SIDE, Residual, Tokens, plan_of, rounding_noise_db, written

SPEC = InputSpec(height=SIDE, width=SIDE)


class Bottlenecks(nn.Module):
    """Linear bottlenecks as in MobileNetV2: a narrow residual stream that wide convolutions read."""

    outputs = ("stage1", "logits")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 2, 1)
        self.expand, self.project = (
            nn.ModuleList(nn.Conv2d(*sides, 1) for _ in range(2)) for sides in ((12, 48), (48, 12))
        )
        self.depthwise = nn.ModuleList(nn.Conv2d(48, 48, 3, 1, 1, groups=48) for _ in range(2))
        self.last, self.head = nn.Conv2d(12, 32, 1), nn.Linear(32, 10)

    def forward(self, images):
        stream = self.stem(images)
        for expand, depthwise, project in zip(self.expand, self.depthwise, self.project, strict=True):
            stream = stream + project(depthwise(expand(stream).clamp(0, 6)).clamp(0, 6))
        return stream, self.head(self.last(stream).relu().mean((2, 3)))


class Preactivated(nn.Module):
    """A block whose BatchNorm stands before a padded convolution with groups, behind which stands a GroupNorm."""

    outputs = ("stage1", "logits")

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12)
        self.grouped, self.norm2 = nn.Conv2d(12, 24, 3, 1, 1, groups=3), nn.GroupNorm(4, 24)
        self.project, self.head = nn.Conv2d(24, 12, 1), nn.Linear(12, 10)

    def forward(self, images):
        stream = self.stem(images)
        stream = stream + self.project(self.norm2(self.grouped(self.norm1(stream).relu())).relu())
        return stream, self.head(stream.mean((2, 3)))


def scale_by_hand(network: nn.Module, factor: float) -> None:
    """Multiply every fifth channel that is written and divide the weights that read it: the same function."""
    with torch.no_grad():
        if isinstance(network, Tokens):
            block = network.block
            for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight[::5] *= factor
                norm.bias[::5] *= factor
                linear.weight[:, ::5] /= factor
            return
        if isinstance(network, Preactivated):
            for norm in (network.norm1, network.norm2):
                norm.weight[::5] *= factor
                norm.bias[::5] *= factor
            for channel in range(0, 12, 5):
                network.grouped.weight[channel // 4 * 8 : (channel // 4 + 1) * 8, channel % 4] /= factor
            network.project.weight[:, ::5] /= factor
            return
        for writer in (network.stem, *network.project):
            writer.weight[::5] *= factor
            writer.bias[::5] *= factor
        for reader in (*network.expand, network.last):
            reader.weight[:, ::5] /= factor


def graph_of(network: nn.Module, images, settings: Int8) -> OnnxGraph:
    program = export_program(network.eval().requires_grad_(False), SPEC)
    passes = export_passes(*equalization_passes(settings, calibration_set(images, SPEC), SPEC))
    fused = fuse(program, SPEC, images, passes)
    model = to_onnx(fused.program, SPEC, network.outputs)
    return OnnxGraph(input=SPEC, outputs=output_specs(model), model=model)


def noise_db(network: nn.Module, images, settings: Int8, dialect) -> float:
    """The SQNR of the INT8 logits, which no scaling by hand changes in FP32, on no processor's integer kernels."""
    settings = replace(settings, reduce_range=False)
    graph = graph_of(network, images, settings)
    quantized = written(dialect, graph, plan_of(graph, images, settings))
    sessions = [onnx_session(model, optimize=False) for model in (graph.model, quantized)]
    runs = [
        [np.concatenate([session.run(["logits"], {"images": image[None]})[0] for image in images])]
        for session in sessions
    ]
    return rounding_noise_db(*runs)[0]


@pytest.fixture(scope="module")
def images(photographs):
    return calibration_set(photographs, SPEC).sample(6)


@pytest.fixture(params=[Tokens, Bottlenecks, Preactivated], ids=["tokens", "bottlenecks", "preactivated"])
def network(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(request.param())


def test_the_network_computes_as_before_and_its_levels_too(network, images):
    program = export_program(network.eval().requires_grad_(False), SPEC)
    module = program.module()
    before = module(torch.from_numpy(images[:1]))
    limits = image_limits(images, SPEC)
    assert equalize(module, [image[None] for image in images], alpha=0.5, limits=limits) >= 2
    for old, new in zip(before, module(torch.from_numpy(images[:1])), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4 * float(old.abs().max()))


@pytest.mark.parametrize("factor", [pytest.param(50.0, marks=pytest.mark.slow), 200.0])
@pytest.mark.parametrize(
    "dialect",
    [
        pytest.param(openvino.DIALECT, id="openvino", marks=pytest.mark.slow),
        pytest.param(onnxruntime.DIALECT, id="onnxruntime"),
    ],
)
def test_outliers_made_by_scaling_cost_less_than_3_db(network, images, factor, dialect):
    plain = noise_db(network, images, Int8(), dialect)
    scaled = copy.deepcopy(network)
    scale_by_hand(scaled, factor)
    assert noise_db(scaled, images, Int8(), dialect) > plain - 3
    collapsed = noise_db(scaled, images, Int8(equalization=None), dialect)
    assert collapsed < plain - 5


@pytest.mark.parametrize(
    "kind", [pytest.param(Residual, marks=pytest.mark.slow), Tokens, pytest.param(Bottlenecks, marks=pytest.mark.slow)]
)
def test_a_network_without_outliers_loses_nothing(kind, images):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = randomize(kind())
    equalized, plain = (
        noise_db(network, images, settings, openvino.DIALECT) for settings in (Int8(), Int8(equalization=None))
    )
    assert equalized > plain - 0.5


def test_zero_channels_stay_zero_and_finite(network, images):
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter[: len(parameter) // 8] = 0
    assert np.isfinite(noise_db(network, images, Int8(), openvino.DIALECT))


class Clipped(nn.Module):
    """A ReLU6 in front of a depthwise convolution: of 16 channels 4 meet its bound, and 4 hardly leave zero."""

    outputs = ("logits",)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.head = nn.Linear(16, 10)

    def clipped(self, images):
        return self.stem(images).clamp(0, 6)

    def forward(self, images):
        return (self.head(self.depthwise(self.clipped(images)).relu().mean((2, 3))),)


@pytest.fixture
def clipped(images):
    """What the stem gives can reach 30 in loud channels and 0.2 in quiet ones; the depthwise weights make up for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = randomize(Clipped())
    wanted = torch.tensor([30.0] * 4 + [8.0] * 8 + [0.2] * 4)
    with torch.no_grad():
        network.stem.bias.zero_()
        scales = wanted / largest(network, images)
        network.stem.weight *= scales.reshape(-1, 1, 1, 1)
        network.depthwise.weight *= (2 / wanted).reshape(-1, 1, 1, 1)
    return network


def largest(network, images):
    """The most that any image within the limits makes of a channel, wherever it does."""
    low, high = (limit.reshape(1, 3, 1, 1) for limit in image_limits(images, SPEC))
    weight = network.stem.weight.detach()
    return (torch.maximum(weight * low, weight * high).sum((1, 2, 3)) + network.stem.bias.detach()).clamp_min(0)


def equalized_module(network, images):
    module = export_program(network.eval().requires_grad_(False), SPEC).module()
    assert equalize(module, [image[None] for image in images], alpha=0.5, limits=image_limits(images, SPEC)) == 2
    return module


def test_quiet_channels_grow_up_to_the_bound_of_a_clip_and_others_stay(clipped, images):
    module = equalized_module(clipped, images)
    clips = [node for node in module.graph.nodes if node.target in channel_groups._CLIPS]
    module.graph.output_node().args = ((clips[0],),)
    module.recompile()
    image = torch.from_numpy(images[:1])
    with torch.no_grad():
        before, (after,) = clipped.clipped(image)[0], module(image)
    most = largest(clipped, images)
    for channel in range(16):
        loud = before[channel] > 1e-3
        assert loud.any()
        grown = float((after[0, channel] / before[channel])[loud].median())
        assert 1 - 1e-4 < grown < max(1.0, 6 / float(most[channel])) * 1.001
        assert grown > 20 or channel < 12


def test_a_clip_changes_nothing_in_any_image(clipped, images):
    module = equalized_module(clipped, images)
    low, high = (limit.reshape(1, 3, 1, 1) for limit in image_limits(images, SPEC))
    for number in range(8):
        generator = torch.Generator().manual_seed(number)
        image = torch.where(torch.rand(1, 3, SIDE, SIDE, generator=generator) < 0.5, low, high)
        torch.testing.assert_close(module(image)[0], clipped(image)[0], rtol=1e-4, atol=1e-4)


def test_of_two_clips_of_one_convolution_the_lower_bound_counts(images):
    class Twice(Clipped):
        def forward(self, images):
            maps = self.stem(images)
            return (self.head((self.depthwise(maps.clamp(0, 2)) + self.depthwise(maps.clamp(0, 6))).mean((2, 3))),)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = randomize(Twice())
    with torch.no_grad():  # the lightest image makes 4 of every channel, above one bound and below the other
        network.stem.bias.zero_()
        network.stem.weight.abs_()
        network.stem.weight *= (4 / largest(network, images)).reshape(-1, 1, 1, 1)
    module = equalized_module(network, images)
    image = image_limits(images, SPEC)[1].reshape(1, 3, 1, 1).expand(1, 3, SIDE, SIDE).contiguous()
    torch.testing.assert_close(module(image)[0], network(image)[0], rtol=1e-4, atol=1e-4)


def test_images_prepared_in_another_way_have_limits_of_their_own(images):
    low, high = image_limits(images * 255, SPEC)
    assert (low <= torch.from_numpy(255 * images.min((0, 2, 3)))).all()
    assert (high >= torch.from_numpy(255 * images.max((0, 2, 3)))).all()
    gray = image_limits(images[:, :1], replace(SPEC, channels=1))
    assert [limit.shape for limit in gray] == [(1,), (1,)]


def test_quiet_channels_behind_a_clip_keep_their_steps(clipped, images):
    equalized, plain = (
        noise_db(clipped, images, settings, openvino.DIALECT) for settings in (Int8(), Int8(equalization=None))
    )
    assert equalized > plain + 3


def test_only_int8_with_images_is_equalized(images):
    calibration = calibration_set(images, SPEC)
    assert equalization_passes(Fp16(), calibration, SPEC) == ()
    assert equalization_passes(Int8(), None, SPEC) == ()
    assert equalization_passes(Int8(equalization=None), calibration, SPEC) == ()
    (step,) = equalization_passes(Int8(), calibration, SPEC)
    assert step.name == "equalize-channels"


@pytest.mark.parametrize("batch", [1, 3, 5, 12, 16, 20])
def test_every_sampled_image_is_measured_whatever_the_batch(batch, monkeypatch):
    """A last partial batch is filled up, and not left out."""
    images = np.random.default_rng(0).normal(size=(16, 3, SIDE, SIDE)).astype(np.float32)
    measured = []
    monkeypatch.setattr(
        equalization, "equalize", lambda module, batches, *, alpha, limits: measured.extend(batches) or 0
    )
    spec = InputSpec(batch=batch, height=SIDE, width=SIDE)
    (step,) = equalization_passes(Int8(), calibration_set(images, spec), spec)
    step.rewrite(None)
    assert {len(each) for each in measured} == {batch}
    assert {image.tobytes() for image in np.concatenate(measured)} == {image.tobytes() for image in images}
