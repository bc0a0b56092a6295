"""Engines that give other numbers than the exported one: `verify` names each, and never a rerun of the good one."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from deploykit import export_backbone, verify_bundle
from deploykit.backends.onnxruntime.adapter import OnnxRuntime
from deploykit.bundle import MANIFEST, MANIFEST_DIGEST, open_bundle, read_manifest, write_manifest
from deploykit.parity import baseline, drift
from deploykit.parity.baseline import BASELINE_FILE, Baseline
from deploykit.parity.reference import ParityReference
from deploykit.spec import Fp16, Fp32, Int8

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

SIDE, CLASSES = 24, 10
PRECISIONS = {"fp32": Fp32(), "fp16": Fp16(), "int8": Int8()}


class Small(nn.Module):
    """Three convolutions and a classifier, with weights of the size that training leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 16, 3, 1, 1), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)),
        )
        with torch.no_grad():
            self.layers[-1].weight.mul_(4)

    def forward(self, x):
        return self.layers(x)


class Pair(nn.Module):
    """Two maps of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x):
        one = self.one(x)
        return {"first": one, "second": self.two(one.relu())}


def images(count: int = 24, seed: int = 0) -> np.ndarray:
    """Smooth images, as photographs are."""
    noise = np.random.default_rng(seed).standard_normal((count, 3, SIDE // 4, SIDE // 4)).astype(np.float32)
    return nn.functional.interpolate(torch.from_numpy(noise), size=SIDE, mode="bilinear").numpy()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    """The small classifier in each precision, and the two maps in INT8."""
    root = tmp_path_factory.mktemp("gate")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small, pair = Small().eval(), Pair().eval()
    common = {"runtime": "onnxruntime", "calibration": images(), "image_size": SIDE}
    for name, precision in PRECISIONS.items():
        export_backbone(small, root / name, precision=precision, **common)
    export_backbone(pair, root / "levels", precision=Int8(min_sqnr_db=10), features_only=True, **common)
    return {path.name: path for path in root.iterdir()}


def signed_again(folder: Path) -> None:
    """Let the manifest describe the files as they are now."""
    manifest = read_manifest(folder)
    for name in (MANIFEST, MANIFEST_DIGEST):
        (folder / name).unlink()
    write_manifest(folder, manifest)
    open_bundle(folder)


def planted(bundle: Path, folder: Path, change) -> Path:
    """A copy whose engine gives ``change(graph, true name, name)`` in place of what it gave."""
    shutil.copytree(bundle, folder)
    model = onnx.load(folder / "model.onnx")
    graph = model.graph
    (output,) = [output.name for output in graph.output]
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == output:
                node.output[index] = "true"
        for index, name in enumerate(node.input):
            if name == output:
                node.input[index] = "true"
    change(graph, output)
    onnx.save(model, folder / "model.onnx")
    signed_again(folder)
    return folder


def times(*factors: float):
    def change(graph, output):
        graph.initializer.append(numpy_helper.from_array(np.array(factors, np.float32), "factors"))
        graph.node.append(helper.make_node("Mul", ["true", "factors"], [output]))

    return change


def gathered(order: list[int]):
    def change(graph, output):
        graph.initializer.append(numpy_helper.from_array(np.array(order), "order"))
        graph.node.append(helper.make_node("Gather", ["true", "order"], [output], axis=1))

    return change


def one_class(index: int, factor: float):
    return times(*(factor if each == index else 1.0 for each in range(CLASSES)))


def swapped(one: int, other: int):
    order = list(range(CLASSES))
    order[one], order[other] = order[other], order[one]
    return gathered(order)


def look_up(bundle: Path):
    """The answer that the bundle carries for the nearest of its images; the network is not computed."""

    def change(graph, output):
        reference = ParityReference.load(bundle / "reference.npz")
        stored = reference.images.reshape(len(reference), -1)
        for name, array in (
            ("stored", stored),
            ("answers", reference.expected["logits"]),
            ("row", np.array([1, -1])),
            ("axis", np.array([1])),
        ):
            graph.initializer.append(numpy_helper.from_array(array, f"lookup_{name}"))
        del graph.node[:]
        graph.node.extend(
            [
                helper.make_node("Reshape", [graph.input[0].name, "lookup_row"], ["flat"]),
                helper.make_node("Sub", ["lookup_stored", "flat"], ["difference"]),
                helper.make_node("ReduceSumSquare", ["difference", "lookup_axis"], ["distance"], keepdims=0),
                helper.make_node("ArgMin", ["distance"], ["nearest"], axis=0, keepdims=1),
                helper.make_node("Gather", ["lookup_answers", "nearest"], [output], axis=0),
            ]
        )

    return change


WRONG = {
    "x1.02": times(1.02),
    "x1.05": times(1.05),
    "x1.1": times(1.1),
    "x1.2": times(1.2),
    "x0.9": times(0.9),
    "swapped": swapped(0, 1),
    "swapped others": swapped(3, 7),
    "dead": one_class(2, 0.0),
    "dead other": one_class(9, 0.0),
    "negated": one_class(4, -1.0),
}


@pytest.fixture(params=["here", "elsewhere"])
def machine(request, monkeypatch):
    """The machine of the export, and another one, on which more may differ."""
    if request.param == "elsewhere":
        monkeypatch.setattr("deploykit.verification.machine_key", lambda seen, threads: "another")
    return request.param


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_exported_engine_passes_again_and_again(bundles, precision, machine):
    for _ in range(20):
        report = verify_bundle(bundles[precision])
        assert report.passed, report.levels
    assert report.levels[0].agreement_db == 300.0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_engine_is_found(bundles, tmp_path, precision, wrong, machine):
    folder = planted(bundles[precision], tmp_path / "planted", WRONG[wrong])
    report = verify_bundle(folder)
    assert not report.passed, report.levels
    assert report.failures()[0].faults


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_engine_that_looks_the_answers_up_is_found(bundles, tmp_path, precision, machine):
    report = verify_bundle(planted(bundles[precision], tmp_path / "planted", look_up(bundles[precision])))
    assert not report.passed
    assert "do not follow the images" in " ".join(report.failures()[0].faults)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_answers_recorded_from_a_good_run_are_found(bundles, monkeypatch, precision):
    """All that the gate asks again is answered with what was right: only noise that nobody has seen tells."""
    recorded: dict[bytes, list[np.ndarray]] = {}
    compute = OnnxRuntime._run

    def record(model, batch):
        found = compute(model, batch)
        recorded[batch.tobytes()] = [output.copy() for output in found]
        return found

    monkeypatch.setattr(OnnxRuntime, "_run", record)
    assert verify_bundle(bundles[precision]).passed
    last = next(iter(recorded.values()))
    monkeypatch.setattr(OnnxRuntime, "_run", lambda model, batch: recorded.get(batch.tobytes(), last))
    assert not verify_bundle(bundles[precision]).passed


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_engine_that_gives_its_last_answer_is_found(bundles, monkeypatch, precision):
    compute, last = OnnxRuntime._run, []

    def stale(model, batch):
        last.append(compute(model, batch))
        return last[max(0, len(last) - 2)]

    monkeypatch.setattr(OnnxRuntime, "_run", stale)
    assert not verify_bundle(bundles[precision]).passed


def test_swapped_levels_are_found(bundles, tmp_path, machine):
    folder = shutil.copytree(bundles["levels"], tmp_path / "planted")
    model = onnx.load(folder / "model.onnx")
    names = [output.name for output in model.graph.output]
    swap = dict(zip(names, reversed(names), strict=True))
    for node in model.graph.node:
        node.output[:] = [swap.get(name, name) for name in node.output]
        node.input[:] = [swap.get(name, name) for name in node.input]
    onnx.save(model, folder / "model.onnx")
    signed_again(folder)
    assert verify_bundle(bundles["levels"]).passed
    report = verify_bundle(folder)
    assert not report.passed
    assert len(report.failures()) == 2


def test_a_bundle_without_a_baseline_is_held_to_its_budget(bundles, tmp_path):
    folder = planted(bundles["int8"], tmp_path / "planted", times(1.02))
    (folder / BASELINE_FILE).unlink()
    signed_again(folder)
    report = verify_bundle(folder)
    assert report.passed
    assert report.levels[0].agreement_db is None


def test_recording_keeps_a_baseline_where_there_was_none(bundles, tmp_path):
    folder = shutil.copytree(bundles["int8"], tmp_path / "copy")
    (folder / BASELINE_FILE).unlink()
    signed_again(folder)
    verify_bundle(folder, record=True)
    assert BASELINE_FILE in open_bundle(folder).files
    assert verify_bundle(folder).levels[0].agreement_db == 300.0


@pytest.mark.parametrize("wrong", [None, "x1.2", "dead", "negated", "swapped"])
@pytest.mark.parametrize("own_images", [False, True])
def test_another_bundle_is_a_reference_on_any_images(bundles, tmp_path, wrong, own_images):
    folder = planted(bundles["int8"], tmp_path / "planted", WRONG[wrong]) if wrong else bundles["int8"]
    others = images(12, seed=5) if own_images else None
    (further,) = verify_bundle(folder, images=others, reference=bundles["fp32"]).further
    assert further.passed is (wrong is None), further.levels
    assert further.images == (12 if own_images else 16)


def test_images_of_the_users_own_show_looked_up_answers(bundles, tmp_path):
    assert verify_bundle(bundles["int8"], images=images(12, seed=5)).passed
    folder = planted(bundles["int8"], tmp_path / "planted", look_up(bundles["int8"]))
    (further,) = verify_bundle(folder, images=images(12, seed=5)).further
    assert not further.passed


def test_a_baseline_comes_back_as_it_was_saved_and_damage_is_refused(bundles, tmp_path):
    from deploykit.errors import BundleError

    kept = Baseline.load(bundles["int8"] / BASELINE_FILE)
    kept.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (bundles["int8"] / BASELINE_FILE).read_bytes()
    level = kept.levels["logits"]
    for change in ({"size": 1}, {"spread": -1.0}, {"values": level.values[:, :3]}, {"response_db": float("nan")}):
        with pytest.raises(ValueError, match=r"position|figure|values"):
            dataclasses.replace(level, **change)
    (tmp_path / "again.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(BundleError, match="baseline"):
        Baseline.load(tmp_path / "again.npz")


def test_what_moves_with_roundings_alone_passes_elsewhere(bundles):
    """Twice the change of the images by which the spread is measured, as a stand-in for other kernels."""
    kept = Baseline.load(bundles["int8"] / BASELINE_FILE)
    level = kept.levels["logits"]
    generator = np.random.default_rng(3)
    moved = level.values + level.class_spread * generator.standard_normal(level.values.shape).astype(np.float32)
    found = drift._level_drift(level, moved, moved[:8], same=False)
    assert not [fault for fault in found.faults if "noise" not in fault]
    assert drift._level_drift(level, moved, moved[:8], same=True).faults


@pytest.mark.parametrize("count", [1, 3, 9])
def test_a_baseline_of_any_number_of_images_holds(count):
    """Mixed images stand behind the bundle's own, which must not be taken for noisy ones."""
    weight = np.random.default_rng(1).standard_normal((3 * 8 * 8, 12)).astype(np.float32)

    def run(given):
        return {"logits": given.reshape(len(given), -1) @ weight}

    own = np.random.default_rng(2).standard_normal((count, 3, 8, 8)).astype(np.float32)
    kept = baseline.measure_baseline(run, own, "here")
    found = drift.find_drift(run, own, kept, "here", np.random.default_rng(4))
    assert not found["logits"].faults


def test_what_has_no_budget_states_none(bundles):
    report = verify_bundle(bundles["fp32"], images=images(12, seed=5), reference=bundles["int8"])
    (further,) = report.further
    assert "budget" not in str(further.render().caption)
    assert "budget 80 dB" in str(report.render().caption)
    assert not [note for note in further.notes() if "budget" in note]


def test_another_bundle_does_not_change_what_is_recorded(bundles, tmp_path):
    folder = shutil.copytree(bundles["fp32"], tmp_path / "copy")
    wrong = planted(bundles["fp32"], tmp_path / "wrong", WRONG["negated"])
    assert not verify_bundle(folder, reference=wrong, record=True).passed
    assert open_bundle(folder).status == "parity_checked"


def test_broken_answers_to_images_of_the_users_own_keep_their_name(bundles, monkeypatch):
    compute, others = OnnxRuntime._run, images(12, seed=5)

    def broken(model, batch):
        found = compute(model, batch)
        if any(np.array_equal(batch[0], each) for each in others):
            found[0][0, 0] = np.nan
        return found

    monkeypatch.setattr(OnnxRuntime, "_run", broken)
    (further,) = verify_bundle(bundles["fp32"], images=others).further
    (level,) = further.failures()
    assert (level.name, level.sqnr_db, level.faults) == ("logits", -300.0, ("NaN or infinity",))


def test_answers_that_depend_on_their_neighbours_in_the_batch_may_move(monkeypatch):
    def run(asked):
        """Quantize with one scale for all images of a batch, as dynamic quantization does."""
        return {"map": np.round(asked.reshape(len(asked), -1) * 127 / np.abs(asked).max()) * np.abs(asked).max()}

    asked = images(12)
    kept = baseline.measure_baseline(run, asked, "here")
    assert kept.machine == ""
    for seed in range(20):
        found = drift.find_drift(run, asked, kept, "here", np.random.default_rng(seed))
        assert not found["map"].faults


def test_an_int8_engine_of_any_batch_passes_again_and_again(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = Small().eval()
    common = {"runtime": "onnxruntime", "calibration": images(), "image_size": SIDE, "batch_size": "dynamic"}
    export_backbone(small, tmp_path / "bundle", precision=Int8(), **common)
    for _ in range(5):
        assert verify_bundle(tmp_path / "bundle").passed
