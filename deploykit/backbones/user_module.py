"""Wrap a module of the user's own as a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from deploykit.backbones.base import BackboneOptions, BaseBackbone, PretrainedSource, computes_in
from deploykit.backbones.features import levels_by_stride
from deploykit.backbones.module_checks import check_module
from deploykit.backbones.module_copy import copy_module, detached, share, unwrapped
from deploykit.backbones.module_outputs import (
    check_follows_batch,
    check_outputs,
    is_positional,
    named_outputs,
)
from deploykit.backbones.random_state import kept_random_states
from deploykit.errors import SpecError, plain_reason
from deploykit.spec import FeatureLevel, Preprocessing, parse_image_size


class ModuleBackbone(BaseBackbone):
    """A user's own module behind deploykit's interface; see `wrap_module`.

    ``module`` is a copy that shares the original's parameters and buffers, and has a mode of its own.
    """

    family: ClassVar[str] = "custom"
    variants: ClassVar[Mapping[str, object]] = {}
    fixed_size: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        options: BackboneOptions,
        module: nn.Module,
        *,
        levels: Sequence[FeatureLevel],
        order: Sequence[int],
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__(name, options)
        self.module = module
        self._order = tuple(order)
        size = options.image_size or (224, 224)
        self.finish(
            levels,
            pretrained=PretrainedSource(tag="", preprocessing=preprocessing, image_size=size, label_set=None),
        )

    def forward_levels(self, images: Tensor, depth: int) -> tuple[list[Tensor], Tensor]:
        """See `BaseBackbone.forward_levels`; the whole module runs, and its logits are the state."""
        # A copy of the images: the module may work in place on its input, which is the caller's.
        outputs = list(named_outputs(self.module(images.clone())).values())
        if computes_in(self).dtype == torch.float32:  # the type of every engine's outputs
            outputs = [output if output.dtype == torch.float32 else output.float() for output in outputs]
        if not self.all_levels:
            return [], outputs[0]
        maps = [outputs[position] for position in self._order[:depth]]
        return maps, maps[-1]

    def forward_head(self, trunk: Tensor) -> Tensor:
        """Return the module's ``(N, D)`` output, as it is.

        Raises:
            SpecError: the module gives feature maps.
        """
        if self.all_levels:
            raise SpecError(f"{self.name} gives feature maps and has no head. Wrap a module that ends in (N, D).")
        return trunk

    def stage_modules(self) -> dict[str, tuple[nn.Module, ...]]:
        """See `BaseBackbone.stage_modules`: the module is one piece, which goes with its deepest level."""
        names = [level.name for level in self.all_levels] or [self.spec.head_name]
        return {**dict.fromkeys(names[:-1], ()), names[-1]: (self.module,)}


def described(backbone: BaseBackbone) -> BaseBackbone:
    """Return a backbone with its levels: itself, or wrapped where it defines ``forward`` alone; see `wrap_module`."""
    return backbone if backbone.is_described else wrap_module(backbone, (224, 224))


def wrap_module(
    module: nn.Module,
    image_size: int | tuple[int, int],
    *,
    in_channels: int = 3,
    name: str | None = None,
    output_indices: tuple[int, ...] | None = None,
    preprocessing: Preprocessing = Preprocessing(),
) -> BaseBackbone:
    """Wrap a module of your own as a backbone in eval mode; the parameters are shared, not copied.

    Yours keeps its mode, its hooks and its state. A copy runs on zeros to see what it gives. ``(N, D)`` is
    taken for logits of D classes. A map ``(N, C, H, W)``, or maps nested in lists, tuples, dicts or
    dataclasses, become levels: strides from the sizes, names from the keys (joined by dots), other names and
    all indices by deploykit's convention (stem, stage1, ...; or block0, ... when all strides are equal). The
    image size is fixed from then on.

    Args:
        module: takes ``(N, in_channels, H, W)``.
        image_size: pixels, or ``(height, width)``.
        in_channels: channels of an image.
        name: of the backbone; None: the module's class name in lower case.
        output_indices: the levels to return; None: all.
        preprocessing: how the module's weights expect a photograph.

    Raises:
        SpecError: the module fails on zeros, has no weights, takes more than the images, is quantized, or
            gives something else; the message names what is at fault.
    """
    if isinstance(module, BaseBackbone) and module.is_described:
        return module
    size = parse_image_size(image_size)
    module = unwrapped(module)
    name = name or type(module).__name__.lower()
    check_module(module, name)
    outputs = _probe(module, name, (1, in_channels, *size))
    maps = [output for output in outputs.values() if output.dim() == 4]
    order: list[int] = []
    levels: list[FeatureLevel] = []
    if maps:
        order, levels = _levels_of_maps(outputs, size)
    options = BackboneOptions(
        features_only=bool(maps),
        output_indices=output_indices,
        num_classes=0 if maps else next(iter(outputs.values())).shape[1],
        in_channels=in_channels,
        image_size=size,
    )
    own = copy_module(module, share)
    return ModuleBackbone(name, options, own, levels=levels, order=order, preprocessing=preprocessing).eval()


def _probe(module: nn.Module, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Run a copy on one image of zeros, and on two to tell constants; what it gave for the one."""
    twin = copy_module(module, detached())
    anchor = computes_in(twin)
    zeros = torch.zeros((2, *shape[1:]), dtype=anchor.dtype, device=anchor.device)
    with kept_random_states(), torch.no_grad():
        try:
            raw = twin.eval()(zeros[:1].clone())
        except Exception as error:  # the user's own code
            raise SpecError(
                f"{name} fails on images {shape}: {plain_reason(error)}. {_devices(twin)}"
                "Check image_size and in_channels of wrap_module()."
            ) from error
        outputs = named_outputs(raw)
        check_outputs(outputs, name, shape)
        try:
            pair = named_outputs(twin(zeros))
        except Exception:  # a module that is written for one image at a time
            return outputs
    check_follows_batch(pair, name, 2)
    return outputs


def _devices(module: nn.Module) -> str:
    """Say which tensors are elsewhere than the first parameter, as the part of a message; empty where none is."""
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    home = computes_in(module).device
    away = [f"{path} is on {tensor.device}" for path, tensor in tensors.items() if tensor.device != home]
    return f"Its weights are on {home}, but {', '.join(away[:3])}: move all to one device. " if away else ""


def _levels_of_maps(outputs: Mapping[str, Tensor], size: tuple[int, int]) -> tuple[list[int], list[FeatureLevel]]:
    """Return the order of the outputs from shallow to deep, and their levels in that order."""
    strides = [max(1, round(size[0] / output.shape[2])) for output in outputs.values()]
    order = sorted(range(len(strides)), key=lambda position: strides[position])
    channels = [list(outputs.values())[position].shape[1] for position in order]
    levels = levels_by_stride([strides[position] for position in order], channels)
    keys = [list(outputs)[position] for position in order]
    if not all(map(is_positional, keys)):
        levels = [replace(level, name=key) for level, key in zip(levels, keys, strict=True)]
    return order, levels
