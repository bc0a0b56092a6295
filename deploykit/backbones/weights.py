"""Pretrained weights: where they come from, and how they get into a backbone, all or nothing.

``pretrained=True`` asks the installed packages first (`weight_packages`), then the model hub. A tag
asks for other weights of the same variant, a path for a file.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from deploykit.backbones.base import BaseBackbone, PretrainedSource
from deploykit.backbones.checkpoint import read_checkpoint
from deploykit.backbones.checkpoint_config import CheckpointConfig, read_config
from deploykit.backbones.checkpoint_layout import FoundState, Place, find_state
from deploykit.backbones.checkpoint_names import SUFFIXES, checkpoint_in, is_checkpoint_name
from deploykit.backbones.fit import TensorLayout, fit_state, layout_of, settle_channels, settle_classes, warn_of_rest
from deploykit.backbones.request import BackboneRequest, Pretrained
from deploykit.backbones.weight_packages import installed_offers
from deploykit.errors import SpecError, WeightsError
from deploykit.labels import class_labels
from deploykit.optional import require
from deploykit.spec import Preprocessing

HUB_FILE = "model.safetensors"
HUB_CONFIG = "config.json"
_TAG = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True, kw_only=True)
class ResolvedWeights:
    """Weights that were found for a variant, before it is built.

    ``locate`` gives the file, and downloads it where it must. ``preprocessing`` None leaves the
    variant's own. ``architecture`` goes into `BackboneOptions` when the backbone is built. ``own_file``: a file
    that the user named, which may say more of itself.
    """

    tag: str
    locate: Callable[[], Path]
    preprocessing: Preprocessing | None = None
    label_set: str | None = None
    has_classifier: bool = True
    architecture: tuple[tuple[str, object], ...] = ()
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    own_file: bool = False


def resolve_source(
    name: str, pretrained: Pretrained, default: PretrainedSource | None = None, *, logits: bool = False
) -> ResolvedWeights | None:
    """Find the weights of the variant ``name``; None for ``pretrained=False``.

    Args:
        name: the variant, not an alias.
        pretrained: True, a tag, or a checkpoint file (`SUFFIXES`).
        default: the variant's default weights on the model hub.
        logits: True takes weights that have a classifier.

    Raises:
        WeightsError: a file that is not there, no weights under that tag, none published at all, or
            another tag's settings cannot be had from the hub.
    """
    if pretrained is False:
        return None
    if isinstance(pretrained, str) and "://" in pretrained:
        raise WeightsError(f"{pretrained} is an address; expected a file on this machine. Fix: download it first.")
    if isinstance(pretrained, Path) or (isinstance(pretrained, str) and is_path(pretrained)):
        return _from_file(Path(pretrained))
    if not isinstance(pretrained, (str, bool)):
        raise WeightsError(f"pretrained is {pretrained!r}; give True, a tag, or a file ({', '.join(SUFFIXES)}).")
    for offer in installed_offers():
        default_here = pretrained is True and (offer.has_classifier or not logits)
        if name in offer.variants and (default_here or pretrained == offer.tag):
            return ResolvedWeights(
                tag=offer.tag,
                locate=offer.locate,
                preprocessing=offer.preprocessing,
                label_set=offer.label_set,
                has_classifier=offer.has_classifier,
                architecture=offer.architecture,
                rename=offer.rename,
            )
    return _from_hub(name, pretrained, default)


def is_path(text: str) -> bool:
    """Return whether ``pretrained`` names a file or a folder, and not a tag."""
    path = Path(text)
    if is_checkpoint_name(text) or "/" in text or "\\" in text or path.is_file():
        return True
    return path.is_dir() and (checkpoint_in(path) is not None or not _TAG.fullmatch(text))


def _from_file(path: Path) -> ResolvedWeights:
    path = path.expanduser()
    if not path.exists():
        raise WeightsError(f"there is no file {path}; expected a checkpoint. Check the path.")
    return ResolvedWeights(tag=path.name, locate=lambda: path, own_file=True)


def _from_hub(name: str, pretrained: str | bool, default: PretrainedSource | None) -> ResolvedWeights:
    default_tag = default.tag if default is not None else ""
    if pretrained is True and not default_tag:
        raise WeightsError(
            f"nobody has published weights for {name} that deploykit knows of. Pass pretrained=<file> "
            f"({', '.join(SUFFIXES)}), a tag, or install a package that offers them."
        )
    tag = default_tag if isinstance(pretrained, bool) else pretrained
    if not _TAG.fullmatch(tag):
        raise WeightsError(f"pretrained is {tag!r}; expected True, a tag such as 'a1_in1k', or a file.")
    repository = f"timm/{name}.{tag}"
    preprocessing = default.preprocessing if default is not None and tag == default_tag else None
    return ResolvedWeights(
        tag=tag,
        locate=lambda: hub_file(repository, HUB_FILE),
        preprocessing=preprocessing or _hub_preprocessing(repository),
        label_set=default.label_set if default is not None and tag == default_tag else None,
    )


def hub_file(repository: str, filename: str) -> Path:
    """Return a file of the model hub, from the cache or downloaded into it.

    Raises:
        WeightsError: it is not in the cache and cannot be downloaded; says what to bring where.
    """
    hub = require("huggingface_hub")
    try:
        cached = hub.try_to_load_from_cache(repository, filename)
        return Path(cached if isinstance(cached, str) else hub.hf_hub_download(repository, filename))
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        cache = require("huggingface_hub.constants").HF_HUB_CACHE
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{filename} of the model hub's repository {repository} is not in the cache {cache} and cannot be "
            f"downloaded ({reason}). On a machine that reaches the hub, run `hf download {repository} {filename}`; "
            f"then pass that file here as pretrained='<folder>/{filename}', or copy the folder "
            f"models--{repository.replace('/', '--')} from its cache into {cache}."
        ) from error


def _hub_preprocessing(repository: str) -> Preprocessing:
    """Return what the repository's config says that the weights were trained with."""
    path = hub_file(repository, HUB_CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["pretrained_cfg"]
        return Preprocessing(
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config.get("crop_mode") or "center",
        )
    except (OSError, ValueError, KeyError, TypeError, SpecError) as error:
        raise WeightsError(
            f"{HUB_CONFIG} of {repository} does not say how images are prepared ({error!r}). "
            "Pass the weights as a file, or use the default tag."
        ) from error


@dataclass(frozen=True, kw_only=True)
class OpenedWeights:
    """Weights that were read: the state dict of the backbone in them, and what they say of themselves."""

    resolved: ResolvedWeights
    found: FoundState
    config: CheckpointConfig

    @property
    def tag(self) -> str:
        """What ``spec.weights`` calls them."""
        return self.resolved.tag


def open_weights(resolved: ResolvedWeights, name: str, layout: TensorLayout, key: str | None = None) -> OpenedWeights:
    """Read the state dict of a variant out of its weights.

    Args:
        resolved: where they are.
        name: the variant.
        layout: its tensors.
        key: ``checkpoint_key`` of `BackboneRequest`.

    Raises:
        WeightsError: unreadable; no state dict of the variant, or several; or a configuration that contradicts it.
    """
    file = read_checkpoint(resolved.locate())
    if resolved.rename is not None:
        tensors = resolved.rename(cast("Mapping[str, Tensor]", file.content))  # a package's own file
        place = Place(keys=(), prefix="", matched=len(tensors))
        return OpenedWeights(
            resolved=resolved, found=FoundState(place=place, tensors=tensors, outside={}), config=CheckpointConfig()
        )
    found = find_state(file.content, layout.trunk, source=resolved.tag, key=key)
    config = read_config(file.path, file.content, file.metadata) if resolved.own_file else CheckpointConfig()
    check_config(config, name, layout.classes_in(found.tensors), resolved.tag)
    return OpenedWeights(resolved=resolved, found=found, config=config)


def check_config(config: CheckpointConfig, name: str, classes: int | None, source: str) -> None:
    """Refuse weights whose own configuration is that of another network.

    Raises:
        WeightsError: another architecture, or another number of classes than the classifier's.
    """
    said = (config.architecture or "").removeprefix("timm/").partition(".")[0]
    base = name.removeprefix("timm/").partition(".")[0]
    away = "" if config.source == source else f", or move {config.source} away where it belongs to another file"
    if said and said != base and _is_known(said):
        raise WeightsError(
            f"{source} is a checkpoint of {said}, as {config.source} says, and {base} was asked for. "
            f"Fix: ask for {said}{away}."
        )
    if config.num_classes is not None and classes not in (None, config.num_classes):
        raise WeightsError(
            f"{config.source} says num_classes={config.num_classes}, and the classifier in {source} has {classes} "
            f"classes. Fix: correct what it says{away}."
        )
    if config.labels is not None and classes and len(config.labels) != classes and config.source != source:
        raise WeightsError(
            f"{config.source} names {len(config.labels)} classes, and the classifier in {source} has {classes}. "
            f"Fix: correct what it says{away}."
        )


def architecture_of(path: Path) -> str | None:
    """Return the name of the network in a checkpoint file, where the file says it: a variant, or ``timm/<name>``.

    Raises:
        WeightsError: the file cannot be read.
    """
    from deploykit.backbones.registry import backbone_names

    file = read_checkpoint(path)
    said = (read_config(file.path, file.content, file.metadata).architecture or "").removeprefix("timm/")
    base = said.partition(".")[0]
    return base if base in backbone_names() else f"timm/{base}" if base else None


def load_pretrained(
    model: BaseBackbone, source: Pretrained, *, checkpoint_key: str | None = None, new_head: bool = False
) -> str:
    """Load weights into a backbone that is already built, and return their tag.

    The model changes only when everything fits.

    Args:
        model: keeps its classes and channels.
        source: True, a tag, or a checkpoint file.
        checkpoint_key: which of several state dicts in the file.
        new_head: keep the model's own classifier in place of the checkpoint's.

    Raises:
        WeightsError: as `resolve_source`, `open_weights` and `load_weights`; weights for other classes or channels;
            and weights that need an architecture the backbone was not built with.
    """
    logits = model.spec.num_classes > 0 and not model.spec.features_only and not new_head
    resolved = resolve_source(model.name, source, default_source(type(model), model.name), logits=logits)
    if resolved is None:
        raise WeightsError("pretrained is False; expected True, a tag, or a file.")
    if missing := [field for field in resolved.architecture if field not in model.options.architecture]:
        wanted = ", ".join(f"{field}={value!r}" for field, value in missing)
        raise WeightsError(
            f"the weights {resolved.tag} were trained with {wanted}, and {model.name} was built without. "
            "Build it with these weights: build_backbone(name, options, pretrained)."
        )
    layout = layout_of(type(model), model.name, model.options)
    opened = open_weights(resolved, model.name, layout, checkpoint_key)
    request = BackboneRequest(
        num_classes=model.spec.num_classes,
        in_channels=model.spec.in_channels,
        new_head=new_head,
        checkpoint_key=checkpoint_key,
    )
    settle_classes(request, opened.found, layout, resolved.tag)
    settle_channels(request, opened.found, layout, resolved.tag)
    return load_weights(model, opened, layout, new_head=new_head)


def default_source(family: type[BaseBackbone], name: str) -> PretrainedSource | None:
    """Return the default weights of a variant, from its family's table."""
    source: PretrainedSource | None = getattr(family.variants.get(name), "pretrained", None)
    return source


def load_weights(model: BaseBackbone, opened: OpenedWeights, layout: TensorLayout, *, new_head: bool = False) -> str:
    """Load opened weights, and return their tag. The model changes only when everything fits.

    Sets ``model.spec.weights``, ``model.spec.label_set``, ``model.labels`` and ``model.input_spec.preprocessing``.

    Raises:
        WeightsError: they do not fit; see `fit_state`.
    """
    resolved = opened.resolved
    state = fit_state(
        model,
        opened.found,
        layout,
        options=model.options,
        adapt=model.adapt_state_dict,
        names=(resolved.tag, model.name),
        new_head=new_head,
    )
    model.load_state_dict(state, strict=True)
    warn_of_rest(opened.found, resolved.tag)
    if resolved.preprocessing is not None:
        model.set_preprocessing(resolved.preprocessing)
    record_weights(model, opened, new_head=new_head)
    return resolved.tag


def record_weights(model: BaseBackbone, opened: OpenedWeights, *, new_head: bool) -> None:
    """Write on a backbone which weights it has, and what they say of classes and preprocessing."""
    resolved, config = opened.resolved, opened.config
    has_names = not new_head and model.spec.num_classes > 0
    model.spec = replace(model.spec, weights=resolved.tag, label_set=resolved.label_set if has_names else None)
    labels = config.labels or class_labels(resolved.label_set)
    if has_names and labels is not None and len(labels) == model.spec.num_classes:
        model.labels = labels
    if config.preprocessing:
        model.set_preprocessing(replace(model.input_spec.preprocessing, **config.preprocessing))
    model.guesses_preprocessing = resolved.own_file and not config.says_preprocessing


def _is_known(architecture: str) -> bool:
    from deploykit.backbones.registry import backbone_names

    timm: Any = sys.modules.get("timm")
    return architecture in backbone_names() or (timm is not None and bool(timm.is_model(architecture)))


def weights_digest(model: nn.Module) -> str:
    """Return SHA-256 over the names, types, shapes and bytes of the state dict, in its order."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()
