"""The one attention primitive, and the transformer parts that several families share.

Parameter names are timm's: ``attn.qkv``, ``attn.proj``, ``mlp.fc1``, ``mlp.fc2``, ``ls1.gamma``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.graph import TRANSPOSED
from deploykit.optional import require


class ElementType(Protocol):
    """The type of the numbers of a `GraphValue`."""

    name: str


class GraphValue(Protocol):
    """A value of the ONNX graph that torch's exporter is writing, onnxscript's ``SymbolicTensor``."""

    name: str
    shape: Sequence[int]
    dtype: ElementType


class Operators(Protocol):
    """An opset of onnxscript: each attribute adds the node of that operator and gives its output."""

    def __getattr__(self, operator: str) -> Callable[..., GraphValue]: ...


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return ``softmax(query @ key^T * scale + bias) @ value`` (Vaswani et al. 2017).

    Args:
        query: ``(N, heads, T, D)``.
        key: ``(N, heads, S, D)``.
        value: ``(N, heads, S, V)``.
        bias: broadcastable to ``(N, heads, T, S)``, added to the scores; position bias or a mask.
        scale: of the scores; None: ``D ** -0.5``.

    Returns:
        ``(N, heads, T, V)``.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def onnx_translations() -> dict[Callable[..., object], Callable[..., object]]:
    """The ONNX forms of `attend`, linear layers and GroupNorm, for ``torch.onnx.export(custom_translation_table=...)``.

    Attention becomes two matrix products and a softmax of static shapes; torch's own translation
    transposes the keys by a dozen nodes of shape arithmetic. A linear layer's transposed weight keeps
    the name of its parameter, by which a quantization plan finds it. GroupNorm is in `_group_norm`.
    Needs onnxscript.
    """
    op: Operators = require("onnxscript").opset21
    transposed: dict[str, GraphValue] = {}  # of one export: a weight that two layers share is turned once

    def attention(  # noqa: PLR0917  (torch's signature)
        query: GraphValue,
        key: GraphValue,
        value: GraphValue,
        attn_mask: GraphValue | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> GraphValue:
        if is_causal or enable_gqa or dropout_p:
            raise NotImplementedError("attention with is_causal, enable_gqa or dropout has no ONNX form in deploykit")
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scaled = query if factor == 1.0 else op.Mul(query, op.Constant(value_float=factor))
        rank = len(key.shape)
        scores = op.MatMul(scaled, op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2]))
        if attn_mask is not None and attn_mask.dtype.name == "BOOL":
            scores = op.Where(attn_mask, scores, op.Constant(value_float=float("-inf")))
        elif attn_mask is not None:
            scores = op.Add(scores, attn_mask)
        return op.MatMul(op.Softmax(scores, axis=-1), value)

    def linear(source: GraphValue, weight: GraphValue, bias: GraphValue | None = None) -> GraphValue:
        if len(source.shape) == 2:
            return op.Gemm(source, weight, bias, transB=1)
        if weight.name not in transposed:
            transposed[weight.name] = op.Transpose(weight, perm=[1, 0])
            transposed[weight.name].name = f"{weight.name}{TRANSPOSED}"
        product = op.MatMul(source, transposed[weight.name])
        return product if bias is None else op.Add(product, bias)

    return {
        torch.ops.aten.scaled_dot_product_attention.default: attention,
        torch.ops.aten.linear.default: linear,
        torch.ops.aten.group_norm.default: _group_norm(op),
    }


def _group_norm(op: Operators) -> Callable[..., GraphValue]:
    """GroupNorm as an InstanceNormalization of ``(N, groups, -1)``, then its affine part as a BatchNormalization.

    OpenVINO 2026.4.1 crashes where a static graph has two dozen GroupNormalization nodes, and ONNX
    Runtime spells each out in nine. One group over the whole sample stays a GroupNormalization:
    there OpenVINO is faster.
    """

    def group_norm(  # noqa: PLR0917  (torch's signature)
        source: GraphValue,
        groups: int,
        weight: GraphValue | None = None,
        bias: GraphValue | None = None,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,
    ) -> GraphValue:
        channels, *sides = source.shape[1:]
        weight = filled(1.0, channels) if weight is None else weight
        bias = filled(0.0, channels) if bias is None else bias
        if groups == 1:
            return op.GroupNormalization(source, weight, bias, epsilon=eps, num_groups=1)
        grouped = op.Reshape(source, op.Constant(value_ints=[0, groups, -1]))
        normalised = op.InstanceNormalization(grouped, filled(1.0, groups), filled(0.0, groups), epsilon=eps)
        static = all(isinstance(side, int) for side in sides)
        shape = op.Constant(value_ints=[0, channels, *sides]) if static else op.Shape(source)
        mean, variance = filled(0.0, channels), filled(1.0, channels)
        return op.BatchNormalization(op.Reshape(normalised, shape), weight, bias, mean, variance, epsilon=0.0)

    def filled(value: float, count: int) -> GraphValue:
        return op.Constant(value_floats=[value] * count)

    return group_norm


def split_heads(projected: Tensor, heads: int) -> Tensor:
    """Map ``(N, T, heads * D)`` to ``(N, heads, T, D)``."""
    tokens, width = projected.shape[1], projected.shape[2]
    return projected.reshape(-1, tokens, heads, width // heads).transpose(1, 2)


def merge_heads(attended: Tensor) -> Tensor:
    """Map ``(N, heads, T, D)`` to ``(N, T, heads * D)``."""
    heads, tokens, width = attended.shape[1], attended.shape[2], attended.shape[3]
    return attended.transpose(1, 2).reshape(-1, tokens, heads * width)


class SelfAttention(nn.Module):
    """Multi-head self-attention over ``(N, T, dim)`` tokens; ``qkv`` holds the three projections."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(N, T, dim)`` to ``(N, T, dim)``."""
        query, key, value = split_heads(self.qkv(tokens), 3 * self.heads).chunk(3, dim=1)
        output: Tensor = self.proj(merge_heads(attend(query, key, value)))
        return output


class Mlp(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, dim: int, hidden: int, act: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn ``(..., dim)`` into ``(..., dim)``."""
        output: Tensor = self.fc2(self.act(self.fc1(tokens)))
        return output


class LayerScale(nn.Module):
    """A learned factor a channel (Touvron et al. 2021, "Going deeper with Image Transformers")."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn ``(..., dim)`` into ``(..., dim)``."""
        return tokens * self.gamma


class TransformerBlock(nn.Module):
    """A pre-norm block over ``(N, T, dim)``: attention and an MLP, each with a residual.

    Args:
        dim: channels of a token.
        heads: attention heads.
        mlp_ratio: hidden channels of the MLP over ``dim``.
        layer_scale: the initial layer scale; None: no layer scale.
        act: the activation of the MLP.
        norm_eps: epsilon of both LayerNorms.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        act: type[nn.Module] = nn.GELU,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = SelfAttention(dim, heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(N, T, dim)`` to ``(N, T, dim)``."""
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        output: Tensor = tokens + self.ls2(self.mlp(self.norm2(tokens)))
        return output
