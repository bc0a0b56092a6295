"""Attention inside windows of a map, plain and shifted (Liu et al. 2021, "Swin Transformer").

`WindowGrid` is the geometry of one block; `WindowAttention` and `CosineWindowAttention` are the
attention of Swin V1 and V2. What depends on the parameters alone (position bias with mask, cosine
scale) is a constant of an exported or compiled graph.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.backbones.attention import attend

_MASKED = -100.0


@dataclass(frozen=True, kw_only=True)
class WindowGrid:
    """How one block cuts a map of tokens into windows: all pairs are (height, width), in tokens.

    A shifted block rolls the map up and left by ``shift``, then pads its end to whole windows.
    """

    size: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)

    @classmethod
    def fit(cls, size: tuple[int, int], window: int, *, shifted: bool) -> WindowGrid:
        """Windows no larger than the map; a side that one window covers is not shifted."""
        fitted = (min(size[0], window), min(size[1], window))
        shift = window // 2 if shifted else 0
        rows, columns = (0 if side <= part else shift for side, part in zip(size, fitted, strict=True))
        return cls(size=size, window=fitted, shift=(rows, columns))

    @property
    def counts(self) -> tuple[int, int]:
        """The number of windows down and across."""
        return (math.ceil(self.size[0] / self.window[0]), math.ceil(self.size[1] / self.window[1]))

    @property
    def padded(self) -> tuple[int, int]:
        """The size of the map filled up to whole windows."""
        return (self.counts[0] * self.window[0], self.counts[1] * self.window[1])

    @property
    def area(self) -> int:
        """Tokens in a window."""
        return self.window[0] * self.window[1]

    def regions(self, axis: int) -> list[int]:
        """For each position of the rolled, padded axis, the region inside which tokens may attend."""
        length, window, shift = self.padded[axis], self.window[axis], self.shift[axis]
        if not shift:
            return [0] * length
        return [(place >= length - window) + (place >= length - shift) for place in range(length)]

    def mask(self) -> Tensor | None:
        """Return ``(windows, area, area)``: 0 where two tokens may attend, -100 elsewhere; None without a shift."""
        if not any(self.shift):
            return None
        rows, columns = torch.tensor(self.regions(0)), torch.tensor(self.regions(1))
        regions = 3 * rows[:, None] + columns
        (down, across), (high, wide) = self.counts, self.window
        windows = regions.reshape(down, high, across, wide).transpose(1, 2).reshape(-1, self.area)
        return torch.where(windows[:, :, None] == windows[:, None], 0.0, _MASKED)

    def spread(self, seen: list[tuple[int, int]], axis: int) -> list[tuple[int, int]]:
        """Return the interval that each token of an axis sees after the block, from those that it saw before."""
        regions = self.regions(axis)
        places = [(token - self.shift[axis]) % self.size[axis] for token in range(self.size[axis])]
        groups = [(place // self.window[axis], regions[place]) for place in places]
        wholes: dict[tuple[int, int], tuple[int, int]] = {}
        for group, (low, high) in zip(groups, seen, strict=True):
            first, last = wholes.get(group, (low, high))
            wholes[group] = (min(first, low), max(last, high))
        return [wholes[group] for group in groups]

    def pair_index(self) -> Tensor:
        """Return ``(area * area,)`` int64: for each pair of tokens its row in a table of relative positions."""
        high, wide = self.window
        rows, columns = torch.arange(high).repeat_interleave(wide), torch.arange(wide).repeat(high)
        down = rows[:, None] - rows + high - 1
        across = columns[:, None] - columns + wide - 1
        return (down * (2 * wide - 1) + across).flatten()


class BaseWindowAttention(nn.Module):
    """Multi-head self-attention within the windows of one grid.

    The tensors of `graph_constants` are computed from the parameters in each eager call. Under
    torch.export and torch.compile in eval mode, buffers stand in for them; ``eval()`` and
    ``load_state_dict()`` bring these up to date.
    """

    constant_names: ClassVar[tuple[str, ...]] = ("score_bias",)
    mask: Tensor | None
    pair_index: Tensor

    def __init__(self, dim: int, heads: int, grid: WindowGrid, *, qkv_bias: bool) -> None:
        super().__init__()
        self.dim, self.heads, self.grid = dim, heads, grid
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("mask", grid.mask(), persistent=False)
        self.register_buffer("pair_index", grid.pair_index(), persistent=False)
        # With a mask the windows join the heads, so that its constant needs no copy per image.
        self.groups = heads if self.mask is None else heads * math.prod(grid.counts)
        self.register_load_state_dict_post_hook(_update_constants)  # type: ignore[no-untyped-call]

    @abstractmethod
    def graph_constants(self) -> dict[str, Tensor]:
        """Return what the parameters alone decide, by `constant_names`; ``score_bias`` is ``(groups, area, area)``."""

    @abstractmethod
    def project(self, tokens: Tensor, constants: dict[str, Tensor]) -> Tensor:
        """Map ``(N, H, W, dim)`` to queries, keys and values ``(N, H, W, 3 * dim)``."""

    @abstractmethod
    def score(self, query: Tensor, key: Tensor, value: Tensor, constants: dict[str, Tensor]) -> Tensor:
        """Attention of ``(M, groups, area, D)`` tensors, to the same shape."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(N, H, W, dim)`` to the same shape; H and W are the grid's."""
        constants = self._constants(tokens)
        grid, depth = self.grid, self.dim // self.heads
        (down, across), (high, wide) = grid.counts, grid.window
        projected = self.project(_roll_and_pad(tokens, grid), constants)
        # One permutation cuts windows, parts heads, and parts queries, keys and values.
        parts = projected.reshape(-1, high, across, wide, 3, self.heads, depth).permute(4, 0, 2, 5, 1, 3, 6)
        query, key, value = (part.reshape(-1, self.groups, grid.area, depth) for part in parts.chunk(3))
        attended = self.score(query, key, value, constants)
        rows = attended.reshape(-1, across, self.heads, high, wide, depth).permute(0, 3, 1, 4, 2, 5)
        merged = rows.reshape(-1, down * high, across * wide, self.dim)
        output: Tensor = self.proj(_crop_and_unroll(merged, grid))
        return output

    def train(self, mode: bool = True) -> BaseWindowAttention:
        """As torch's; eval mode brings the graph's constants up to date."""
        super().train(mode)
        if not mode:
            self.update_constants()
        return self

    @torch.no_grad()
    def update_constants(self) -> None:
        """Copy what the parameters decide into the buffers that an exported graph holds."""
        for name, constant in self.graph_constants().items():
            self.register_buffer(name, constant.detach().clone(), persistent=False)

    def with_mask(self, bias: Tensor) -> Tensor:
        """Position bias ``(heads, area, area)`` and the mask, if any, to ``(groups, area, area)``."""
        return bias if self.mask is None else (bias + self.mask[:, None]).flatten(0, 1)

    def _constants(self, tokens: Tensor) -> dict[str, Tensor]:
        traced = torch.compiler.is_compiling() or isinstance(tokens, torch.fx.Proxy)
        if self.training or not traced:
            return self.graph_constants()
        return {name: self.get_buffer(name) for name in self.constant_names}


class WindowAttention(BaseWindowAttention):
    """Swin V1: scaled dot products and a learned bias for each relative position."""

    def __init__(self, dim: int, heads: int, grid: WindowGrid) -> None:
        super().__init__(dim, heads, grid, qkv_bias=True)
        positions = (2 * grid.window[0] - 1) * (2 * grid.window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(positions, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.update_constants()

    def graph_constants(self) -> dict[str, Tensor]:
        """Return the position bias with the mask."""
        area = self.grid.area
        bias = self.relative_position_bias_table[self.pair_index].reshape(area, area, -1).permute(2, 0, 1)
        return {"score_bias": self.with_mask(bias)}

    def project(self, tokens: Tensor, constants: dict[str, Tensor]) -> Tensor:
        """See the base class."""
        projected: Tensor = self.qkv(tokens)
        return projected

    def score(self, query: Tensor, key: Tensor, value: Tensor, constants: dict[str, Tensor]) -> Tensor:
        """See the base class."""
        return attend(query, key, value, bias=_per_image(constants["score_bias"]))


class CosineWindowAttention(BaseWindowAttention):
    """Swin V2 (Liu et al. 2022): scaled cosines, and a bias that an MLP makes from log-spaced positions."""

    constant_names: ClassVar[tuple[str, ...]] = ("score_bias", "cosine_scale", "qkv_bias")
    coordinates: Tensor

    def __init__(self, dim: int, heads: int, grid: WindowGrid) -> None:
        super().__init__(dim, heads, grid, qkv_bias=False)
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("coordinates", _log_coordinates(grid.window), persistent=False)
        self.update_constants()

    def graph_constants(self) -> dict[str, Tensor]:
        """Return the position bias with the mask, the factor of the cosines, and the joint bias of qkv."""
        area = self.grid.area
        bias = self.cpb_mlp(self.coordinates)[self.pair_index].reshape(area, area, -1).permute(2, 0, 1)
        factor = self.logit_scale.clamp(max=math.log(100.0)).exp()
        return {
            "score_bias": self.with_mask(16.0 * bias.sigmoid()),
            "cosine_scale": factor.repeat(self.groups // self.heads, 1, 1),
            "qkv_bias": torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias)),
        }

    def project(self, tokens: Tensor, constants: dict[str, Tensor]) -> Tensor:
        """See the base class."""
        return F.linear(tokens, self.qkv.weight, constants["qkv_bias"])

    def score(self, query: Tensor, key: Tensor, value: Tensor, constants: dict[str, Tensor]) -> Tensor:
        """See the base class."""
        query = _unit(query) * constants["cosine_scale"]
        return attend(query, _unit(key), value, bias=_per_image(constants["score_bias"]), scale=1.0)


def crop_position_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """Return the middle of a square window's ``(positions, heads)`` table: the positions of a smaller window.

    Returned as it is when it is no table of a square window at least as large.
    """
    side = math.isqrt(len(table))
    high, wide = (2 * part - 1 for part in window)
    if side * side != len(table) or max(high, wide) > side:
        return table
    top, left = (side - high) // 2, (side - wide) // 2
    return table.reshape(side, side, -1)[top : top + high, left : left + wide].flatten(0, 1)


def _update_constants(attention: nn.Module, _: object) -> None:
    assert isinstance(attention, BaseWindowAttention)  # noqa: S101  (it registered this; narrows the type)
    attention.update_constants()


def _per_image(bias: Tensor) -> Tensor:
    """Return ``(groups, area, area)`` with a batch axis of 1, without which torch's fused CPU kernel is not taken."""
    # torch 2.13 takes the batch axis for the batch's own when it exports from one image, and fixes it to 1.
    return bias if torch.onnx.is_in_onnx_export() else bias[None]


def _unit(vectors: Tensor) -> Tensor:
    """Vectors of the last axis divided by their length; F.normalize leaves shape arithmetic in the graph."""
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / length.clamp(min=1e-12)


def _log_coordinates(window: tuple[int, int]) -> Tensor:
    """Return ``((2 * high - 1) * (2 * wide - 1), 2)`` relative positions, -1 to 1, spaced by logarithm."""
    axes = [torch.arange(1 - side, side) * (8.0 / max(side - 1, 1)) for side in window]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    return grid.sign() * torch.log2(grid.abs() + 1.0) / math.log2(8)


def _roll_and_pad(tokens: Tensor, grid: WindowGrid) -> Tensor:
    """Map ``(N, H, W, C)`` to whole windows; torch.roll would leave shape arithmetic in the graph."""
    for axis, shift in enumerate(grid.shift, start=1):
        if shift:
            tokens = torch.cat(
                (tokens.narrow(axis, shift, grid.size[axis - 1] - shift), tokens.narrow(axis, 0, shift)), axis
            )
    if grid.padded != grid.size:
        tokens = F.pad(tokens, (0, 0, 0, grid.padded[1] - grid.size[1], 0, grid.padded[0] - grid.size[0]))
    return tokens


def _crop_and_unroll(tokens: Tensor, grid: WindowGrid) -> Tensor:
    for axis, (size, shift) in enumerate(zip(grid.size, grid.shift, strict=True), start=1):
        if shift:
            tokens = torch.cat((tokens.narrow(axis, size - shift, shift), tokens.narrow(axis, 0, size - shift)), axis)
        elif grid.padded[axis - 1] != size:
            tokens = tokens.narrow(axis, 0, size)
    return tokens
