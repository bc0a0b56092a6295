"""Tell torch that `Features` is a container, so that programs can be traced and exported that return it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from torch.utils import _pytree as pytree

from deploykit.feature_dict import Features

Context: TypeAlias = tuple[tuple[str, ...], tuple[tuple[int, str], ...]]
"""The names of the maps, and each level's index with its name."""


def register_features() -> None:
    """Register `Features` with torch's pytree; called once, when the backbones are imported."""
    pytree.register_pytree_node(
        Features,
        _flatten,
        _unflatten,
        serialized_type_name="deploykit.Features",
        to_dumpable_context=lambda context: [list(context[0]), [list(pair) for pair in context[1]]],
        from_dumpable_context=lambda plain: (tuple(plain[0]), tuple((index, name) for index, name in plain[1])),
        flatten_with_keys_fn=_flatten_with_keys,
    )


def _flatten(features: Features[object]) -> tuple[list[object], Context]:
    return list(features.values()), (tuple(features), tuple(features.indices.items()))


def _flatten_with_keys(features: Features[object]) -> tuple[list[tuple[pytree.KeyEntry, object]], Context]:
    values, context = _flatten(features)
    return [(pytree.MappingKey(name), value) for name, value in zip(context[0], values, strict=True)], context


def _unflatten(values: Iterable[object], context: Context) -> Features[object]:
    return Features(zip(context[0], values, strict=True), dict(context[1]))
