"""Q/DQ in uint8, everything else as the master graph has it."""

from deploykit.calibration.dialect import OnnxDialect
from deploykit.calibration.quantize_activations import UINT8, quantize_activations
from deploykit.calibration.quantize_weights import quantize_weights
from deploykit.calibration.tidy_graph import tidy_graph

DIALECT = OnnxDialect(int8=(quantize_weights(integer_bias=False), quantize_activations(UINT8), tidy_graph))
