"""Features: what a backbone answers with, in torch and in every runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar, overload

from deploykit.errors import UnknownLevel

T = TypeVar("T")
S = TypeVar("S")


class Features(dict[str, T]):
    """Feature maps by level name, shallow to deep, that also take a level's index.

    ``features["stage3"]`` and ``features[3]`` are one map. It is a dict of names: iteration, ``len``,
    ``**features`` and ``==`` see the names alone.

    Args:
        maps: name to map ``(N, C, H/stride, W/stride)``, NumPy or torch.
        indices: a level's index to its name (`FeatureInfo.by_index`); levels without a map do no harm.
    """

    def __init__(
        self, maps: Mapping[str, T] | Iterable[tuple[str, T]] = (), indices: Mapping[int, str] | None = None
    ) -> None:
        super().__init__(maps)
        # A plain dict: torch.compile rebuilds it where a compiled function returns features.
        self.indices: dict[int, str] = dict(indices or {})

    if TYPE_CHECKING:

        def __getitem__(self, key: str | int, /) -> T: ...

    def __missing__(self, key: object) -> T:
        name = self._name_of(key)
        if name is None:
            have = ", ".join(f"{index} ({name})" for index, name in self.indices.items() if name in self)
            raise UnknownLevel(f"there is no level {key!r} in these features; there are {have or list(self)}.")
        return super().__getitem__(name)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._name_of(key) is not None

    @overload  # type: ignore[override]
    def get(self, key: str | int) -> T | None: ...
    @overload
    def get(self, key: str | int, default: S) -> T | S: ...
    def get(self, key: str | int, default: object = None) -> object:
        """Return the map of a level's name or index, or ``default``."""
        return self[key] if key in self else default  # noqa: SIM401  (this is get)

    def copy(self) -> Features[T]:
        """Return a shallow copy that takes indices too."""
        return Features(self, self.indices)

    def map(self, change: Callable[[T], S]) -> Features[S]:
        """Return the same levels, each map changed by ``change``."""
        return Features({name: change(feature) for name, feature in self.items()}, self.indices)

    def _name_of(self, key: object) -> str | None:
        """Return the name of the level with this index, where its map is here."""
        name = self.indices.get(key)  # type: ignore[call-overload]
        return name if name is not None and super().__contains__(name) else None
