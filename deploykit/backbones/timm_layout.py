"""Which tensors of a timm model follow the classes, the channels and the image size, and how timm adapts them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torch import Tensor, nn

from deploykit.backbones.fit import TensorLayout
from deploykit.backbones.timm_protocols import pretrained_config
from deploykit.errors import WeightsError


def timm_layout(model: nn.Module) -> TensorLayout:
    """Return the layout of a model that has its classifier, as timm's configuration of it names the parts."""
    config = pretrained_config(model)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    classifier = [f"{part}.{kind}" for part in _parts(config.get("classifier")) for kind in ("weight", "bias")]
    stem = [f"{part}.weight" for part in _parts(config.get("first_conv"))]
    return TensorLayout(
        shapes=shapes,
        classifier=tuple(name for name in classifier if name in shapes),
        stem=tuple(name for name in stem if name in shapes),
        image_size_in=partial(_image_size_in, model),
    )


def _parts(named: object) -> Iterable[str]:
    return (named,) if isinstance(named, str) else tuple(named) if isinstance(named, (list, tuple)) else ()


def _image_size_in(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return the side in pixels of a square grid of position embeddings that is not the model's; else None."""
    own, found = getattr(model, "pos_embed", None), state.get("pos_embed")
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if not isinstance(own, Tensor) or found is None or patch is None or found.dim() != 3 or found.shape == own.shape:
        return None
    prefix = 0 if getattr(model, "no_embed_class", False) else int(getattr(model, "num_prefix_tokens", 0))
    side = math.isqrt(max(0, found.shape[1] - prefix))
    return (side * patch[0], side * patch[1]) if side and side * side == found.shape[1] - prefix else None


def adapt_as_timm(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Change a checkpoint as timm does when it loads one: resample what follows the image size.

    Raises:
        WeightsError: timm's own code fails on the checkpoint.
    """
    change: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = getattr(
        sys.modules[type(model).__module__], "checkpoint_filter_fn", None
    )
    if change is None:
        return state
    try:
        return dict(change(dict(state), model))
    except Exception as error:  # timm's code on tensors of any shape
        raise WeightsError(
            f"timm cannot adapt this checkpoint to {type(model).__name__}: {type(error).__name__}. "
            "Give the checkpoint of this variant, in timm's parameter names."
        ) from error
