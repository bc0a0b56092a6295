"""OpenVINO: uint8 activations, int8 weights, float biases; a convolution fuses the float activation after it."""

from __future__ import annotations

from deploykit.backends.openvino.convolve_average_pool import convolve_average_pool
from deploykit.backends.openvino.flatten_layernorm import flatten_layernorm
from deploykit.backends.openvino.flatten_spatial import flatten_spatial
from deploykit.backends.openvino.linear_to_conv import linear_to_conv
from deploykit.backends.openvino.pad_average_pool import pad_average_pool
from deploykit.backends.openvino.quantize_before_rolls import quantize_before_rolls
from deploykit.backends.openvino.rounding import kernel_rounding
from deploykit.backends.openvino.separate_heads import separate_heads
from deploykit.calibration.dialect import OnnxDialect
from deploykit.calibration.drop_activations import drop_activations
from deploykit.calibration.float_fallback import keep_pointlike
from deploykit.calibration.quantize_activations import UINT8, quantize_activations
from deploykit.calibration.quantize_weights import quantize_weights
from deploykit.calibration.tidy_graph import tidy_graph
from deploykit.fusion.onnx_groupnorm import spell_out_groupnorm
from deploykit.fusion.onnx_passes import OnnxPass
from deploykit.fusion.onnx_pointwise import convolve_last_layers
from deploykit.fusion.onnx_wrap_pad import concatenate_wraps
from deploykit.fusion.pipeline import EXACT_DB

POINTLIKE_WEIGHTS = 2**19
"""On 1x1 maps it gains by reading fewer bytes of weights: MobileNetV3's head of a million gains 5% and loses nothing,
its squeeze-and-excitation would gain 8% and lose 1.6 dB.
"""

DIALECT = OnnxDialect(
    activations=UINT8,
    float_choices=(keep_pointlike(fewest_weights=POINTLIKE_WEIGHTS),),
    rounding=kernel_rounding,
    legalize=(
        OnnxPass(name="openvino-average-pool", rewrite=pad_average_pool, min_sqnr_db=EXACT_DB),
        OnnxPass(name="openvino-wrap-pad", rewrite=concatenate_wraps, min_sqnr_db=EXACT_DB),
    ),
    int8=(
        flatten_spatial,
        quantize_weights(integer_bias=False),
        quantize_activations(UINT8),
        drop_activations(),
        quantize_before_rolls,
        convolve_average_pool,
        linear_to_conv,
        tidy_graph,
    ),
    optimize=(
        OnnxPass(name="openvino-heads", rewrite=separate_heads, min_sqnr_db=EXACT_DB),
        OnnxPass(name="openvino-groupnorm", rewrite=spell_out_groupnorm, min_sqnr_db=EXACT_DB),
        OnnxPass(name="openvino-layernorm", rewrite=flatten_layernorm, min_sqnr_db=EXACT_DB),
        OnnxPass(name="openvino-mlps", rewrite=convolve_last_layers, min_sqnr_db=EXACT_DB),
    ),
)
