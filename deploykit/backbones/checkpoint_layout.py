"""Find a backbone's state dict inside a checkpoint: under which keys it lies, and which prefix its names have.

Training scripts nest it (``state_dict``, ``model``, ``model_ema``) and wrap the network (``module.``,
``_orig_mod.``, ``model.``, ``backbone.``). Both are found by the backbone's own tensor names, so any nesting and
any prefix will do. Where a file holds several state dicts, averaged weights (EMA) go first, as timm takes them, with
a warning; other choices are the user's.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from deploykit.backbones.pickle_allowlist import PlainArray
from deploykit.errors import WeightsError, WeightsWarning

Content: TypeAlias = Mapping[str, object]
"""What a checkpoint holds, by name; a foreign file may have names of other types."""

_DEPTH = 4
"""How deep a state dict may be nested in a checkpoint."""
_LISTED = 10
_NEARLY = 0.5
"""A state dict with at least this share of the best one's names is taken for one of the same network."""

_INNER_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch puts into names, at any depth, when it compiles, shards or checkpoints a part of a network."""

_AVERAGE = re.compile(r"(?:^|[^a-zA-Z])ema(?:[^a-zA-Z]|$)|E(?:ma|MA)(?![a-z])")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a state dict lies: the keys that lead to it, the prefix of its names, how many names match."""

    keys: tuple[str, ...]
    prefix: str
    matched: int

    @property
    def name(self) -> str:
        """What ``checkpoint_key`` calls it, ``"state_dict.model"``; empty: the file itself."""
        return ".".join((*self.keys, *self.prefix.split("."))).rstrip(".")

    @property
    def is_average(self) -> bool:
        """Whether its name says that it holds averaged weights."""
        return _AVERAGE.search(self.name) is not None


@dataclass(frozen=True, kw_only=True)
class FoundState:
    """A state dict with the backbone's own names, and the tensors beside it that belong to something else.

    ``others`` are the further state dicts of the network in the file.
    """

    place: Place
    tensors: dict[str, Tensor]
    outside: dict[str, Tensor]
    others: tuple[Place, ...] = ()


def find_state(content: Content, wanted: Collection[str], *, source: str, key: str | None) -> FoundState:
    """Take the one state dict of a network out of a checkpoint.

    Args:
        content: what the file holds.
        wanted: the names of the network's tensors, without those that a checkpoint may lack.
        source: the file's name, for messages.
        key: which state dict, where there are several, by `Place.name` or the keys at its start.

    Raises:
        WeightsError: no tensor has a name of the network, several state dicts have and none is chosen, or
            ``key`` names none.
    """
    places = _find_places(content, frozenset(wanted))
    if not places:
        raise _nothing_found(content, wanted, source)
    best = max(place.matched for place in places)
    rivals = [place for place in places if place.matched >= _NEARLY * best]
    if key is None and len(rivals) > 1 and best < _NEARLY * len(wanted):
        raise WeightsError(
            f"{source} holds no state dict of this network: at most {best} of its {len(wanted)} tensors have their "
            f"names under one prefix ({_named_all(rivals[:3])}, ...). Give the checkpoint of this variant, in timm's "
            "parameter names; a network whose layers stand in another module (nn.Sequential) can be given as it is."
        )
    place = _choose(content, rivals, source) if key is None else _named(content, rivals, key, source)
    if key is None and not place.is_average and (unnamed := _unnamed_averages(content)):
        warnings.warn(
            f"{source} holds averaged weights (EMA) in {unnamed[0]} without names, which cannot be loaded; took the "
            f"raw ones in {_shown(place)}. To take the averages, copy them into the model in training and save its "
            "state dict.",
            WeightsWarning,
            stacklevel=2,
        )
    return _take(content, place, rivals)


def _mappings(content: Content, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Content]]:
    """Yield every mapping in a checkpoint, with the keys that lead to it."""
    yield keys, content
    if len(keys) < _DEPTH:
        for key, value in content.items():
            if isinstance(value, Mapping):
                yield from _mappings(value, (*keys, str(key)))


def _tensors(mapping: Content) -> dict[str, Tensor]:
    """Return the tensors and arrays of numbers in a mapping by their names in an unwrapped network."""
    found: dict[str, Tensor] = {}
    for key, value in mapping.items():
        if isinstance(value, PlainArray) and value.value.dtype.kind in "fiu":
            value = torch.tensor(value.value.astype(value.value.dtype.newbyteorder("=")))  # noqa: PLW2901
        if isinstance(value, Tensor):
            found[_INNER_WRAPPERS.sub("", str(key))] = value
    return found


def _find_places(content: Content, wanted: frozenset[str]) -> list[Place]:
    places = []
    for keys, mapping in _mappings(content):
        matched: Counter[str] = Counter()
        for name in _tensors(mapping):
            parts = name.split(".")
            for start in range(len(parts)):
                if ".".join(parts[start:]) in wanted:
                    matched[".".join((*parts[:start], ""))] += 1
        places += [Place(keys=keys, prefix=prefix, matched=count) for prefix, count in matched.items()]
    return places


def _choose(content: Content, rivals: list[Place], source: str) -> Place:
    averages = _different(content, [place for place in rivals if place.is_average])
    raw = _different(content, [place for place in rivals if not place.is_average])
    chosen = averages or raw
    if len(chosen) > 1:
        raise WeightsError(
            f"{source} holds {len(chosen)} state dicts of this network: {_named_all(chosen)}. "
            f"Fix: choose one with checkpoint_key={chosen[0].name!r}."
        )
    if averages and raw:
        warnings.warn(
            f"{source} holds averaged weights (EMA) in {_shown(chosen[0])} beside the raw ones in {_named_all(raw)}; "
            f"took {_shown(chosen[0])}, as timm does. Choose with checkpoint_key={chosen[0].name!r} or "
            f"checkpoint_key={raw[0].name!r}.",
            WeightsWarning,
            stacklevel=2,
        )
    return chosen[0]


def _unnamed_averages(content: Content) -> list[str]:
    """Return where lists of averaged tensors lie, as torch_ema keeps them (``ema.shadow_params``)."""
    return [
        name
        for keys, mapping in _mappings(content)
        for key, value in mapping.items()
        if _AVERAGE.search(name := ".".join((*keys, str(key))))
        and isinstance(value, (list, tuple))
        and any(isinstance(each, Tensor) and each.dim() > 1 for each in value)
    ]


def _different(content: Content, places: list[Place]) -> list[Place]:
    """Return the places that match best, without those whose tensors are the ones of a place before them."""
    best = max((place.matched for place in places), default=0)
    kept: list[tuple[Place, dict[str, Tensor]]] = []
    for place in places:
        tensors = _under(content, place)
        if place.matched == best and not any(_equal(tensors, other) for _, other in kept):
            kept.append((place, tensors))
    return [place for place, _ in kept]


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _named(content: Content, rivals: list[Place], key: str, source: str) -> Place:
    wanted = key.strip(".")
    exact = [place for place in rivals if place.name == wanted]
    below = [place for place in rivals if place.name.startswith(f"{wanted}.")]
    if not exact and not below:
        raise WeightsError(
            f"{source} has no state dict of this network in {key!r}; it has {_named_all(rivals)}. "
            f"Fix: choose one of them with checkpoint_key, or leave it out."
        )
    return exact[0] if exact else _choose(content, below, source)


def _mapping_of(content: Content, place: Place) -> Content:
    mapping = content
    for key in place.keys:
        mapping = next(value for own, value in mapping.items() if str(own) == key and isinstance(value, Mapping))
    return mapping


def _under(content: Content, place: Place) -> dict[str, Tensor]:
    """Return the tensors of a place by the names behind its prefix."""
    prefix = place.prefix
    tensors = _tensors(_mapping_of(content, place))
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _take(content: Content, place: Place, rivals: list[Place]) -> FoundState:
    # State dicts of the same network in the same mapping, whose prefix goes on where this one's ends.
    inner = tuple(
        other.prefix
        for other in rivals
        if other.keys == place.keys and other.prefix != place.prefix and other.prefix.startswith(place.prefix)
    )
    tensors: dict[str, Tensor] = {}
    outside: dict[str, Tensor] = {}
    for name, tensor in _tensors(_mapping_of(content, place)).items():
        if name.startswith(inner):
            continue
        if name.startswith(place.prefix):
            tensors[name[len(place.prefix) :]] = tensor
        elif tensor.numel() > 1 and not any(
            name.startswith(other.prefix) for other in rivals if other.keys == place.keys
        ):
            outside[name] = tensor
    others = tuple(other for other in rivals if other != place)
    return FoundState(place=place, tensors=tensors, outside=outside, others=others)


def _nothing_found(content: Content, wanted: Collection[str], source: str) -> WeightsError:
    every = [name for _, mapping in _mappings(content) for name in _tensors(mapping)]
    if not every:
        kinds = ", ".join(f"{key} ({type(value).__name__})" for key, value in list(content.items())[:_LISTED])
        return WeightsError(
            f"{source} holds no tensors ({kinds or 'it is empty'}); expected a state dict: names to tensors. "
            "Save model.state_dict() alone, or under the key 'state_dict'."
        )
    return WeightsError(
        f"{source} holds no state dict of this network: none of its {len(every)} tensors ({', '.join(every[:3])}, ...) "
        f"has one of the names {', '.join(list(wanted)[:3])}, ..., with or without a prefix. "
        "Give the checkpoint of this variant, in timm's parameter names."
    )


def _shown(place: Place) -> str:
    return place.name or "the file itself"


def _named_all(places: Iterable[Place]) -> str:
    return ", ".join(map(_shown, places))
