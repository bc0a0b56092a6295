"""Pretrained weights: where they come from, and how they get into a backbone, all or nothing.

``pretrained=True`` asks the installed packages first (`weight_packages`), then the model hub. A tag
asks for other weights of the same variant, a path for a file.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from deploykit.backbones.base import BaseBackbone, PretrainedSource
from deploykit.backbones.checkpoint import SUFFIXES, check_state, read_checkpoint
from deploykit.backbones.weight_packages import installed_offers
from deploykit.errors import SpecError, WeightsError
from deploykit.optional import require
from deploykit.spec import Preprocessing

Pretrained: TypeAlias = bool | str | Path
"""True, the tag of some weights, or a checkpoint file."""

HUB_FILE = "model.safetensors"
HUB_CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class ResolvedWeights:
    """Weights that were found for a variant, before it is built.

    ``locate`` gives the file, and downloads it where it must. ``preprocessing`` None leaves the
    variant's own. ``architecture`` goes into `BackboneOptions` when the backbone is built.
    """

    tag: str
    locate: Callable[[], Path]
    preprocessing: Preprocessing | None = None
    label_set: str | None = None
    architecture: tuple[tuple[str, Any], ...] = ()
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None


def resolve_source(
    name: str, pretrained: Pretrained, default: PretrainedSource | None = None
) -> ResolvedWeights | None:
    """Find the weights of the variant ``name``; None for ``pretrained=False``.

    Args:
        name: the variant, not an alias.
        pretrained: True, a tag, or a file (.safetensors, .pth, .pt, .bin).
        default: the variant's default weights on the model hub.

    Raises:
        WeightsError: a file that is not there, no weights under that tag, none published at all, or
            another tag's settings cannot be had from the hub.
    """
    if pretrained is False:
        return None
    if isinstance(pretrained, Path) or (isinstance(pretrained, str) and _is_path(pretrained)):
        return _from_file(Path(pretrained))
    if not isinstance(pretrained, (str, bool)):
        raise WeightsError(f"pretrained is {pretrained!r}; give True, a tag, or a file ({', '.join(SUFFIXES)}).")
    for offer in installed_offers():
        if name in offer.variants and pretrained in (True, offer.tag):
            return ResolvedWeights(
                tag=offer.tag,
                locate=offer.locate,
                preprocessing=offer.preprocessing,
                label_set=offer.label_set,
                architecture=offer.architecture,
                rename=offer.rename,
            )
    return _from_hub(name, pretrained, default)


def _is_path(text: str) -> bool:
    return text.endswith(SUFFIXES) or "/" in text or "\\" in text or Path(text).exists()


def _from_file(path: Path) -> ResolvedWeights:
    path = path.expanduser()
    if not path.exists():
        raise WeightsError(f"there is no file {path}; expected a checkpoint. Check the path.")
    return ResolvedWeights(tag=path.name, locate=lambda: path)


def _from_hub(name: str, pretrained: str | bool, default: PretrainedSource | None) -> ResolvedWeights:
    default_tag = default.tag if default is not None else ""
    if pretrained is True and not default_tag:
        raise WeightsError(
            f"nobody has published weights for {name} that deploykit knows of. Pass pretrained=<file> "
            f"({', '.join(SUFFIXES)}), a tag, or install a package that offers them."
        )
    tag = default_tag if isinstance(pretrained, bool) else pretrained
    if not re.fullmatch(r"\w[\w.-]*", tag):
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
    """A file of the model hub, from the cache or downloaded into it.

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
    """What the repository's config says that the weights were trained with."""
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


def load_pretrained(model: BaseBackbone, source: Pretrained) -> str:
    """Load weights into a backbone that is already built, and return their tag.

    Raises:
        WeightsError: as `resolve_source` and `load_weights`; and weights that need an architecture
            the backbone was not built with.
    """
    resolved = resolve_source(model.name, source, default_source(type(model), model.name))
    if resolved is None:
        raise WeightsError("pretrained is False; expected True, a tag, or a file.")
    return load_weights(model, resolved)


def default_source(family: type[BaseBackbone], name: str) -> PretrainedSource | None:
    """The default weights of a variant, from its family's table."""
    source: PretrainedSource | None = getattr(family.variants.get(name), "pretrained", None)
    return source


@torch.no_grad()
def load_weights(model: BaseBackbone, resolved: ResolvedWeights) -> str:
    """Load resolved weights, and return their tag. The model changes only when everything fits.

    The checkpoint must hold every tensor of the model in its shape, with three exceptions:

    - A classifier for another number of classes keeps its fresh initialisation, with a warning;
      with ``num_classes=0`` it is left out.
    - Stem weights for RGB are adapted to ``in_channels``: summed over RGB for one channel; otherwise
      repeated R, G, B, R, ... and scaled by ``3 / in_channels``, which keeps the sum's magnitude.
    - BatchNorm's ``num_batches_tracked``, a counter that old checkpoints lack.

    Sets ``model.spec.weights``, ``model.spec.label_set`` and ``model.input_spec.preprocessing``.

    Raises:
        WeightsError: the file cannot be read, does not fit, or needs another architecture.
    """
    if missing := [field for field in resolved.architecture if field not in model.options.architecture]:
        wanted = ", ".join(f"{field}={value!r}" for field, value in missing)
        raise WeightsError(
            f"the weights {resolved.tag} were trained with {wanted}, and {model.name} was built without. "
            "Build it with these weights: build_backbone(name, options, pretrained)."
        )
    state = read_checkpoint(resolved.locate())
    state = resolved.rename(state) if resolved.rename is not None else state
    own = model.state_dict()
    state = {**{key: value for key, value in own.items() if key.endswith("num_batches_tracked")}, **state}
    state = _adapt_stem(model, model.adapt_state_dict(state))
    state, fresh = _fit_classifier(model, state)
    check_state(state, own, source=resolved.tag, name=model.name)
    model.load_state_dict(state, strict=True)
    if fresh:
        warnings.warn(
            f"the weights {resolved.tag} have another number of classes than num_classes={model.spec.num_classes}: "
            f"{', '.join(fresh)} keep their fresh initialisation and must be trained.",
            stacklevel=2,
        )
    labels = None if fresh or model.spec.num_classes == 0 else resolved.label_set
    model.spec = replace(model.spec, weights=resolved.tag, label_set=labels)
    if resolved.preprocessing is not None:
        model.set_preprocessing(resolved.preprocessing)
    return resolved.tag


def _adapt_stem(model: BaseBackbone, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """RGB weights of the first convolution to ``in_channels``."""
    channels = model.spec.in_channels
    if channels == 3:
        return state
    adapted = dict(state)
    for key, own in model.state_dict().items():
        weight = state.get(key)
        if weight is None or weight.dim() != 4 or weight.shape[1] != 3 or own.shape[1] != channels:
            continue
        if channels == 1:
            adapted[key] = weight.float().sum(1, keepdim=True).to(weight.dtype)
        else:
            repeated = weight.repeat(1, -(-channels // 3), 1, 1)[:, :channels]
            adapted[key] = repeated * (3 / channels)
    return adapted


def _fit_classifier(model: BaseBackbone, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Leave out the classifier where there is none; keep the model's own where the classes differ."""
    in_trunk = {id(module) for stage in model.stage_modules().values() for part in stage for module in part.modules()}
    head = {name: module for name, module in model.named_modules() if id(module) not in in_trunk}
    if model.spec.num_classes == 0:
        identities = {name for name, module in head.items() if isinstance(module, nn.Identity)}
        return {key: value for key, value in state.items() if key.rpartition(".")[0] not in identities}, []
    own, fresh = model.state_dict(), []
    for name, module in head.items():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or module.weight.shape[0] != model.spec.num_classes:
            continue
        given = state.get(f"{name}.weight")
        if given is None or given.shape[0] == module.weight.shape[0] or given.shape[1:] != module.weight.shape[1:]:
            continue
        fresh += [key for key in (f"{name}.weight", f"{name}.bias") if key in own]
    return {**state, **{key: own[key] for key in fresh}}, fresh


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of the state dict, in its order."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()
