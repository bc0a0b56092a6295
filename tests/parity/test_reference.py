from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deploykit.errors import BundleError, ParityError, SpecError
from deploykit.parity.compare import compare
from deploykit.parity.metrics import sqnr_db
from deploykit.parity.reference import MAX_VALUES, ParityReference, capture, choose_positions

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def small() -> ParityReference:
    return capture(random(2, 3, 4, 4), {"stage1": random(2, 4, 2, 2), "logits": random(2, 5)})


def assert_same(one: ParityReference, other: ParityReference) -> None:
    assert one.images.dtype == np.float32
    assert one.images.tobytes() == other.images.tobytes()
    assert one.shapes == other.shapes
    assert list(one.expected) == list(other.expected)
    for name in one.expected:
        assert one.expected[name].tobytes() == other.expected[name].tobytes()
        assert np.array_equal(one.positions[name], other.positions[name])


@st.composite
def references(draw) -> ParityReference:
    count = draw(st.integers(1, 3))
    images = draw(hnp.arrays(np.float32, (count, *draw(hnp.array_shapes(min_dims=3, max_dims=3))), elements=FLOATS))
    names = draw(st.lists(st.sampled_from(["stem", "stage1", "stage4", "logits", "file"]), min_size=1, unique=True))
    shapes = {name: draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=4)) for name in names}
    outputs = {name: draw(hnp.arrays(np.float32, (count, *shape), elements=FLOATS)) for name, shape in shapes.items()}
    return capture(images, outputs)


@given(references())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_saved_reference_comes_back_bit_for_bit(tmp_path: Path, reference: ParityReference):
    path = tmp_path / "reference.npz"
    reference.save(path)
    assert_same(ParityReference.load(path), reference)
    first = path.read_bytes()
    reference.save(path)
    assert path.read_bytes() == first


@given(st.integers(1, 5_000_000))
@settings(deadline=None)
def test_positions_are_ascending_inside_and_at_most_the_limit(size):
    positions = choose_positions(size)
    assert positions.size == min(size, MAX_VALUES)
    assert positions[0] >= 0
    assert positions[-1] < size
    steps = np.diff(positions)
    assert (steps > 0).all()
    assert steps.max(initial=0) <= 2 * (size / MAX_VALUES + 1)


def test_positions_see_every_row_column_and_channel():
    for channels, side in ((64, 112), (256, 56), (32, 112), (24, 56)):
        positions = choose_positions(channels * side * side)
        assert set(positions % side) == set(range(side))
        assert set(positions // side % side) == set(range(side))
        assert set(positions // (side * side)) == set(range(channels))


def test_large_maps_are_sampled_and_logits_kept_whole():
    outputs = {"stage1": random(1, 8, 64, 64), "stage2": random(1, 4, 8, 8), "logits": random(1, 21_843)}
    reference = capture(random(1, 3, 8, 8), outputs)
    sizes = {name: values.shape[1] for name, values in reference.expected.items()}
    assert sizes == {"stage1": MAX_VALUES, "stage2": 256, "logits": 21_843}
    sampled = reference.sample(outputs)
    assert all(np.array_equal(sampled[name], reference.expected[name]) for name in outputs)


def test_the_sampled_sqnr_is_that_of_the_whole_map():
    clean = random(2, 64, 56, 56)
    noise = clean + 0.05 * random(2, 64, 56, 56, seed=1)
    reference = capture(random(2, 3, 8, 8), {"stage1": clean})
    sampled = compare(reference.expected, reference.sample({"stage1": noise}), min_sqnr_db=20)
    assert sampled[0].sqnr_db == pytest.approx(sqnr_db(clean, noise), abs=0.2)


def test_a_batch_of_the_images_can_be_sampled_alone():
    outputs = {"stage1": random(5, 8, 64, 64)}
    reference = capture(random(5, 3, 8, 8), outputs)
    assert len(reference) == 5
    part = reference.sample({"stage1": outputs["stage1"][3:5].astype(np.float64)})["stage1"]
    assert part.dtype == np.float32
    assert np.array_equal(part, reference.expected["stage1"][3:5])


def test_outputs_that_do_not_fit_the_reference_are_named():
    reference = small()
    with pytest.raises(ParityError, match="engine lacks logits"):
        reference.sample({"stage1": random(2, 4, 2, 2)})
    with pytest.raises(ParityError, match=r"stage1 is \(2, 2, 4\), expected \(4, 2, 2\)"):
        reference.sample({"stage1": random(2, 2, 2, 4), "logits": random(2, 5)})


def test_a_nan_of_the_engine_survives_sampling():
    bad = random(2, 4, 2, 2)
    bad[0, 0, 0, 0] = math.nan
    sampled = small().sample({"stage1": bad, "logits": random(2, 5)})
    assert np.isnan(sampled["stage1"]).any()


def test_capture_refuses_what_cannot_be_a_reference():
    images = random(2, 3, 4, 4)
    for wrong in (images.astype(np.float64), images[0], images[:0]):
        with pytest.raises(SpecError, match=r"expected \(N, C, H, W\) float32"):
            capture(wrong, {"logits": random(2, 5)})
    for output in (random(3, 5), random(2), random(2, 0)):
        with pytest.raises(SpecError, match="'logits'"):
            capture(images, {"logits": output})
    with pytest.raises(SpecError, match="at least one"):
        capture(images, {})
    with pytest.raises(ParityError, match="'logits' holds NaN"):
        capture(images, {"logits": np.full((2, 5), math.nan, np.float32)})


def test_a_flipped_byte_is_an_error_or_changes_nothing(tmp_path):
    path = tmp_path / "reference.npz"
    reference = small()
    reference.save(path)
    good = path.read_bytes()
    refused = 0
    for position in range(0, len(good), 3):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        path.write_bytes(bad)
        try:
            loaded = ParityReference.load(path)
        except BundleError:
            refused += 1
        else:
            assert_same(loaded, reference)
    assert refused > len(good) / 3 * 0.6


def test_a_cut_file_a_missing_file_and_something_else_are_bundle_errors(tmp_path):
    path = tmp_path / "reference.npz"
    small().save(path)
    good = path.read_bytes()
    for content in (b"", good[: len(good) // 2], b"not a zip", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(BundleError, match=r"reference\.npz cannot be read"):
            ParityReference.load(path)
    for absent in (tmp_path / "absent.npz", tmp_path):
        with pytest.raises(BundleError, match="cannot be read"):
            ParityReference.load(absent)
    with pytest.raises(BundleError, match="cannot be written"):
        small().save(tmp_path / "absent" / "reference.npz")


def test_pickled_and_foreign_arrays_are_refused(tmp_path):
    path = tmp_path / "reference.npz"
    np.savez(path, images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(BundleError, match="allow_pickle"):
        ParityReference.load(path)
    np.savez(path, something=np.ones(3))
    with pytest.raises(BundleError, match="KeyError"):
        ParityReference.load(path)


def test_a_lost_output_is_noticed(tmp_path):
    path = tmp_path / "reference.npz"
    small().save(path)
    with np.load(path) as stored:
        arrays = {name: array for name, array in stored.items() if not name.endswith("/logits")}
    np.savez(path, **arrays)
    with pytest.raises(BundleError, match="logits"):
        ParityReference.load(path)


@pytest.mark.parametrize(
    ("key", "array"),
    [
        ("images", np.ones((2, 3, 4, 4))),
        ("images", np.ones((3, 3, 4, 4), np.float32)),
        ("expected/logits", np.ones((2, 4), np.float32)),
        ("positions/logits", np.array([0, 1, 2, 3, 99])),
        ("positions/logits", np.array([0, 1, 1, 3, 4])),
        ("positions/logits", np.array([-1, 1, 2, 3, 4])),
        ("shape/logits", np.array([2])),
        ("shape/logits", np.array(["x"])),
    ],
)
def test_arrays_that_do_not_go_together_are_refused(tmp_path, key, array):
    path = tmp_path / "reference.npz"
    small().save(path)
    with np.load(path) as stored:
        arrays = dict(stored.items())
    np.savez(path, **(arrays | {key: array}))
    with pytest.raises(BundleError, match="cannot be read"):
        ParityReference.load(path)


def test_a_reference_cannot_be_made_of_parts_of_different_names():
    reference = small()
    with pytest.raises(SpecError, match="same names"):
        dataclasses.replace(reference, positions={"stage1": reference.positions["stage1"]})
