"""Training without the outputs of cheap layers: norms and activations are computed again in the backward pass.

After Rota Bulo, Porzi and Kontschieder 2018, "In-Place Activated BatchNorm", without its inverse: of
a convolution, a norm and an activation only the convolution's output is kept, and the same operators
make the other two again from it, so that the gradients are those of plain training.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TypeAlias, TypeVar
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from deploykit.arguments import check_arguments
from deploykit.backbones.activation_compression import (
    Kept,
    Saved,
    TensorKey,
    compression_depth,
    is_parameter,
    storage_reference,
    tensor_key,
    unpack,
)
from deploykit.errors import DeployKitError

Module = TypeVar("Module", bound=nn.Module)
Compute: TypeAlias = Callable[[Tensor], Tensor]

_state = threading.local()


class RecomputedReLU(nn.ReLU):
    """ReLU that keeps its input where that can be computed again, and its output elsewhere."""

    def forward(self, features: Tensor) -> Tensor:
        """Return any shape to the same."""
        tape = None if torch.compiler.is_compiling() else _active_tape()
        if tape is None or not isinstance(tape.find(features), _View):
            return F.relu(features)
        output: Tensor = _ReLUFromInput.apply(features)  # type: ignore[no-untyped-call]
        return output


def memory_efficient(model: Module) -> Module:
    """Train ``model`` without keeping the outputs of its norms and activations; changes it in place.

    ReLU, ReLU6, SiLU, GELU, Hardswish, BatchNorm, LayerNorm and GroupNorm layers count, as modules
    of exactly these types. Gradients equal those of plain training; state dict, outputs, and what
    evaluation and export see stay the same. In-place activations become out-of-place. It works where
    ``model`` itself is called in training mode. Inside a checkpointed stage, and inside
    `compressed_activations`, those take its place.

    Returns:
        The model.
    """
    check_arguments(memory_efficient, locals())
    if _enter in model._forward_pre_hooks.values():
        return model
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if type(child) is nn.ReLU:
                module._modules[name] = RecomputedReLU().train(child.training)
    for module in model.modules():
        if type(module) in _COMPUTE and _record not in module._forward_hooks.values():
            if getattr(module, "inplace", False):
                setattr(module, "inplace", False)  # noqa: B010  (a module's attributes have no types)
            module.register_forward_hook(_record)
    model.register_forward_pre_hook(_enter, prepend=True)
    model.register_forward_hook(_leave, always_call=True)
    return model


class _Memo:
    """The values computed last: a convolution and the activation before it ask for the same one in turn."""

    size = 2

    def __init__(self) -> None:
        self._values: OrderedDict[int, Tensor] = OrderedDict()

    def get(self, recipe: _Recipe) -> Tensor:
        key = id(recipe)
        value = self._values.get(key)
        if value is None:
            value = self._values[key] = recipe.compute_value()
            while len(self._values) > self.size:
                self._values.popitem(last=False)
        else:
            self._values.move_to_end(key)
        return value

    def forget(self, key: int) -> None:
        self._values.pop(key, None)


class _Recipe:
    """How the whole storage of one output is computed again: a layer applied to a saved tensor."""

    def __init__(self, module: nn.Module, source: Saved, output: Tensor, memo: _Memo) -> None:
        self._compute = _COMPUTE[type(module)](module)
        self._source = source
        self._state = _state_versions(module)
        self._module = module
        self._shape, self._stride = tuple(output.shape), output.stride()
        self._memo = memo
        self._storage = storage_reference(output)

    def value(self) -> Tensor:
        return self._memo.get(self)

    @torch.no_grad()
    def compute_value(self) -> Tensor:
        if _state_versions(self._module) != self._state:
            raise DeployKitError(
                f"the parameters of a {type(self._module).__name__} changed between forward and backward, and its "
                "output must be computed again. Call backward() before the optimizer's step."
            )
        features = self._source.value()
        with torch.autocast(features.device.type, enabled=False):
            value = self._compute(features)
        if value.stride() == self._stride:
            return value
        return torch.empty_strided(self._shape, self._stride, dtype=value.dtype, device=value.device).copy_(value)

    def __del__(self) -> None:
        self._memo.forget(id(self))


class _View:
    """A saved tensor that shows an output with a recipe, as it is or by other sizes and strides."""

    def __init__(self, recipe: _Recipe, tensor: Tensor) -> None:
        self._recipe = recipe
        self._geometry = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()

    def value(self) -> Tensor:
        return self._recipe.value().as_strided(*self._geometry)


class _Tape:
    """What one forward pass saved: tensors as they are, and outputs that can be computed again."""

    def __init__(self) -> None:
        self._kept: WeakValueDictionary[TensorKey, Kept] = WeakValueDictionary()
        self._recipes: dict[tuple[int, int], _Recipe] = {}
        self._memo = _Memo()

    def find(self, tensor: Tensor) -> Saved | None:
        """Return how the tensor comes back in the backward pass, if it is known to."""
        recipe = self._recipes.get((tensor.untyped_storage()._cdata, tensor._version))
        return _View(recipe, tensor) if recipe is not None else self._kept.get(tensor_key(tensor))

    def record(self, module: nn.Module, features: Tensor, output: Tensor) -> None:
        """Remember that ``output`` is ``module(features)``, where autograd saves ``features`` anyway."""
        source = self.find(features)
        whole = output.numel() * output.element_size() == output.untyped_storage().nbytes()
        if source is None or not whole or not output.requires_grad or output.dtype != features.dtype:
            return
        key = (output.untyped_storage()._cdata, output._version)
        self._recipes[key] = _Recipe(module, source, output, self._memo)

    def close(self) -> None:
        """Leave the recipes to the graph, which needs only some of them."""
        self._recipes.clear()

    def pack(self, tensor: Tensor) -> Saved:
        if is_parameter(tensor):
            return Kept(tensor)
        known = self.find(tensor)
        if known is None:
            known = self._kept[tensor_key(tensor)] = Kept(tensor)
        return known


class _ReLUContext(FunctionCtx):
    """What autograd gives `_ReLUFromInput`; torch declares no saved tensors."""

    saved_tensors: tuple[Tensor]


class _ReLUFromInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return F.relu(features)

    @staticmethod
    def backward(ctx: _ReLUContext, gradient: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        result: Tensor = torch.ops.aten.threshold_backward(gradient, features, 0)
        return result


def _active_tape() -> _Tape | None:
    tape: _Tape | None = getattr(_state, "tape", None)
    return tape


def _enter(model: nn.Module, args: object) -> None:
    if torch.compiler.is_compiling():
        return
    wanted = model.training and torch.is_grad_enabled() and not compression_depth()
    # A model inside such a model records on the outer one's tape.
    hooks = None
    if wanted and _active_tape() is None:
        _state.tape = _Tape()
        hooks = torch.autograd.graph.saved_tensors_hooks(_state.tape.pack, unpack)
        hooks.__enter__()
    _state.owners = [*getattr(_state, "owners", []), hooks]


def _leave(model: nn.Module, args: object, output: object) -> None:
    if torch.compiler.is_compiling():
        return
    *_state.owners, hooks = _state.owners
    if hooks is not None:
        hooks.__exit__()
        _state.tape.close()
        _state.tape = None


def _record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    tape = _active_tape()
    if tape is not None and torch.is_grad_enabled() and len(args) == 1:
        tape.record(module, args[0], output)


def _state_versions(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """Return what changes when a tensor that the recomputation reads changes."""
    read: list[Tensor] = list(module.parameters(recurse=False))
    if not module.training:
        read += module.buffers(recurse=False)
    return tuple((tensor.data_ptr(), tensor._version) for tensor in read)


def _batch_norm(module: nn.Module) -> Compute:
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)  # noqa: S101  (by the table)
    weight, bias, eps = module.weight, module.bias, module.eps
    mean, var = module.running_mean, module.running_var
    if module.training or mean is None:
        return lambda features: F.batch_norm(features, None, None, weight, bias, True, 0.0, eps)
    return lambda features: F.batch_norm(features, mean, var, weight, bias, False, 0.0, eps)


def _layer_norm(module: nn.Module) -> Compute:
    assert isinstance(module, nn.LayerNorm)  # noqa: S101  (by the table)
    return partial(
        F.layer_norm,
        normalized_shape=list(module.normalized_shape),
        weight=module.weight,
        bias=module.bias,
        eps=module.eps,
    )


def _group_norm(module: nn.Module) -> Compute:
    assert isinstance(module, nn.GroupNorm)  # noqa: S101  (by the table)
    return partial(F.group_norm, num_groups=module.num_groups, weight=module.weight, bias=module.bias, eps=module.eps)


_COMPUTE: dict[type[nn.Module], Callable[[nn.Module], Compute]] = {
    RecomputedReLU: lambda module: F.relu,
    nn.ReLU6: lambda module: F.relu6,
    nn.SiLU: lambda module: F.silu,
    nn.Hardswish: lambda module: F.hardswish,
    nn.GELU: lambda module: partial(F.gelu, approximate=str(module.approximate)),
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
}
"""The layers whose outputs are not kept, and how to apply each again without side effects."""
