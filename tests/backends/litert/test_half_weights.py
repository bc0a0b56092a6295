"""Weights in float16: a smaller file with the same numbers, and nothing where float16 would round."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deploykit.backends.litert.flatbuffer import WEIGHTED, TFLiteModel
from deploykit.backends.litert.half_weights import store_halves
from deploykit.backends.litert.inspect import left_in_float
from deploykit.backends.litert.passes import DIALECT
from deploykit.calibration.half import HalfPlan
from tests.conftest_graphs import engine_of, open_engine, photographs, tiny_program


@pytest.fixture
def content() -> bytes:
    """An engine in FP32."""
    manifest, folder = engine_of("litert")
    return (folder / manifest.engine).read_bytes()


def rounded(content: bytes) -> bytes:
    """The same engine with each weight rounded to what float16 holds, still stored in float32."""
    model = TFLiteModel(content)
    for operator in model.operators():
        if operator.name in WEIGHTED:
            tensor = operator.graph.tensors[operator.inputs[1]]
            values = np.frombuffer(model.constant(tensor).tobytes(), np.float32)
            tensor.buffer = model.add_buffer(values.astype(np.float16).astype(np.float32).tobytes())
    return model.pack()


def run(content: bytes, folder) -> list[np.ndarray]:
    manifest, _ = engine_of("litert")
    (folder / manifest.engine).write_bytes(content)
    with open_engine(manifest, folder) as model:
        return list(model(photographs(2)).values())


def test_an_engine_with_halves_is_smaller_and_gives_the_same_numbers(content, tmp_path):
    before = rounded(content)
    after = store_halves(before)
    for expected, found in zip(run(before, tmp_path), run(after, tmp_path), strict=True):
        np.testing.assert_array_equal(found, expected)
    (tmp_path / "halves.tflite").write_bytes(after)
    assert left_in_float(tmp_path / "halves.tflite") == {"DEQUANTIZE": 1, "float CONV_2D": 2}


def test_a_weight_that_float16_would_round_stays(content):
    assert store_halves(content) is content


def test_a_plan_rounds_all_weights_but_those_that_it_keeps():
    program = tiny_program(dynamic=False)
    kept, images = "stem.0.weight", np.zeros((1, 3, 32, 32), np.float32)
    rendered = DIALECT.render(program, HalfPlan(float_weights={kept: 40.0}), images).graph.program
    for name, value in rendered.state_dict.items():
        if value.ndim == 4:
            assert torch.equal(value.half().float(), value) == (not name.endswith(kept)), name
    for name, value in program.program.state_dict.items():
        if value.ndim == 4:
            assert not torch.equal(value.half().float(), value), name
