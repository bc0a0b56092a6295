"""Which processor this is, and where INT8 products saturate."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit import processor
from deploykit.calibration.ranges import quantize_weight
from deploykit.processor import PROCESSOR_TARGETS, Processor, read_processor, saturates


@pytest.mark.parametrize(
    ("text", "model", "int8"),
    [
        ("model name\t: Core X\nflags\t\t: sse avx2 avx_vnni\n", "Core X", ("AVX2", "AVX-VNNI")),
        ("model name\t: Xeon X\nflags\t\t: avx2 avx512_vnni amx_int8\n", "Xeon X", ("AVX2", "AVX512-VNNI", "AMX-INT8")),
        ("Features\t: fp asimd asimddp i8mm\nModel\t\t: Board X\n", "Board X", ("dotprod", "i8mm")),
        ("Features\t: fp asimd\nModel\t\t: Board Y\n", "Board Y", ()),
    ],
)
def test_int8_instructions_are_read_from_cpuinfo(tmp_path, text, model, int8):
    (tmp_path / "cpuinfo").write_text(text)
    found = read_processor(tmp_path / "cpuinfo")
    assert (found.model, found.int8) == (model, int8)
    assert found.cores >= 1


def test_a_system_without_cpuinfo_still_has_a_processor(tmp_path):
    found = read_processor(tmp_path / "absent")
    assert found.model
    assert (found.int8, found.absent) == ((), ())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: sse avx2\n", True),
        ("flags\t\t: avx2 avx512f avx512bw\n", True),
        ("flags\t\t: avx2 avx_vnni\n", False),
        ("flags\t\t: avx2 avx512_vnni\n", False),
        ("Features\t: fp asimd\n", False),
        ("model name\t: unknown\n", False),
    ],
    ids=["avx2", "avx512", "avx-vnni", "avx512-vnni", "arm", "unknown"],
)
def test_products_saturate_on_x86_without_vnni(flags, expected, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(flags)
    found = read_processor(tmp_path / "cpuinfo")
    assert found.saturates is expected
    monkeypatch.setattr(processor, "this_processor", lambda: found)
    assert saturates(None) is expected


def test_a_target_decides_whatever_this_machine_is(monkeypatch):
    old = Processor(model="old", cores=1, int8=("AVX2",), absent=("AVX512-VNNI", "AVX-VNNI", "AMX-INT8"))
    monkeypatch.setattr(processor, "this_processor", lambda: old)
    assert saturates(None)
    assert {name: saturates(name) for name in PROCESSOR_TARGETS} == PROCESSOR_TARGETS


def vpmaddubsw(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """uint8 by int8, two products added in int16 with saturation, those sums in int32: ``(N, K) x (K, M)``."""
    products = activations.astype(np.int32)[:, :, None] * weights.astype(np.int32)[None]
    pairs = products[:, ::2] + products[:, 1::2]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(1)


@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_sums_of_two_products_fit_16_bits_when_the_range_is_reduced(reduce_range, seed):
    """In any order: the worst is that in which the largest weights of one sign are neighbours."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_t(3, size=(64, 32)).astype(np.float32)
    integers = np.sort(quantize_weight(weight, 1, reduce_range=reduce_range)[0], axis=0)
    activations = generator.integers(0, 256, (16, 64), dtype=np.uint8)
    activations[:, :8] = activations[:, -8:] = 255
    whole = activations.astype(np.int32) @ integers.astype(np.int32)
    assert np.array_equal(vpmaddubsw(activations, integers), whole) is reduce_range


def test_a_reduced_range_is_finer_than_7_bits_wherever_one_weight_stands_out():
    weight = np.array([[1.0, -1.0, 0.1], [1.0, 1.0, 0.1], [1.0, 0.5, 0.5]], np.float32)
    integers, scales = quantize_weight(weight, 0, reduce_range=True)
    np.testing.assert_allclose(scales, np.array([1.1, 2.0, 1.5]) / 127, rtol=1e-6)
    assert integers.tolist() == [[115, -115, 12], [64, 64, 6], [85, 42, 42]]


def test_a_machine_without_cpuinfo_has_a_key_that_differs_by_what_was_seen(tmp_path):
    absent = tmp_path / "absent"
    one, other = (processor.machine_key({"device": device}, 2, absent) for device in ("cpu", "gpu"))
    assert one != other
    assert one == processor.machine_key({"device": "cpu"}, 2, absent)
    (tmp_path / "cpuinfo").write_text("flags\t\t: sse avx2\n")
    assert processor.machine_key({"device": "cpu"}, 2, tmp_path / "cpuinfo") != one
