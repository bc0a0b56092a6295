"""What LiteRT's delegate has for float alone, in float inside of it; and levels that are copied once."""

from __future__ import annotations

from collections import Counter

import pytest

from deploykit.backends.litert.delegated import fit_delegate
from deploykit.backends.litert.flatbuffer import TFLiteModel
from deploykit.backends.litert.inspect import left_in_float
from tests.backends.integer_engine import IntegerEngine, integer_engine, losses
from tests.calibration.conftest import Case


@pytest.fixture(scope="module")
def exported(gated: Case) -> IntegerEngine:
    return integer_engine("litert", gated, "gated")


def _operators(exported: IntegerEngine) -> Counter[str]:
    return Counter(operator.name for operator in TFLiteModel(exported.file.read_bytes()).operators())


def test_a_network_with_gates_is_one_call_of_the_delegate(exported: IntegerEngine):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=exported.file.read_bytes(), num_threads=1)
    interpreter.allocate_tensors()
    assert sum(operator["op_name"] == "DELEGATE" for operator in interpreter._get_ops_details()) == 1


def test_gates_norms_and_their_maps_stay_integers(exported: IntegerEngine):
    model = TFLiteModel(exported.file.read_bytes())
    for operator in model.operators():
        if operator.name == "MUL":
            assert all(model.is_integer(operator.graph, index) for index in operator.inputs)
    found = _operators(exported)
    assert (found["MUL"], found["HARD_SWISH"], found["LOGISTIC"]) == (3, 1, 3)
    assert (found["DEPTHWISE_CONV_2D"], found["SUB"]) == (1, 0)
    assert left_in_float(exported.file) == {"DEQUANTIZE": 3, "QUANTIZE": 2, "float CONV_2D": 1}


def test_no_copy_of_a_level_is_copied_back(exported: IntegerEngine):
    model = TFLiteModel(exported.file.read_bytes())
    transposes = [operator for operator in model.operators() if operator.name == "TRANSPOSE"]
    made = {int(operator.raw.outputs[0]) for operator in transposes}
    assert len(transposes) == 4
    assert not [operator for operator in transposes if operator.inputs[0] in made]


def test_every_level_is_what_the_same_plan_gives(exported: IntegerEngine):
    assert all(loss <= 1 for loss in losses(exported))


def test_a_file_that_fits_is_left_alone(exported: IntegerEngine):
    content = exported.file.read_bytes()
    assert fit_delegate(content) is content
