"""Refuse a module of the user's own that no runtime can take, by the name of what is wrong, before it runs."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deploykit.errors import SpecError

_QUANTIZED = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.ao.quantization.fake_quantize",
    "torch.ao.quantization.observer",
    "bitsandbytes",
)
_PLAIN = (Tensor, nn.Parameter)


def check_module(module: nn.Module, name: str) -> None:
    """Refuse a module that has no weights yet, or whose weights are not plain tensors.

    Raises:
        SpecError: names the parameter, buffer or submodule at fault and what to do.
    """
    if not isinstance(module, nn.Module):
        raise SpecError(f"{name} is a {type(module).__name__}; expected a torch.nn.Module.")
    for path, tensor in (*module.named_parameters(), *module.named_buffers()):
        _check_tensor(path, tensor, name)
    for path, part in module.named_modules():
        if type(part).__name__ == "QatNetwork":
            raise SpecError(
                f"{name} is prepared for quantization-aware training: {_at(path)} is what prepare_qat gave; expected a "
                "backbone or a module in FP32. Fix: export_backbone(network, FOLDER, runtime=...) of that network "
                "alone makes its engine."
            )
        if type(part).__module__.startswith(_QUANTIZED):
            raise SpecError(
                f"{name} is quantized or prepared for it: {_at(path)} is a {type(part).__name__}; expected a module in "
                "floating point. Fix: give the module that it was made from, and ask for precision='int8'."
            )
    if next(module.parameters(), None) is None and next(module.buffers(), None) is None:
        raise SpecError(f"{name} has no parameters; expected a network. Wrap the module that holds the weights.")
    _check_signature(module, name)


def check_traceable(module: nn.Module, name: str) -> None:
    """Refuse a module whose Python code torch.export cannot see.

    Raises:
        SpecError: names the scripted or traced submodule.
    """
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            inside = "" if path == "module" else path.removeprefix("module.")  # the wrapper is no part of the user's
            raise SpecError(
                f"{name} cannot be exported: {_at(inside)} is a TorchScript module ({part.original_name}), whose "
                "Python code is gone. Fix: give the torch.nn.Module that it was made from, with its state dict loaded; "
                "runtime='torch' runs it as it is."
            )


def _check_tensor(path: str, tensor: Tensor, name: str) -> None:
    if is_lazy(tensor):
        raise SpecError(
            f"{name} has a lazy layer that was never run: {path} has no shape yet. Fix: call the module once on "
            "images, then load its weights."
        )
    if tensor.device.type == "meta":
        raise SpecError(
            f"{name} has no values for {path}: it is on the meta device. Fix: load the weights "
            "(module.to_empty(device='cpu'), then load_state_dict)."
        )
    if type(tensor) not in _PLAIN and not isinstance(tensor, nn.Buffer):
        raise SpecError(
            f"{name} keeps {path} as a {type(tensor).__module__}.{type(tensor).__name__}; expected a plain tensor. "
            "Fix: give the module before it was quantized or distributed."
        )


def _check_signature(module: nn.Module, name: str) -> None:
    """Refuse a ``forward`` that takes more than the images."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):  # a forward written in C++
        return
    required = [each for each in parameters if each.default is each.empty and each.kind not in _VARIADIC]
    by_name = [each.name for each in required if each.kind is inspect.Parameter.KEYWORD_ONLY]
    if len(required) > 1 or by_name:
        raise SpecError(
            f"{name} takes {len(required)} inputs ({', '.join(each.name for each in required)}); expected a forward "
            "that is called with the images alone, by position. Fix: wrap it in a module that fills in the others."
        )


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _at(path: str) -> str:
    return f"its submodule {path!r}" if path else "it"
