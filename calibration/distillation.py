"""Tune a plan by gradient so that the quantized network gives the FP32 network's features: self-distillation.

Weights, biases, ranges and rounding of the whole network are learned together on the calibration images, without
labels: the teacher is the network itself in FP32 (Hinton et al. 2015; straight-through rounding with learned
steps as in LSQ, Esser et al. 2020). Layer by layer, as adaptive rounding does it, a layer cannot make up for what
those before it lose.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from deploykit.arrays import FloatArray
from deploykit.calibration.dialect import Dialect
from deploykit.calibration.fake_quantized_network import EVERY_RUNTIME, FakeQuantizedNetwork
from deploykit.calibration.float_network import FloatNetwork
from deploykit.calibration.plan import QuantizationPlan
from deploykit.errors import CalibrationError
from deploykit.progress import TuningStep
from deploykit.spec import Int8

MOST_IMAGES = 512
"""How many calibration images are learned from at most: they are all in memory."""
FEWEST_IMAGES = 8
BATCH = 12
PIXELS_AT_ONCE = 2 * 224 * 224
"""A batch is computed in parts of about so many pixels, which bounds memory and, on a CPU, is fastest."""
HELD_OUT_SHARE, MOST_HELD_OUT = 8, 32
"""One of so many images is not learned from, but up to so many in all."""
MIXED_SIDES = (0.3, 0.8)
"""Between which shares of an image's sides the part lies that is taken from another image."""
STEPS_A_CHECK = 20
PATIENCE = 6
"""After so many checks without a gain on the images held out it is over."""
WEIGHT_RATE, BIAS_RATE, WEIGHT_SCALE_RATE, SCALE_RATE, ZERO_RATE = 0.005, 2e-5, 2e-5, 1e-4, 1e-2
"""Adam's rates: of weights in steps of their layer's scale, of biases as a share of their root mean square, of the
logarithms of weights' and of activations' scales, and of zero points in integers. All channels move at once, so that
rates ten times as high lose more in the first steps than they ever gain."""
LAST_SHARE = 0.1
"""What is left of the rates at the end of their cosine."""


def distill(
    network: FloatNetwork,
    plan: QuantizationPlan,
    images: FloatArray,
    settings: Int8,
    *,
    dialect: Dialect = EVERY_RUNTIME,
    on_step: Callable[[TuningStep], None] = lambda step: None,
) -> QuantizationPlan:
    """Return the plan tuned, or as it is where that is better on images held out.

    Equal images and settings give equal plans on one machine, unless the time is up before the steps are.

    Args:
        network: in FP32.
        plan: of its master graph; where to begin.
        images: ``(N, C, H, W)`` calibration images.
        settings: ``distill_steps``, ``distill_minutes`` and ``distill_seed``.
        dialect: what a runtime keeps in float and rounds besides.
        on_step: hears of each step.

    Raises:
        CalibrationError: too few images to hold some out.
    """
    if len(images) < FEWEST_IMAGES:
        raise CalibrationError(
            f"tuning by distillation holds some images out, and {len(images)} were given; expected at least "
            f"{FEWEST_IMAGES}, better some hundred. Give more images, or choose another recipe."
        )
    student = FakeQuantizedNetwork(network, plan, dialect)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(settings.distill_seed)
        return _Tuning(student, network.module, images, settings, _shares(network)).run(on_step)


@dataclass(eq=False)
class _Tuning:
    student: FakeQuantizedNetwork
    teacher: nn.Module
    images: FloatArray
    settings: Int8
    shares: Tensor
    best: dict[str, Tensor] = field(default_factory=dict)

    def run(self, on_step: Callable[[TuningStep], None]) -> QuantizationPlan:
        learned, held_out = _split(self.images)
        steps, until = self.settings.distill_steps, time.monotonic() + 60 * self.settings.distill_minutes
        optimizer = torch.optim.Adam(list(_rates(self.student)))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step / steps))
        least = started = self._loss(held_out)
        waited = 0
        on_step(TuningStep(step=0, steps=steps, sqnr_db=_db(started)))
        for step, batch in zip(range(1, steps + 1), _batches(learned, self.settings.distill_seed), strict=False):
            optimizer.zero_grad(set_to_none=True)
            for part in _parts(batch):
                share = len(part) / len(batch)
                (share * self._error(part)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            last = step == steps or time.monotonic() > until
            if step % STEPS_A_CHECK == 0 or last:
                loss = self._loss(held_out)
                waited = 0 if loss < least else waited + 1
                if loss < least:
                    least, self.best = loss, _state(self.student)
            on_step(TuningStep(step=step, steps=steps, sqnr_db=_db(least)))
            if last or waited == PATIENCE:
                break
        if not self.best:
            return self.student.start
        self.student.load_state_dict(self.best)
        return self.student.learned_plan()

    def _error(self, batch: Tensor) -> Tensor:
        """Return the noise in the outputs, each as a share of its power, in their weighted mean."""
        with torch.no_grad():
            expected = self.teacher(batch)
        noise = [
            (found - target).square().sum() / target.square().sum().clamp_min(1e-12)
            for found, target in zip(self.student(batch), expected, strict=True)
        ]
        return torch.dot(self.shares, torch.stack(noise))

    @torch.no_grad()
    def _loss(self, images: FloatArray) -> float:
        parts = _parts(_nhwc(images))
        sums = [len(part) * float(self._error(part)) for part in parts]
        return math.fsum(sums) / len(images)


def _shares(network: FloatNetwork) -> Tensor:
    """Return the weight of each output's noise: half for those that an engine gives, half for the levels inside it."""
    given = torch.tensor([not network.engine_outputs or name in network.engine_outputs for name in network.outputs])
    within = int((~given).sum())
    if not within:
        return given / given.sum()
    return torch.where(given, 0.5 / given.sum(), torch.tensor(0.5 / within))


def _rates(student: FakeQuantizedNetwork) -> Iterator[dict[str, object]]:
    """Yield the parameters that are learned with their rates; all others are frozen."""
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    layers, quantizers = student.layers.values(), student.quantizers.values()
    for weight in dict.fromkeys(layer.weight for layer in layers):
        yield {"params": [weight.weight.requires_grad_(True)], "lr": WEIGHT_RATE * weight.step}
        if not weight.reduce_range:
            yield {"params": [weight.log_scales.requires_grad_(True)], "lr": WEIGHT_SCALE_RATE}
    for bias in (layer.bias for layer in layers if layer.bias is not None):
        size = float(bias.detach().square().mean().sqrt())
        yield {"params": [bias.requires_grad_(True)], "lr": BIAS_RATE * max(size, 1e-6)}
    for quantizer in quantizers:
        yield {"params": [quantizer.log_scale.requires_grad_(True)], "lr": SCALE_RATE}
        if isinstance(quantizer.zero_point, nn.Parameter):
            yield {"params": [quantizer.zero_point.requires_grad_(True)], "lr": ZERO_RATE}


def _split(images: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Images to learn from and images held out, evenly spaced."""
    count = min(max(len(images) // HELD_OUT_SHARE, 2), MOST_HELD_OUT)
    held = np.zeros(len(images), bool)
    held[np.linspace(0, len(images) - 1, count).astype(int)] = True
    return images[~held], images[held]


def _batches(images: FloatArray, seed: int) -> Iterator[Tensor]:
    """Yield batches without end, each image once before any comes again, half of them mirrored, all of them mixed."""
    generator = np.random.default_rng(seed)
    size = min(BATCH, len(images))
    while True:
        order = generator.permutation(len(images))
        for start in range(0, len(order) - size + 1, size):
            batch = images[order[start : start + size]]
            mirrored = generator.random(size) < 0.5
            batch[mirrored] = batch[mirrored, ..., ::-1]
            yield _nhwc(_mixed(batch, generator))


def _mixed(images: FloatArray, generator: np.random.Generator) -> FloatArray:
    """Return images with a rectangle of each replaced by that of another: CutMix (Yun et al. 2019), without its labels.

    The teacher says what they are to give, so that a few photographs are many different inputs.
    """
    mixed, others = images.copy(), np.roll(images, 1, axis=0)
    sides = np.array(images.shape[2:])
    for image, other in zip(mixed, others, strict=True):
        cut = (sides * generator.uniform(*MIXED_SIDES, 2)).astype(int)
        top, left = generator.integers(0, sides - cut + 1)
        place = np.s_[:, top : top + cut[0], left : left + cut[1]]
        image[place] = other[place]
    return mixed


def _nhwc(images: FloatArray) -> Tensor:
    """Return images in the layout in which a CPU's convolutions are fastest."""
    return torch.from_numpy(images).to(memory_format=torch.channels_last)


def _parts(images: Tensor) -> tuple[Tensor, ...]:
    """Split images into equal parts to compute one after the other."""
    pixels = len(images) * images.shape[2] * images.shape[3]
    return images.chunk(min(len(images), -(-pixels // PIXELS_AT_ONCE)))


def _share(done: float) -> float:
    return LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _db(loss: float) -> float:
    return -10 * math.log10(max(loss, 1e-20))
