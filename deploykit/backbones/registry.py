"""Every backbone by name: families as a visible table, variants beside their class."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TypeVar

from deploykit.arguments import check_arguments
from deploykit.backbones.base import BackboneOptions, BaseBackbone
from deploykit.backbones.fit import layout_of, settle_channels, settle_classes
from deploykit.backbones.request import BackboneRequest, Pretrained, completed
from deploykit.backbones.weights import default_source, load_weights, open_weights, resolve_source
from deploykit.errors import SpecError, nearest
from deploykit.labels import check_count, parse_labels
from deploykit.unset import UNSET

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
    "res_net": "resnet50",
    "efficient": "efficientnet_b0",
    "efficient_net": "efficientnet_b0",
    "efficientnet": "efficientnet_b0",
    "regnet": "regnety_008",
    "reg_net": "regnety_008",
    "mobilenet": "mobilenetv3_large_100",
    "mobile_net": "mobilenetv3_large_100",
    "vit": "vit_small_patch16_224",
    "vision_transformer": "vit_small_patch16_224",
    "hybrid": "mobilevit_s",
    "mobilevit": "mobilevit_s",
    "mobile_vit": "mobilevit_s",
    "coatnet": "coatnet_0_rw_224",
    "coatnet_0": "coatnet_0_rw_224",
    "convnext": "convnext_tiny",
    "conv_next": "convnext_tiny",
    "swin": "swin_tiny_patch4_window7_224",
    "swin_transformer": "swin_tiny_patch4_window7_224",
}
"""Short names to the variant that they stand for."""

_registered: dict[str, type[BaseBackbone]] = {}

BackboneClass = TypeVar("BackboneClass", bound=type[BaseBackbone])


def register_backbone(backbone: BackboneClass) -> BackboneClass:
    """Class decorator: make every name in ``backbone.variants`` known to `create_backbone`.

    Raises:
        SpecError: a name that is taken.
    """
    check_arguments(register_backbone, locals())
    known = _classes()
    for name in backbone.variants:
        if name in known or name in ALIASES:
            raise SpecError(f"the backbone name {name!r} is taken. Choose another name for {backbone.__name__}.")
    _registered.update(dict.fromkeys(backbone.variants, backbone))
    return backbone


def backbone_names() -> tuple[str, ...]:
    """Return every variant, grouped by family, in the order of its table."""
    return tuple(_classes())


def is_known(name: str) -> bool:
    """Return whether a name is a variant's or an alias."""
    return name in ALIASES or name in _classes()


def resolve_name(name: str) -> str:
    """Return an alias or a variant to the variant.

    Raises:
        SpecError: unknown, with the nearest names.
    """
    resolved = ALIASES.get(name, name)
    if resolved not in _classes():
        raise SpecError(f"unknown backbone {name!r}. {nearest(name, [*_classes(), *ALIASES])}")
    return resolved


def backbone_class(name: str) -> type[BaseBackbone]:
    """Return the class that builds a variant.

    Raises:
        SpecError: unknown, with the nearest names.
    """
    return _classes()[resolve_name(name)]


def build(name: str, options: BackboneOptions) -> BaseBackbone:
    """Return a backbone with random weights, in eval mode.

    Raises:
        SpecError: an unknown name, or options that the family cannot make.
    """
    resolved = resolve_name(name)
    return _classes()[resolved](resolved, options).eval()


def build_backbone(name: str, options: BackboneOptions, pretrained: Pretrained = False) -> BaseBackbone:
    """Return a backbone in eval mode, with random weights, or with pretrained ones.

    Args:
        name: a variant or an alias.
        options: what shapes the module; weights for other classes are refused.
        pretrained: True, a tag of the variant's weights, or a checkpoint file. ``spec.weights`` then
            names the tag or the file, and ``input_spec.preprocessing`` is that of the weights.

    Raises:
        SpecError: an unknown name, or options that the family cannot make.
        WeightsError: weights that cannot be had or do not fit.
    """
    asked = {field.name: getattr(options, field.name) for field in fields(options) if field.name != "architecture"}
    return build_requested(name, BackboneRequest(**asked, pretrained=pretrained), options.architecture)


def build_requested(
    name: str, request: BackboneRequest, architecture: tuple[tuple[str, object], ...] = ()
) -> BaseBackbone:
    """Build what was asked for, in eval mode; what was left open is what the weights say.

    Args:
        name: a variant or an alias.
        request: the options.
        architecture: fields of the variant that differ from its table.

    Raises:
        SpecError: an unknown name, options that the family cannot make, or labels for other classes.
        WeightsError: weights that cannot be had, do not fit, or disagree with what was asked for.
    """
    resolved = resolve_name(name)
    family = _classes()[resolved]
    options = open_options(request, architecture)
    weights = resolve_source(
        resolved, request.pretrained, default_source(family, resolved), logits=request.gives_logits
    )
    if weights is None:
        model = build(resolved, options)
    else:
        options = replace(options, architecture=architecture or weights.architecture)
        layout = layout_of(family, resolved, options)
        opened = open_weights(weights, resolved, layout, request.checkpoint_key)
        options = replace(
            options,
            num_classes=settle_classes(request, opened.found, layout, opened.tag),
            in_channels=settle_channels(request, opened.found, layout, opened.tag),
            image_size=request.image_size or opened.config.image_size or layout.image_size_in(opened.found.tensors),
        )
        model = build(resolved, options)
        load_weights(model, opened, layout, new_head=request.new_head)
    describe(model, request)
    return model


def open_options(request: BackboneRequest, architecture: tuple[tuple[str, object], ...] = ()) -> BackboneOptions:
    """Return the options of a module, with the defaults where they were left open."""
    given = {"num_classes": request.num_classes, "in_channels": request.in_channels}
    return BackboneOptions(
        features_only=request.gives_features,
        output_indices=request.output_indices,
        output_stride=request.output_stride,
        image_size=request.image_size,
        patch_size=request.patch_size,
        hierarchical=request.hierarchical,
        architecture=architecture,
        **{name: value for name, value in given.items() if value is not UNSET},
    )


def describe(model: BaseBackbone, request: BackboneRequest) -> None:
    """Give a backbone the class names and the preprocessing that were asked for.

    Raises:
        SpecError: not one name for each class, or a preprocessing for other channels.
    """
    if request.labels is not None:
        labels = parse_labels(request.labels)
        check_count(labels, model.spec.num_classes)
        model.labels = labels
        model.spec = replace(model.spec, label_set=None)
    if request.preprocessing is not None:
        model.set_preprocessing(completed(request.preprocessing, model.input_spec))
        model.guesses_preprocessing = False


def _classes() -> dict[str, type[BaseBackbone]]:
    return dict(_family_variants()) | _registered


def _family_variants() -> Iterator[tuple[str, type[BaseBackbone]]]:
    for path in FAMILIES.values():
        module, _, attribute = path.partition(":")
        family: type[BaseBackbone] = getattr(importlib.import_module(module), attribute)
        for variant in family.variants:
            yield variant, family
