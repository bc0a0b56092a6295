"""ONNX Runtime on x86: uint8 activations, int8 weights, no float left between integer convolutions."""

from __future__ import annotations

from deploykit.backends.onnxruntime.dynamic_products import DYNAMIC_OPERATORS, quantize_products
from deploykit.backends.onnxruntime.fuse_attention import fuse_attention
from deploykit.backends.onnxruntime.fuse_gates import fuse_gates
from deploykit.backends.onnxruntime.fuse_linear import fuse_linear
from deploykit.backends.onnxruntime.integer_attention import quantize_attentions
from deploykit.backends.onnxruntime.integer_gates import clip_gate_ranges, fold_hard_sigmoids, split_gates
from deploykit.backends.onnxruntime.pad_channels import pad_channels
from deploykit.backends.onnxruntime.rounding import kernel_rounding
from deploykit.backends.onnxruntime.static_products import split_gemms
from deploykit.calibration.dialect import OnnxDialect
from deploykit.calibration.drop_activations import drop_activations
from deploykit.calibration.float_fallback import keep_image_side
from deploykit.calibration.quantize_activations import UINT8, quantize_activations
from deploykit.calibration.quantize_weights import quantize_weights
from deploykit.calibration.tidy_graph import tidy_graph
from deploykit.fusion.onnx_groupnorm import convolve_groupnorm
from deploykit.fusion.onnx_passes import OnnxPass
from deploykit.fusion.onnx_pointwise import convolve_mlps
from deploykit.fusion.pipeline import EXACT_DB

DIALECT = OnnxDialect(
    activations=UINT8,
    dynamic_operators=DYNAMIC_OPERATORS,
    integer_outputs=True,
    integer_biases=True,
    float_choices=(keep_image_side,),
    rounding=kernel_rounding,
    int8=(
        pad_channels,
        # Before the products: an attention takes its projection whole.
        quantize_attentions,
        # Before the weights: it shifts the biases of convolutions.
        fold_hard_sigmoids,
        quantize_weights(integer_bias=True, dynamic_operators=DYNAMIC_OPERATORS),
        quantize_products,
        split_gates,
        clip_gate_ranges,
        # A convolution becomes QLinearConv only when its output is quantized too, whoever reads it.
        quantize_activations(UINT8, writes=True, between=True),
        # Behind it, which finds what reads a tensor by the names of the plan's nodes.
        split_gemms,
        drop_activations(between=True),
        tidy_graph,
    ),
    optimize=(
        OnnxPass(name="onnxruntime-attention", rewrite=fuse_attention, min_sqnr_db=EXACT_DB),
        OnnxPass(name="onnxruntime-gates", rewrite=fuse_gates, min_sqnr_db=EXACT_DB),
        OnnxPass(name="onnxruntime-groupnorm", rewrite=convolve_groupnorm, min_sqnr_db=EXACT_DB),
        OnnxPass(name="onnxruntime-mlps", rewrite=convolve_mlps, min_sqnr_db=EXACT_DB),
        # Last: the projections of attention and the layers of MLPs are linear layers too.
        OnnxPass(name="onnxruntime-linear", rewrite=fuse_linear, min_sqnr_db=EXACT_DB),
    ),
)
