"""Training with saved activations in 8 or 16 bits: the forward pass stays exact, the gradients are close.

After Chen et al. 2021, "ActNN: Reducing Training Memory Footprint via 2-Bit Activation Compressed
Training", with 8 bits and deterministic rounding. What autograd keeps for the backward pass is
packed when it is saved and unpacked when it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from deploykit.arguments import check_arguments
from deploykit.errors import DeployKitError

STEPS = 254
"""The steps between a group's smallest and largest value in 8 bits; rounding may use one code more."""
MIN_GROUP = 32
MIN_STEP = 2.0**-20
"""A step is never smaller than this share of the group's largest magnitude, so that codes stay exact in float32."""

TensorKey: TypeAlias = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]

_state = threading.local()


class Saved(Protocol):
    """What stands in autograd's graph for a saved tensor."""

    def value(self) -> Tensor:
        """Return the tensor that was saved, or its approximation."""


class Kept:
    """A saved tensor as it is; refuses to give a value that was changed in place since."""

    def __init__(self, tensor: Tensor) -> None:
        # Detached: an output that its own node keeps would be a cycle that is never freed.
        self._tensor = tensor.detach()
        self._version = tensor._version
        self._storage = storage_reference(tensor)

    def value(self) -> Tensor:
        """Return the tensor itself.

        Raises:
            DeployKitError: it was modified in place after it had been saved.
        """
        if self._tensor._version != self._version:
            raise DeployKitError(
                f"a saved tensor {tuple(self._tensor.shape)} was modified in place between forward and backward "
                f"(version {self._tensor._version}, expected {self._version}). Clone it before modifying it."
            )
        return self._tensor


class Packed8:
    """A tensor as uint8 codes with a step and a lowest code for each group of values.

    A group is a channel of an image in ``(N, C, H, W)`` and a token in ``(N, T, D)``; small trailing
    dimensions are joined until a group has `MIN_GROUP` values. Each value is off by at most
    ``(max - min) / 254`` of its group (half of that away from zero); zeros and signs are exact, so
    that the mask of a ReLU is.
    """

    def __init__(self, tensor: Tensor, low: Tensor, high: Tensor) -> None:
        largest = torch.maximum(low.abs(), high.abs())
        self._step = torch.maximum((high - low) / STEPS, largest * MIN_STEP).clamp_min_(1e-30)
        self._lowest = _round_with_sign(low / self._step)
        self._codes = _round_with_sign(tensor / self._step).sub_(self._lowest).to(torch.uint8)
        self._dtype = tensor.dtype
        self._storage = storage_reference(tensor)

    def value(self) -> Tensor:
        """Return the tensor in its own type, within the bound that the class states."""
        return self._codes.to(self._step.dtype).add_(self._lowest).mul_(self._step).to(self._dtype)


class Packed16:
    """A float32 tensor as float16, scaled by a power of two that brings its largest magnitude to 2**15.

    Each value is off by at most ``2**-11`` of itself, or ``2**-39`` of the largest.
    """

    def __init__(self, tensor: Tensor, largest: Tensor) -> None:
        exponent = torch.frexp(largest).exponent.clamp(-100, 100)
        self._scale = torch.ldexp(torch.ones_like(largest), exponent - 15)
        self._half = (tensor / self._scale).to(torch.float16)
        self._storage = storage_reference(tensor)

    def value(self) -> Tensor:
        """Return the tensor in float32, within the bound that the class states."""
        return self._half.float().mul_(self._scale)


@contextmanager
def compressed_activations(bits: Literal[8, 16] = 8, min_size: int = 4096) -> Iterator[None]:
    """Pack what autograd saves during this block; run the forward pass in it, the backward pass anywhere.

    Parameters, their views, integers, tensors of fewer than ``min_size`` elements and tensors with
    NaN or infinity are kept as they are. A tensor that several operators save is packed once. The
    outputs of the forward pass are those of plain training. A gradient that is linear in a saved
    tensor is off by at most that tensor's bound, times the magnitude of what it is multiplied with:
    for ``y = x @ W.T``, ``|error of dL/dW| <= |dL/dy|.T @ bound(x)``. See `Packed8` and `Packed16`
    for the bounds. Inside a module of `memory_efficient`, compression takes its place.

    Args:
        bits: 8 (uint8 codes, for float32, float16 and bfloat16) or 16 (float16, for float32).
        min_size: in elements.

    Raises:
        SpecError: ``bits`` is neither 8 nor 16.
    """
    check_arguments(compressed_activations, locals())
    packed: WeakValueDictionary[TensorKey, Saved] = WeakValueDictionary()

    def pack(tensor: Tensor) -> Saved:
        if is_parameter(tensor) or not _worth_packing(tensor, bits, min_size):
            return Kept(tensor)
        key = tensor_key(tensor)
        known: Saved | None = packed.get(key)
        if known is None:
            known = packed[key] = _compress(tensor, bits)
        return known

    _state.depth = compression_depth() + 1
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _state.depth -= 1


def compression_depth() -> int:
    """Return how many `compressed_activations` blocks this thread is in."""
    depth: int = getattr(_state, "depth", 0)
    return depth


def unpack(saved: Saved) -> Tensor:
    """Return the hook that gives autograd the tensor back."""
    return saved.value()


def storage_reference(tensor: Tensor) -> object:
    """While it is held, no other storage gets the identity that `tensor_key` takes from this one."""
    reference: object = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    return reference


def tensor_key(tensor: Tensor) -> TensorKey:
    """Equal for two tensors that show the same values of one storage, as long as that storage is referred to."""
    storage: int = tensor.untyped_storage()._cdata
    return storage, tensor._version, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def is_parameter(tensor: Tensor) -> bool:
    """Return whether the tensor is a parameter or a view of one."""
    base = tensor._base
    return isinstance(tensor if base is None else base, nn.Parameter)


def _worth_packing(tensor: Tensor, bits: int, min_size: int) -> bool:
    types = (torch.float32, torch.float16, torch.bfloat16) if bits == 8 else (torch.float32,)
    if tensor.dtype not in types or tensor.layout != torch.strided or tensor.numel() < max(min_size, 1):
        return False
    # An expanded tensor is smaller than its codes.
    return 0 not in tensor.stride()


@torch.no_grad()
def _compress(tensor: Tensor, bits: int) -> Saved:
    tensor = tensor.detach()
    if bits == 16:
        low, high = torch.aminmax(tensor)
        largest = torch.maximum(-low, high)
        return Packed16(tensor, largest) if bool(largest.isfinite()) else Kept(tensor)
    dims = _group_dims(tensor)
    low, high = tensor.amin(dims, keepdim=True).float(), tensor.amax(dims, keepdim=True).float()
    return Packed8(tensor, low, high) if bool((high - low).isfinite().all()) else Kept(tensor)


def _round_with_sign(values: Tensor) -> Tensor:
    """Rounded, but to 1 or -1 what would round to zero: a zero means something to a ReLU."""
    codes = values.round()
    codes += values.sign_() * (codes == 0)
    return codes


def _group_dims(tensor: Tensor) -> tuple[int, ...]:
    first = max(tensor.dim() - (2 if tensor.dim() >= 4 else 1), 0)
    while first > 0 and tensor.shape[first:].numel() < MIN_GROUP:
        first -= 1
    return tuple(range(first, tensor.dim()))
