"""Every backbone by name: families as a visible table, variants beside their class."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from deploykit.backbones.base import BackboneOptions, BaseBackbone
from deploykit.backbones.weights import Pretrained, default_source, load_weights, resolve_source
from deploykit.errors import SpecError, nearest

FAMILIES: dict[str, str] = {
    "resnet": "deploykit.backbones.resnet:ResNet",
    "resnetv2": "deploykit.backbones.resnetv2:ResNetV2",
    "efficientnet": "deploykit.backbones.efficient:EfficientNet",
    "regnet": "deploykit.backbones.regnet:RegNet",
    "mobilenet": "deploykit.backbones.mobilenet:MobileNet",
    "vit": "deploykit.backbones.vit:VisionTransformer",
    "hybrid": "deploykit.backbones.hybrid:HybridViT",
    "mobilevit": "deploykit.backbones.mobilevit:MobileViT",
    "coatnet": "deploykit.backbones.coatnet:CoAtNet",
    "convnext": "deploykit.backbones.convnext:ConvNeXt",
    "swin": "deploykit.backbones.swin:Swin",
}
"""Family name to its class; a family is imported when a name is first looked up."""

ALIASES: dict[str, str] = {
    "resnet": "resnet50",
    "efficient_net": "efficientnet_b0",
    "efficientnet": "efficientnet_b0",
    "regnet": "regnety_008",
    "mobilenet": "mobilenetv3_large_100",
    "vit": "vit_small_patch16_224",
    "hybrid": "mobilevit_s",
    "coatnet_0": "coatnet_0_rw_224",
    "convnext": "convnext_tiny",
    "swin": "swin_tiny_patch4_window7_224",
}
"""Short names to the variant that they stand for."""

_registered: dict[str, type[BaseBackbone]] = {}

BackboneClass = TypeVar("BackboneClass", bound=type[BaseBackbone])


def register_backbone(backbone: BackboneClass) -> BackboneClass:
    """Class decorator: make every name in ``backbone.variants`` known to `create_backbone`.

    Raises:
        SpecError: a name that is taken.
    """
    known = _classes()
    for name in backbone.variants:
        if name in known or name in ALIASES:
            raise SpecError(f"the backbone name {name!r} is taken. Choose another name for {backbone.__name__}.")
    _registered.update(dict.fromkeys(backbone.variants, backbone))
    return backbone


def backbone_names() -> tuple[str, ...]:
    """Every variant, grouped by family, in the order of its table."""
    return tuple(_classes())


def resolve_name(name: str) -> str:
    """An alias or a variant to the variant.

    Raises:
        SpecError: unknown, with the nearest names.
    """
    resolved = ALIASES.get(name, name)
    if resolved not in _classes():
        raise SpecError(f"unknown backbone {name!r}. {nearest(name, [*_classes(), *ALIASES])}")
    return resolved


def backbone_class(name: str) -> type[BaseBackbone]:
    """The class that builds a variant.

    Raises:
        SpecError: unknown, with the nearest names.
    """
    return _classes()[resolve_name(name)]


def build(name: str, options: BackboneOptions) -> BaseBackbone:
    """A backbone with random weights, in eval mode.

    Raises:
        SpecError: an unknown name, or options that the family cannot make.
    """
    resolved = resolve_name(name)
    return _classes()[resolved](resolved, options).eval()


def build_backbone(name: str, options: BackboneOptions, pretrained: Pretrained = False) -> BaseBackbone:
    """A backbone in eval mode, with random weights, or with pretrained ones.

    Args:
        name: a variant or an alias.
        options: what shapes the module.
        pretrained: True, a tag of the variant's weights, or a checkpoint file. ``spec.weights`` then
            names the tag or the file, and ``input_spec.preprocessing`` is that of the weights.

    Raises:
        SpecError: an unknown name, or options that the family cannot make.
        WeightsError: weights that cannot be had or do not fit.
    """
    resolved = resolve_name(name)
    family = _classes()[resolved]
    weights = resolve_source(resolved, pretrained, default_source(family, resolved))
    if weights is None:
        return build(resolved, options)
    model = build(resolved, replace(options, architecture=weights.architecture))
    load_weights(model, weights)
    return model


def _classes() -> dict[str, type[BaseBackbone]]:
    return dict(_family_variants()) | _registered


def _family_variants() -> Iterator[tuple[str, type[BaseBackbone]]]:
    for path in FAMILIES.values():
        module, _, attribute = path.partition(":")
        family: type[BaseBackbone] = getattr(importlib.import_module(module), attribute)
        for variant in family.variants:
            yield variant, family
