"""Fit a checkpoint's tensors to a backbone: what they decide, what may be adapted, what is refused.

No weight is dropped or drawn anew unless that was asked for by name: ``num_classes=0`` leaves the classifier out,
``new_head=True`` draws a new one, ``in_channels=`` adapts RGB weights of the stem.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deploykit.backbones.base import BackboneOptions, BaseBackbone
from deploykit.backbones.checkpoint_layout import FoundState
from deploykit.backbones.request import BackboneRequest
from deploykit.errors import SpecError, WeightsError, WeightsWarning
from deploykit.unset import UNSET

_CLASSES, _CHANNELS = 7_919, 97
"""Sizes that nothing else in a network has, so that what follows the classes and the channels shows."""
_LISTED = 10

COUNTERS = ("num_batches_tracked", "total_ops", "total_params")
"""Names that end so are counters: BatchNorm's, which old checkpoints lack, and those that the profiler thop leaves."""


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    """The tensors of a backbone by name, and those whose size follows the classes and the channels.

    ``image_size_in`` reads the size in pixels that a state dict was trained at, where its shapes show it.
    """

    shapes: Mapping[str, torch.Size]
    classifier: tuple[str, ...]
    stem: tuple[str, ...]
    image_size_in: Callable[[Mapping[str, Tensor]], tuple[int, int] | None] = lambda state: None

    @property
    def trunk(self) -> tuple[str, ...]:
        """The names that every checkpoint of the variant has."""
        return tuple(name for name in self.shapes if name not in self.classifier and not name.endswith(COUNTERS))

    def is_of_classifier(self, name: str) -> bool:
        """Whether a tensor is the classifier's, or of what stands in its place (``fc.1.weight`` of a Sequential)."""
        parts = {key.rpartition(".")[0] for key in self.classifier}
        return name in self.classifier or any(name.startswith(f"{part}.") for part in parts)

    def classes_in(self, state: Mapping[str, Tensor]) -> int | None:
        """Return the number of classes of a state dict; None where it has no classifier."""
        return next((state[name].shape[0] for name in self.classifier if name in state and state[name].dim()), None)

    def channels_in(self, state: Mapping[str, Tensor]) -> int | None:
        """Return the number of image channels of a state dict; None where it has no stem of the variant's kind."""
        found = (state[name].shape for name in self.stem if name in state)
        return next((shape[1] for shape in found if len(shape) == 4), None)


def layout_of(family: type[BaseBackbone], name: str, options: BackboneOptions) -> TensorLayout:
    """Build a variant without memory, and see which of its tensors follow the classes and the channels."""
    with torch.device("meta"):
        model = family(name, replace(options, num_classes=_CLASSES, in_channels=_CHANNELS))
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    return TensorLayout(
        shapes={key: shape for key, shape in shapes.items() if not key.startswith(model.untrained_prefixes)},
        classifier=tuple(key for key, shape in shapes.items() if _CLASSES in shape),
        stem=tuple(key for key, shape in shapes.items() if len(shape) == 4 and shape[1] == _CHANNELS),
        image_size_in=model.image_size_in,
    )


def settle_classes(request: BackboneRequest, found: FoundState, layout: TensorLayout, source: str) -> int:
    """Decide the number of classes from what was asked for and what the checkpoint has.

    Raises:
        SpecError: ``new_head`` without ``num_classes``.
        WeightsError: they disagree, or the checkpoint has no classifier where one was asked for.
    """
    asked = request.num_classes
    has = layout.classes_in(found.tensors)
    if request.new_head:
        if asked is UNSET:
            raise SpecError("new_head=True draws a new classifier; say for how many classes with num_classes=.")
        return asked
    if asked == 0:
        return 0
    if has is None:
        return _without_classifier(request, found, layout, source)
    if asked not in (UNSET, has):
        name = next(name for name in layout.classifier if name in found.tensors)
        raise WeightsError(
            f"{source} has a classifier for {has} classes ({name} {tuple(found.tensors[name].shape)}), and "
            f"num_classes={asked} was asked for. Fix: leave num_classes out, which takes the file's; or "
            "new_head=True draws a new classifier in its place."
        )
    return has


def _without_classifier(request: BackboneRequest, found: FoundState, layout: TensorLayout, source: str) -> int:
    """Return the classes of a checkpoint that has the trunk alone."""
    names = " and ".join(layout.classifier) or "a classifier"
    inside = _matrices({name: tensor for name, tensor in found.tensors.items() if name not in layout.shapes})
    heads = inside + _matrices(found.outside)
    beside = f" Beside it stands {heads[0]}, which may be the head of the network around it." if heads else ""
    if request.num_classes is not UNSET:
        raise WeightsError(
            f"{source} has no classifier ({names} are missing), and num_classes={request.num_classes} was asked for."
            f"{beside} Fix: leave num_classes out for the embedding, or new_head=True draws a new classifier."
        )
    if not request.gives_features and (inside or (heads and request.checkpoint_key is None)):
        raise WeightsError(
            f"{source} has no classifier ({names} are missing).{beside} "
            "Fix: num_classes=0 takes the backbone alone; or give the whole network as a module."
        )
    if not request.gives_features:
        warnings.warn(
            f"{source} has no classifier ({names} are missing): the backbone gives the pooled embedding. "
            "To say that this is meant: num_classes=0.",
            WeightsWarning,
            stacklevel=2,
        )
    return 0


def _matrices(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names and shapes of the tensors that may be the weights of a classifier."""
    return [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if tensor.dim() == 2]


def settle_channels(request: BackboneRequest, found: FoundState, layout: TensorLayout, source: str) -> int:
    """Decide the number of image channels from what was asked for and what the checkpoint has.

    Raises:
        WeightsError: they disagree; RGB weights alone are adapted to other channels.
    """
    has = layout.channels_in(found.tensors)
    asked = request.in_channels
    if asked is UNSET:
        return has if has is not None else 3
    if has not in (None, 3, asked):
        raise WeightsError(
            f"{source} takes images of {has} channels, and in_channels={asked} was asked for; weights for 3 channels "
            "alone are adapted to others. Fix: leave in_channels out, which takes the file's."
        )
    return asked


def warn_of_rest(found: FoundState, source: str) -> None:
    """Say which tensors of a checkpoint belong to something around the backbone, and are not read."""
    if not found.outside:
        return
    names = _listed(f"{name} {tuple(tensor.shape)}" for name, tensor in found.outside.items())
    warnings.warn(
        f"{source} holds {len(found.outside)} tensors outside of the backbone in {found.place.name}, which are left "
        f"out: {names}.",
        WeightsWarning,
        stacklevel=2,
    )


@torch.no_grad()
def fit_state(
    module: nn.Module,
    found: FoundState,
    layout: TensorLayout,
    *,
    options: BackboneOptions,
    adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    names: tuple[str, str],
    new_head: bool = False,
) -> dict[str, Tensor]:
    """Make a checkpoint's tensors those of a module, or refuse them; neither is changed.

    - Where the module has no classes, or draws its classifier anew, the checkpoint's classifier is left out.
    - Stem weights for RGB are adapted to ``in_channels``: summed over RGB for one channel; otherwise
      repeated R, G, B, R, ... and scaled by ``3 / in_channels``, which keeps the sum's magnitude.
    - Half precision becomes float32.
    - Counters may be missing (BatchNorm's) or be left over; so may a constant that the module computes itself.

    Args:
        module: has the parameters.
        found: the checkpoint's state dict.
        layout: which tensors follow the classes and the channels.
        options: the module's classes and channels.
        adapt: the family's own change of a state dict, where shapes follow the image size.
        names: the checkpoint's and the backbone's, for messages.
        new_head: keep the module's classifier.

    Raises:
        WeightsError: lists missing, unexpected, misshapen, non-finite and non-float tensors, ten of each.
    """
    own = module.state_dict()
    state = {name: tensor for name, tensor in found.tensors.items() if not _is_leftover(module, own, name, tensor)}
    if new_head or options.num_classes == 0:
        state = {name: tensor for name, tensor in state.items() if not layout.is_of_classifier(name)}
    kept = {name: value for name, value in own.items() if name.endswith(COUNTERS)}
    kept |= {name: value for name, value in own.items() if new_head and name in layout.classifier}
    state = _adapt_stem(adapt({**kept, **state}), layout, options.in_channels)
    others = ", ".join(other.name or "the file itself" for other in found.others)
    source, name = names
    check_state(
        state,
        own,
        source=f"{source} ({found.place.name})" if found.place.name else source,
        name=name,
        hint=f"It also holds {others}: choose with checkpoint_key." if others else "",
    )
    return {key: tensor.to(own[key].dtype) for key, tensor in state.items()}


def _is_leftover(model: nn.Module, own: Mapping[str, Tensor], name: str, tensor: Tensor) -> bool:
    """Return whether a tensor that the model does not load is provably without effect."""
    if name in own:
        return False
    if name.endswith(COUNTERS) and tensor.numel() == 1:
        return True
    path, _, attribute = name.rpartition(".")
    try:
        constant = getattr(model.get_submodule(path), attribute, None)
    except AttributeError:
        return False
    return isinstance(constant, Tensor) and constant.shape == tensor.shape and bool((constant == tensor).all())


def _adapt_stem(state: dict[str, Tensor], layout: TensorLayout, channels: int) -> dict[str, Tensor]:
    """RGB weights of the first convolution to ``in_channels``."""
    adapted = dict(state)
    for name in layout.stem:
        weight = state.get(name)
        if weight is None or channels == 3 or weight.dim() != 4 or weight.shape[1] != 3:
            continue
        if channels == 1:
            adapted[name] = weight.float().sum(1, keepdim=True).to(weight.dtype)
        else:
            repeated = weight.repeat(1, -(-channels // 3), 1, 1)[:, :channels]
            adapted[name] = repeated * (3 / channels)
    return adapted


def check_state(
    state: Mapping[str, Tensor], model: Mapping[str, Tensor], *, source: str, name: str, hint: str = ""
) -> None:
    """Compare a checkpoint's names, shapes and values with a model's state dict.

    Raises:
        WeightsError: lists missing, unexpected, misshapen, non-finite and non-float tensors and negative variances,
            ten of each.
    """
    both = [(key, value, model[key]) for key, value in state.items() if key in model]
    faults = {
        "missing": [f"{key} {tuple(value.shape)}" for key, value in model.items() if key not in state],
        "unexpected": [f"{key} {tuple(value.shape)}" for key, value in state.items() if key not in model],
        "misshapen": [
            f"{key} {tuple(value.shape)} instead of {tuple(expected.shape)}"
            for key, value, expected in both
            if value.shape != expected.shape
        ],
        "of another kind": [
            f"{key} {_kind(value)} instead of {_kind(expected)}"
            for key, value, expected in both
            if not _readable(value, expected)
        ],
        "with NaN or infinity": [
            key for key, value, expected in both if _readable(value, expected) and not _finite(value, expected)
        ],
        "with a negative variance": [
            key
            for key, value, expected in both
            if key.endswith("running_var") and _readable(value, expected) and bool((value < 0).any())
        ],
    }
    found = [f"{len(keys)} {fault}: {_listed(keys)}" for fault, keys in faults.items() if keys]
    if found:
        raise WeightsError(
            f"{source} does not fit {name}, which has {len(model)} tensors. {'. '.join(found)}. "
            f"Nothing was loaded. {hint or 'Give the checkpoint of this variant, in timm parameter names.'}"
        )


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f"{str(tensor.layout).removeprefix('torch.')} "
    return f"{'without values ' if tensor.is_meta else ''}{layout}{str(tensor.dtype).removeprefix('torch.')}"


def _readable(value: Tensor, expected: Tensor) -> bool:
    """Return whether the values are there, dense, and of the kind (float or integer) that the model has."""
    plain = value.layout == torch.strided and not value.is_meta and not value.is_quantized
    return plain and value.is_floating_point() == expected.is_floating_point() and not value.is_complex()


def _finite(value: Tensor, expected: Tensor) -> bool:
    """Return whether all values are finite as the model will hold them: a double may overflow float32."""
    return not value.is_floating_point() or bool(torch.isfinite(value.to(expected.dtype)).all())


def _listed(keys: Iterable[str]) -> str:
    names = list(keys)
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
