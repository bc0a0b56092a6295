"""Copy a module tree whose attributes need not be copyable.

`copy.deepcopy` fails on a module that holds a lock, an open file or a generator, and on the computed
weight of ``torch.nn.utils.weight_norm``. Here modules, tensors, and the containers, closures and plain objects
that hold them are copied; every other attribute is shared with the original.
"""

from __future__ import annotations

import copy
import functools
import random
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Kept = TypeVar("Kept")
Convert = Callable[[Tensor], Tensor]

_WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}
"""Wrappers that compute what their one submodule computes, and where they keep it."""

_CONTAINERS = (dict, list, set, deque)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)


def unwrapped(module: nn.Module) -> nn.Module:
    """Take the wrappers of torch.compile and of data parallelism off a module."""
    attribute = _WRAPPERS.get(type(module).__name__)
    inner = module._modules.get(attribute) if attribute is not None else None
    return module if inner is None else unwrapped(inner)


def share(tensor: Tensor) -> Tensor:
    """Keep a tensor itself: the copy's parameters are the original's."""
    return tensor


def detached(dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Convert:
    """Copy each tensor out of autograd; floating-point ones to ``dtype``, all to ``device``; None keeps either."""

    def convert(tensor: Tensor) -> Tensor:
        wanted = dtype if tensor.is_floating_point() else None
        data = tensor.detach().to(device=device, dtype=wanted, copy=True)
        if not isinstance(tensor, nn.Parameter):
            return data
        return nn.Parameter(data, requires_grad=tensor.requires_grad and data.is_floating_point())

    return convert


def copy_module(module: nn.Module, convert: Convert) -> nn.Module:
    """Copy a module with its submodules, hooks and modes; the original stays as it is.

    Args:
        module: copied with everything below it, also where one submodule or tensor is used twice.
        convert: maps each parameter, buffer and plain tensor to that of the copy.
    """
    copier = _Copier(convert)
    for kind in {base for each in module.modules() for base in type(each).__mro__}:
        for function in vars(kind).values():
            copier.share(function)
    copied: nn.Module = copier.copy(module)
    return copied


class _Copier:
    """One pass over a module tree; ``_memo`` maps the id of each original to it and its copy."""

    def __init__(self, convert: Convert) -> None:
        self._convert = convert
        self._memo: dict[int, tuple[object, object]] = {}

    def share(self, function: object) -> None:
        """Let copies share the containers that a class's function reaches by its closure, as they share the class."""
        for cell in getattr(function, "__closure__", None) or ():
            with suppress(ValueError):  # a variable without a value yet
                if isinstance(cell.cell_contents, _CONTAINERS):
                    self._keep(cell.cell_contents, cell.cell_contents)

    def copy(self, value: Any) -> Any:
        """Copy a value, or return it itself where it is one that copies share."""
        if id(value) in self._memo:
            return self._memo[id(value)][1]
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Tensor):
            return self._keep(value, self._convert(value))
        if isinstance(value, torch.Generator):
            return self._keep(value, value.clone_state())
        if isinstance(value, _GENERATORS):
            return self._keep(value, copy.deepcopy(value))
        return self._callable(value) if callable(value) else self._container(value)

    def _callable(self, value: Any) -> Any:
        """Copy a function or method that reaches what is copied: through its object, its closure or its defaults."""
        if isinstance(value, types.MethodType):
            owner = self.copy(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if type(value) is functools.partial:
            keywords = {name: self.copy(each) for name, each in value.keywords.items()}
            return functools.partial(self.copy(value.func), *map(self.copy, value.args), **keywords)
        return self._function(value) if isinstance(value, types.FunctionType) else self._object(value)

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """Copy a function whose closure or defaults hold what is copied; share every other."""
        cells = function.__closure__ or ()
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        if not cells and not defaults:
            return function
        # The cells of the twin are filled after it is known: one of them may hold the function itself.
        closure = tuple(types.CellType() for _ in cells)
        twin = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
        self._keep(function, twin)
        is_other = [self._fill(new, old) for new, old in zip(closure, cells, strict=True)]
        is_other += [self.copy(each) is not each for each in defaults]
        if not any(is_other):
            return self._keep(function, function)
        twin.__dict__.update(self.copy(function.__dict__))
        for attribute in ("__defaults__", "__kwdefaults__"):
            setattr(twin, attribute, self.copy(getattr(function, attribute)))
        for attribute in ("__qualname__", "__doc__", "__module__", "__annotations__"):
            setattr(twin, attribute, getattr(function, attribute))
        return twin

    def _fill(self, new: types.CellType, old: types.CellType) -> bool:
        """Put the copy of a variable into a cell, and return whether it is another object."""
        try:
            value = old.cell_contents
        except ValueError:  # a variable without a value yet
            return False
        new.cell_contents = self.copy(value)
        return new.cell_contents is not value

    def _object(self, value: Any) -> Any:
        """Copy a plain object that holds a module or a tensor; share every other."""
        held = getattr(value, "__dict__", None)
        if type(held) is not dict or isinstance(value, (type, types.ModuleType)) or not any(map(_holds, held.values())):
            return value
        try:
            twin = object.__new__(type(value))
        except TypeError:  # an object of C or C++
            return value
        self._keep(value, twin)
        twin.__dict__.update({name: self.copy(each) for name, each in held.items()})
        return twin

    def _module(self, module: nn.Module) -> nn.Module:
        inner = unwrapped(module)
        if inner is not module:
            twin: nn.Module = self._keep(module, self.copy(inner))
            return twin
        if isinstance(module, torch.jit.ScriptModule):  # its state lives in C++
            with torch.no_grad():
                scripted: nn.Module = copy.deepcopy(module)._apply(self._convert)  # type: ignore[no-untyped-call]
            return self._keep(module, scripted)
        twin = self._keep(module, object.__new__(type(module)))
        twin.__dict__.update({name: self.copy(value) for name, value in vars(module).items()})
        twin.__dict__["_compiled_call_impl"] = None  # module.compile() has compiled the original's call
        return twin

    def _container(self, value: Any) -> Any:
        if type(value) in (dict, OrderedDict, defaultdict):
            twin = self._keep(value, copy.copy(value))
            twin.update({key: self.copy(each) for key, each in value.items()})
            return twin
        if type(value) in (list, deque):
            twin = self._keep(value, copy.copy(value))
            twin.clear()
            twin.extend(map(self.copy, value))
            return twin
        if type(value) in (tuple, set, frozenset):
            return self._keep(value, type(value)(map(self.copy, value)))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._keep(value, type(value)(*map(self.copy, value)))
        return self._object(value)

    def _keep(self, original: object, twin: Kept) -> Kept:
        # The original is held too: the id of one that were freed meanwhile could come back.
        self._memo[id(original)] = (original, twin)
        return twin


def _holds(value: object) -> bool:
    """Return whether an attribute is a module or a tensor, or a container of some."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(each, (nn.Module, Tensor)) for each in parts)
