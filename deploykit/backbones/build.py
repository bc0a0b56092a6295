"""Build a backbone from whatever names it: a variant, a timm model, a module, or a backbone that exists."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from deploykit.backbones.base import BaseBackbone
from deploykit.backbones.checkpoint_names import is_checkpoint_name
from deploykit.backbones.image_sizes import set_image_sizes
from deploykit.backbones.module_copy import copy_module, share
from deploykit.backbones.necks import FeaturePyramid
from deploykit.backbones.registry import build_requested, describe, is_known
from deploykit.backbones.request import BackboneRequest, is_module
from deploykit.backbones.timm_models import build_requested_timm
from deploykit.backbones.user_module import wrap_module
from deploykit.bundle_files import why_no_bundle
from deploykit.errors import BundleError, DeployKitError, SpecError
from deploykit.names import TIMM, is_bare, path_of
from deploykit.spec import InputSpec, SizeRange
from deploykit.unset import UNSET


def build_any(name: Any, asked: BackboneRequest) -> BaseBackbone:
    """Return a name, a ``timm/`` name or a module, as a backbone with its weights, labels, preprocessing and sizes.

    Raises:
        SpecError: an unknown name, or options that do not go with it.
        WeightsError: weights that cannot be had, do not fit, or disagree with what was asked for.
        BundleError: the name is a path.
    """
    sizes = asked.image_sizes
    if sizes is None:
        return _build(name, asked)
    exists = isinstance(name, BaseBackbone) and name.is_described
    one_size = replace(asked, image_sizes=None, image_size=None if exists else asked.image_size)
    return _with_sizes(_build(name, one_size), sizes, shared=is_module(name))


def _with_sizes(backbone: BaseBackbone, sizes: SizeRange, *, shared: bool) -> BaseBackbone:
    """Return a backbone for a range of sizes; a copy, where its modules are ``shared`` with the caller."""
    if shared:
        other = copy_module(backbone, share)
        assert isinstance(other, BaseBackbone)  # noqa: S101  (a copy has its original's type)
        backbone = other
    set_image_sizes(backbone, sizes)
    return backbone


def _build(name: Any, asked: BackboneRequest) -> BaseBackbone:
    """Return a backbone for one image size; see `build_any`."""
    if isinstance(name, type):
        raise SpecError(f"{name.__name__} is a class; expected a module made of it. Fix: give {name.__name__}(...).")
    if hasattr(name, "input_spec") and name.input_spec.embeds_preprocessing:
        raise SpecError(
            f"{name!r} embeds its preprocessing already; expected the backbone inside it. "
            "Give model.backbone, and embed_preprocessing=True."
        )
    if isinstance(name, BaseBackbone) and name.is_described:
        return _as_built(name, asked)
    if is_module(name):
        return _wrap(name, asked)
    path, text = path_of(name), os.fsdecode(name)
    if isinstance(name, str) and text.startswith(TIMM):
        return build_requested_timm(text, asked)
    if is_checkpoint_name(text):
        raise BundleError(
            f"{text} is the name of a checkpoint; expected a backbone's name, a module or a bundle. "
            f"Fix: name the backbone whose weights they are, and give pretrained={text!r}."
        )
    if not is_bare(name) or (os.path.lexists(path) and not is_known(text)):
        raise BundleError(
            f"{text} is a path, but not a bundle: {why_no_bundle(path)} `deploykit export` makes a bundle, and "
            "`deploykit list` names the backbones."
        )
    return build_requested(text, asked)


def _as_built(backbone: BaseBackbone, asked: BackboneRequest) -> BaseBackbone:
    """Return a backbone that exists, under other labels or another preprocessing where they were asked for."""
    described = {"labels", "preprocessing"}
    differing = [
        f"{option}={getattr(asked, option)!r}"
        for option in sorted(asked.given() - described)
        if getattr(backbone.options, option, UNSET) != getattr(asked, option)
    ]
    if differing:
        raise SpecError(
            f"{backbone.name} is a backbone already, built with {backbone.options}; expected no other options "
            f"beside it than {' and '.join(sorted(described))}, and got {', '.join(differing)}. "
            "Give its name to build another."
        )
    if not asked.given() & described:
        return backbone
    other = copy_module(backbone, share)
    assert isinstance(other, BaseBackbone)  # noqa: S101  (a copy has its original's type)
    describe(other, asked)
    return other


def _wrap(module: nn.Module, asked: BackboneRequest) -> BaseBackbone:
    """Return a user's own module, which decides everything but the size, the channels and the levels returned.

    Around one of deploykit's backbones it takes that one's images, where nothing else was asked for.
    """
    taken = {"image_size", "in_channels", "output_indices", "features_only", "labels", "preprocessing"}
    if refused := sorted(asked.given() - taken):
        raise SpecError(
            "a module of your own comes with its weights and its head; expected image_size, in_channels, "
            f"output_indices, labels and preprocessing beside it, and got {', '.join(refused)} too. Leave out the rest."
        )
    inside = next((part for part in module.modules() if isinstance(part, BaseBackbone) and part.is_described), None)
    taken_by = InputSpec() if inside is None else inside.input_spec
    size = asked.image_size or (taken_by.height, taken_by.width)
    channels = taken_by.channels if asked.in_channels is UNSET else asked.in_channels
    _make_pyramids(module, (1, channels, *size))
    backbone = wrap_module(
        module,
        image_size=size,
        in_channels=channels,
        output_indices=asked.output_indices,
        preprocessing=taken_by.preprocessing,
    )
    describe(backbone, asked)
    return backbone


def _make_pyramids(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Run a module once where a feature pyramid in it has still to make its convolutions."""
    if all(part.is_built for part in module.modules() if isinstance(part, FeaturePyramid)):
        return
    training = {part: part.training for part in module.modules()}
    anchor = next(module.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            module.eval()(torch.zeros(shape, dtype=anchor.dtype, device=anchor.device))
    except DeployKitError:
        raise
    except Exception as error:  # the user's own code
        raise SpecError(
            f"{type(module).__name__} fails on images {shape} ({type(error).__name__}). "
            "Check image_size and in_channels."
        ) from error
    finally:
        for part, mode in training.items():
            part.training = mode
