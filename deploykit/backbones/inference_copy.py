"""Copy a backbone as every export sees it, so that the original is neither run nor changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from deploykit.backbones.base import BaseBackbone
from deploykit.backbones.module_checks import check_traceable
from deploykit.backbones.module_copy import copy_module, detached
from deploykit.errors import SpecError, plain_reason

Hook: TypeAlias = Callable[..., object]

_FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_BACKWARD_HOOKS = ("_backward_pre_hooks", "_backward_hooks")


def inference_copy(backbone: BaseBackbone) -> BaseBackbone:
    """Copy a backbone onto the CPU, in float32 and eval mode, without gradients and without hooks that only watch.

    Raises:
        SpecError: part of it is TorchScript, or it does not run in float32.
    """
    check_traceable(backbone, backbone.name)
    twin = copy_module(backbone, detached(torch.float32, "cpu"))
    assert isinstance(twin, BaseBackbone)  # noqa: S101  (a copy has its original's type)
    twin.eval().requires_grad_(False)
    for part in twin.modules():
        for hooks in _BACKWARD_HOOKS:
            getattr(part, hooks).clear()
    _check_runs(backbone, twin)
    if any(getattr(part, hooks) for part in twin.modules() for hooks in _FORWARD_HOOKS):
        _drop_watching_hooks(twin)
    return twin


def example_images(backbone: BaseBackbone, count: int = 1) -> Tensor:
    """Normally distributed images ``(count, C, H, W)``, the same for every call."""
    spec = backbone.input_spec
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, spec.channels, spec.height, spec.width, generator=generator)


def _check_runs(backbone: BaseBackbone, twin: BaseBackbone) -> None:
    """Refuse a backbone that computes in another type than float32 by its own code."""
    tensors = (*backbone.parameters(), *backbone.buffers())
    kinds = {f"{tensor.dtype} on {tensor.device}" for tensor in tensors if tensor.is_floating_point()}
    if kinds <= {"torch.float32 on cpu"}:
        return  # it ran so when it was built
    try:
        _outputs(twin)
    except Exception as error:  # the user's own code
        raise SpecError(
            f"{backbone.name} computes in {' and '.join(sorted(kinds))}, and its copy in float32 on the CPU, which "
            f"every export starts from, fails: {plain_reason(error)}. Fix: give the module in float32 on the CPU "
            "(module.float().cpu()), and leave casts such as x.half() out of its forward."
        ) from error


def _drop_watching_hooks(twin: BaseBackbone) -> None:
    """Take the hooks off that change nothing: tracing would hand them tensors without numbers."""
    idle: set[int] = set()
    with _recording(twin, idle):
        expected = _outputs(twin)
    for chosen in (lambda hook: True, lambda hook: id(hook) in idle):
        removed = _remove_hooks(twin, chosen)
        try:
            same = all(map(torch.equal, _outputs(twin), expected))
        except Exception:  # a hook that the network cannot do without
            same = False
        if same:
            return
        for hooks, entries in removed:
            hooks.clear()
            hooks.update(entries)


def _remove_hooks(twin: nn.Module, chosen: Callable[[Hook], bool]) -> list[tuple[dict[int, Hook], dict[int, Hook]]]:
    """Remove the chosen forward hooks; each dict of hooks with what it held before."""
    before = []
    for part in twin.modules():
        for name in _FORWARD_HOOKS:
            hooks = getattr(part, name)
            before.append((hooks, dict(hooks)))
            for key in [key for key, hook in hooks.items() if chosen(hook)]:
                del hooks[key]
    return before


@contextmanager
def _recording(twin: nn.Module, idle: set[int]) -> Iterator[None]:
    """Collect in ``idle`` the ids of the hooks that return None."""
    replaced = _remove_hooks(twin, lambda hook: False)
    try:
        for hooks, entries in replaced:
            hooks.update({key: _Recorded(hook, idle) for key, hook in entries.items()})
        yield
    finally:
        for hooks, entries in replaced:
            hooks.clear()
            hooks.update(entries)


class _Recorded:
    """A hook that notes whether it returned None."""

    def __init__(self, hook: Hook, idle: set[int]) -> None:
        self._hook = hook
        self._idle = idle

    def __call__(self, *arguments: object, **settings: object) -> object:
        result = self._hook(*arguments, **settings)
        if result is None:
            self._idle.add(id(self._hook))
        return result


def _outputs(twin: BaseBackbone) -> list[Tensor]:
    with torch.no_grad():
        return list(twin.forward_everything(example_images(twin)).values())
