"""Wrap a module of the user's own as a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deploykit.backbones.base import BackboneOptions, BaseBackbone, PretrainedSource
from deploykit.backbones.features import levels_by_stride
from deploykit.errors import SpecError
from deploykit.spec import FeatureLevel, Preprocessing, parse_image_size


class ModuleBackbone(BaseBackbone):
    """A user's own module behind deploykit's interface; see `wrap_module`."""

    family: ClassVar[str] = "custom"
    variants: ClassVar[Mapping[str, Any]] = {}
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
        outputs = list(_named_outputs(self.module(images)).values())
        if not self.all_levels:
            return [], outputs[0]
        maps = [outputs[position] for position in self._order[:depth]]
        return maps, maps[-1]

    def forward_head(self, trunk: Tensor) -> Tensor:
        """The module's ``(N, D)`` output, as it is.

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


def wrap_module(
    module: nn.Module,
    image_size: int | tuple[int, int],
    *,
    in_channels: int = 3,
    name: str | None = None,
    output_indices: tuple[int, ...] | None = None,
    preprocessing: Preprocessing = Preprocessing(),
) -> BaseBackbone:
    """A module of your own as a backbone, in eval mode; the module is shared, not copied.

    It runs once on zeros to see what it gives. ``(N, D)`` is taken for logits of D classes. A map
    ``(N, C, H, W)``, or a list, tuple or dict of maps, becomes levels: strides from the sizes, a dict's
    names as they are, other names and all indices by deploykit's convention (stem, stage1, ...; or
    block0, ... when all strides are equal). The image size is fixed from then on.

    Args:
        module: takes ``(N, in_channels, H, W)`` float32.
        image_size: pixels, or ``(height, width)``.
        in_channels: channels of an image.
        name: of the backbone; None: the module's class name in lower case.
        output_indices: the levels to return; None: all.
        preprocessing: how the module's weights expect a photograph.

    Raises:
        SpecError: the module fails on zeros, has no parameters, or gives something else.
    """
    if isinstance(module, BaseBackbone):
        return module
    size = parse_image_size(image_size)
    name = name or type(module).__name__.lower()
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
    return ModuleBackbone(name, options, module, levels=levels, order=order, preprocessing=preprocessing).eval()


def _probe(module: nn.Module, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    parameter = next(module.parameters(), None)
    if parameter is None:
        raise SpecError(f"{name} has no parameters; expected a network. Wrap the module that holds the weights.")
    training = {part: part.training for part in module.modules()}
    zeros = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
    try:
        with torch.no_grad():
            raw = module.eval()(zeros)
    except Exception as error:  # the user's own code
        raise SpecError(
            f"{name} fails on images {shape}: {error}. Check image_size and in_channels of wrap_module()."
        ) from error
    finally:
        for part, mode in training.items():
            part.training = mode
    outputs = _named_outputs(raw)
    shapes = {key: tuple(output.shape) if isinstance(output, Tensor) else None for key, output in outputs.items()}
    all_maps = all(found is not None and len(found) == 4 and found[0] == shape[0] for found in shapes.values())
    logits = len(shapes) == 1 and all(found is not None and len(found) == 2 for found in shapes.values())
    if not shapes or not (all_maps or logits):
        found = shapes or type(raw).__name__
        raise SpecError(
            f"{name} gives {found} for images {shape}; expected one (N, D) tensor, or one or more (N, C, H, W) maps. "
            "Wrap it in a module that returns only those."
        )
    return outputs


def _named_outputs(raw: Any) -> dict[str, Any]:
    """What a module returned, by name; positions where it gave no names."""
    if isinstance(raw, Mapping):
        return {str(key): output for key, output in raw.items()}
    if isinstance(raw, (list, tuple)):
        return {str(position): output for position, output in enumerate(raw)}
    return {"0": raw}


def _levels_of_maps(outputs: Mapping[str, Tensor], size: tuple[int, int]) -> tuple[list[int], list[FeatureLevel]]:
    """The order of the outputs from shallow to deep, and their levels in that order."""
    strides = [max(1, round(size[0] / output.shape[2])) for output in outputs.values()]
    order = sorted(range(len(strides)), key=lambda position: strides[position])
    channels = [list(outputs.values())[position].shape[1] for position in order]
    levels = levels_by_stride([strides[position] for position in order], channels)
    keys = [list(outputs)[position] for position in order]
    if not all(key.isdecimal() for key in keys):
        levels = [replace(level, name=key) for level, key in zip(levels, keys, strict=True)]
    return order, levels
