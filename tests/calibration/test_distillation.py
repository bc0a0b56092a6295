from dataclasses import replace

import numpy as np
import pytest

from deploykit.calibration import distillation
from deploykit.calibration.distillation import FEWEST_IMAGES, _batches, distill
from deploykit.calibration.fake_quantized_network import FakeQuantizedNetwork
from deploykit.calibration.images import calibration_set
from deploykit.calibration.plan import plan_key
from deploykit.errors import CalibrationError, SpecError
from deploykit.spec import InputSpec, Int8
from tests.calibration.networks import SIDE, Residual, float_network_of, plan_of
from tests.calibration.test_fake_quantized_network import in_torch

SETTINGS = Int8(distill_steps=40)


@pytest.fixture(scope="module")
def images(photographs):
    """Crops of photographs."""
    whole = calibration_set(photographs, InputSpec(height=2 * SIDE, width=2 * SIDE)).sample(6)
    corners = [(0, 0), (0, SIDE), (SIDE, 0), (SIDE, SIDE)]
    return np.concatenate([whole[:, :, top : top + SIDE, left : left + SIDE] for top, left in corners])


@pytest.fixture(scope="module")
def unseen(photographs):
    """Crops between those of `images` and of other photographs."""
    whole = calibration_set(photographs, InputSpec(height=2 * SIDE, width=2 * SIDE)).sample(12)
    return np.ascontiguousarray(whole[:, :, SIDE // 2 : -SIDE // 2, SIDE // 2 : -SIDE // 2])


@pytest.fixture(scope="module")
def network(residual):
    return float_network_of(Residual, residual.master, residual.images)


@pytest.fixture(scope="module")
def plan(residual, images):
    return plan_of(residual.graph, images[:4], Int8(calibrator="minmax", reduce_range=False))


def loss(network, plan, images):
    found, exact = in_torch(FakeQuantizedNetwork(network, plan), images), in_torch(network.module, images)
    shares = [np.square(one - two).sum() / np.square(two).sum() for one, two in zip(found, exact, strict=True)]
    return float(np.mean(shares))


def test_it_keeps_more_than_where_it_began_of_images_that_it_never_saw(network, plan, images, unseen):
    steps = []
    tuned = distill(network, plan, images, SETTINGS, on_step=steps.append)
    assert loss(network, tuned, unseen) < 0.95 * loss(network, plan, unseen)
    assert loss(network, tuned, images) < loss(network, plan, images)
    assert (steps[0].step, steps[-1].steps) == (0, 40)
    assert steps[-1].sqnr_db > steps[0].sqnr_db


def test_again_gives_the_same_and_another_seed_does_not(network, plan, images):
    settings = replace(SETTINGS, distill_steps=12)
    tuned, again = (distill(network, plan, images, settings) for _ in range(2))
    assert tuned is not plan
    assert again.ranges == tuned.ranges
    assert all(np.array_equal(again.weights[node].steps, weight.steps) for node, weight in tuned.weights.items())
    other = distill(network, plan, images, replace(settings, distill_seed=1))
    assert other.ranges != tuned.ranges


def test_what_is_worse_than_the_start_is_not_kept(network, plan, images, monkeypatch):
    monkeypatch.setattr(distillation, "WEIGHT_RATE", 1e3)
    monkeypatch.setattr(distillation, "STEPS_A_CHECK", 2)
    steps = []
    assert distill(network, plan, images, SETTINGS, on_step=steps.append) is plan
    assert len(steps) == 1 + 2 * distillation.PATIENCE  # and it does not go on for long
    assert steps[-1].sqnr_db == steps[0].sqnr_db


def test_it_ends_when_its_time_is_up(network, plan, images):
    steps = []
    distill(network, plan, images, replace(SETTINGS, distill_minutes=1e-9), on_step=steps.append)
    assert [step.step for step in steps] == [0, 1]


def test_what_an_engine_gives_weighs_half(network):
    *levels, head = network.outputs
    assert len(levels) == 2
    assert distillation._shares(replace(network, engine_outputs=(head,))).tolist() == [0.25, 0.25, 0.5]
    assert distillation._shares(replace(network, engine_outputs=tuple(levels))).tolist() == [0.25, 0.25, 0.5]
    assert distillation._shares(network).tolist() == pytest.approx([1 / 3] * 3)


def test_too_few_images_are_told(network, plan, images):
    with pytest.raises(CalibrationError, match=f"{FEWEST_IMAGES - 1} were given; expected at least {FEWEST_IMAGES}"):
        distill(network, plan, images[: FEWEST_IMAGES - 1], SETTINGS)


@pytest.mark.parametrize("wrong", [{"distill_steps": 0}, {"distill_minutes": 0.0}, {"distill_seed": -1}])
def test_settings_out_of_range_are_told(wrong):
    with pytest.raises(SpecError, match=f"{next(iter(wrong))} is"):
        Int8(**wrong)


def test_what_decides_the_tuning_is_in_the_key_of_a_distilled_plan_alone():
    distilled, adaptive = Int8(rounding="distilled"), Int8(rounding="adaptive")

    def key(settings, **tuned_for):
        return plan_key("weights", "images", settings, **tuned_for)

    assert key(distilled) != key(replace(distilled, distill_steps=7))
    assert key(distilled) != key(replace(distilled, distill_seed=7))
    assert key(distilled) != key(distilled, tuned_for="some runtime")
    assert key(adaptive) == key(replace(adaptive, distill_steps=7))


def test_batches_hold_each_image_once_mirrored_or_not_with_a_rectangle_of_another():
    images = np.random.default_rng(0).normal(size=(40, 3, 20, 30)).astype(np.float32)
    batches, seen = _batches(images, seed=0), []
    for _ in range(3):
        for image in next(batches).numpy():
            forms = {(n, m): form[n] for m, form in enumerate((images, images[..., ::-1])) for n in range(40)}
            places = {key: (form == image).all(0) for key, form in forms.items() if (form == image).all(0).any()}
            (whole, outside), (_, inside) = sorted(places.items(), key=lambda found: not found[1][0, 0])
            assert np.array_equal(outside, ~inside)
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            assert inside.sum() == len(rows) * len(columns)
            assert 0.3 * 20 - 1 <= len(rows) <= 0.8 * 20 and 0.3 * 30 - 1 <= len(columns) <= 0.8 * 30
            seen.append(whole)
    assert len({number for number, _ in seen}) == len(seen) == 36
    assert {mirrored for _, mirrored in seen} == {0, 1}
    again = next(_batches(images, seed=0)).numpy()
    assert np.array_equal(again, next(_batches(images, seed=0)).numpy())
