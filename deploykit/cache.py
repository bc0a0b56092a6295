"""Engines that were built before: bundles in the store, each under the digest of all that decides it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from deploykit.bundle import Manifest, read_manifest
from deploykit.errors import BundleError
from deploykit.store import Store, address

KIND = "engines"
BUNDLE = "bundle"
"""The folder of an entry that is the bundle."""


class EngineCache:
    """The engines of a store; safe to use from several processes and threads at once.

    Args:
        store: None: the one of `deploykit.places.cache_root`.
    """

    def __init__(self, store: Store | None = None) -> None:
        self._store = store or Store()

    @property
    def root(self) -> Path | None:
        """The folder of the engines; None where nothing can be kept."""
        return None if self._store.root is None else self._store.root / KIND

    @contextmanager
    def opened(
        self,
        parts: Mapping[str, object],
        build: Callable[[Path], None],
        *,
        title: str,
        expected: Callable[[Manifest], str | None] = lambda manifest: None,
    ) -> Iterator[Path]:
        """Give the folder of a bundle, built where it is absent or damaged; it stays until the block ends.

        Args:
            parts: all that decides the engine.
            build: writes a bundle at a folder that does not exist yet; what it raises passes through and leaves no
                entry.
            title: what people call the engine.
            expected: says how a kept bundle differs from what was asked for; None: it does not.

        Raises:
            StorageError: the engine could not be written.
        """

        def build_entry(folder: Path) -> None:
            build(folder / BUNDLE)

        def check_fits(folder: Path) -> str | None:
            try:
                return expected(read_manifest(folder / BUNDLE))
            except BundleError as error:
                return str(error)

        with self._store.opened(address(KIND, parts, title=title), build_entry, check_fits) as folder:
            yield folder / BUNDLE
