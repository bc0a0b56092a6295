"""A baseline's figures and what an engine differs in from them, with a small network in numpy for the engine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from deploykit.errors import BundleError, ParityError, StorageError
from deploykit.parity.baseline import Baseline, measure_baseline
from deploykit.parity.compare import ParityAccumulator
from deploykit.parity.drift import find_drift, with_drift

IMAGES = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
WEIGHT = np.random.default_rng(1).normal(size=(192, 10)).astype(np.float32)
MACHINE = "a machine"


def network(images):
    return {"stage1": np.tanh(images), "logits": images.reshape(len(images), -1) @ WEIGHT}


def broken(images):
    return network(images) | {"logits": np.full((len(images), 10), np.nan, np.float32)}


@pytest.fixture(scope="module")
def baseline():
    return measure_baseline(network, IMAGES, MACHINE)


def drift(run, baseline):
    return find_drift(run, IMAGES, baseline, MACHINE, np.random.default_rng(2))


def test_the_network_itself_has_no_faults_and_its_images_are_counted(baseline):
    assert baseline.images > len(IMAGES), "the mixed ones are among them"
    assert {each.faults for each in drift(network, baseline).values()} == {()}


def test_broken_numbers_are_a_fault_and_no_baseline(baseline):
    assert drift(broken, baseline)["logits"].faults == ("NaN or infinity",)
    with pytest.raises(ParityError, match="output 'logits' of the engine holds NaN or infinity"):
        measure_baseline(broken, IMAGES, MACHINE)


@pytest.mark.parametrize(
    "run",
    [
        lambda images: {"stage1": np.tanh(images)},
        lambda images: network(images) | {"logits": images.reshape(len(images), -1) @ WEIGHT[:, :4]},
    ],
    ids=["missing", "smaller"],
)
def test_an_output_that_is_not_there_is_named(baseline, run):
    with pytest.raises(ParityError, match="the engine's output 'logits' is missing or smaller than when it was expor"):
        drift(run, baseline)


def test_an_output_that_no_noise_moves_is_not_asked_for_its_answer_to_noise():
    def still(images):
        return {"constant": np.ones((len(images), 5), np.float32)}

    assert drift(still, measure_baseline(still, IMAGES, MACHINE))["constant"].faults == ()


def test_levels_without_a_baseline_keep_their_figures(baseline):
    accumulator = ParityAccumulator(logits="logits")
    accumulator.update(network(IMAGES), network(IMAGES))
    levels = accumulator.result(min_sqnr_db=30)
    faults = drift(broken, baseline)
    found = with_drift(levels, {"logits": faults["logits"]})
    assert found[0] == levels[0]
    assert (found[1].passed, found[1].faults) == (False, ("NaN or infinity",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_spread": np.zeros(3, np.float32)}, "there are 3 classes' figures for"),
        ({"values": np.full((6, 2), np.inf, np.float32)}, r"the values are \(6, 2\) and \d+ positions"),
        ({"spread": -1.0}, "a figure is negative or not a number"),
    ],
    ids=str,
)
def test_figures_that_cannot_be_are_refused(baseline, change, message):
    with pytest.raises(Exception, match=message):
        dataclasses.replace(baseline.levels["logits"], **change)


def test_levels_of_different_numbers_of_images_are_no_baseline(baseline, tmp_path):
    levels = dict(baseline.levels)
    levels["logits"] = dataclasses.replace(levels["logits"], values=levels["logits"].values[:3])
    Baseline(machine=MACHINE, levels=levels).save(tmp_path / "baseline.npz")
    with pytest.raises(BundleError, match=r"the levels have these numbers of images: \[3, \d+\]; expected one"):
        Baseline.load(tmp_path / "baseline.npz")
    with pytest.raises(StorageError, match=r"the baseline .*absent/baseline\.npz cannot be written"):
        baseline.save(tmp_path / "absent" / "baseline.npz")
