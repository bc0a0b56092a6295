"""Engines that were built before: one bundle a key, the key a digest of all that decides the engine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from deploykit.bundle import is_bundle, open_bundle, sweep_stale
from deploykit.errors import BundleError, SpecError

ENVIRONMENT = "DEPLOYKIT_CACHE"

logger = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{64}")


class EngineCache:
    """A folder of bundles; safe to use from several processes and threads at once.

    Args:
        root: the folder; None: ``engines`` below ``$DEPLOYKIT_CACHE``, or below the user's cache
            folder when that is not set.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root.expanduser().absolute() if root is not None else default_root() / "engines"

    def key(self, parts: Mapping[str, object]) -> str:
        """The SHA-256, in hex, of all that decides an engine.

        ``parts`` may nest str, int, float, bool, None, lists, tuples, str-keyed mappings and
        dataclasses (whose type's name counts too). A large input is named by its own digest.

        Raises:
            SpecError: a value of another type, which has no stable text.
        """
        text = json.dumps(_canonical(parts, "parts"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def get_or_build(self, key: str, build: Callable[[Path], None]) -> Path:
        """The folder of the bundle under ``key``; built once, whoever asks, and verified.

        ``build(folder)`` writes a bundle at ``folder``, which does not exist yet; what it raises
        passes through and leaves no entry. An entry that does not verify is built again.

        Raises:
            SpecError: ``key`` is not from `key`.
            BundleError: the cache cannot be written, or ``build`` left no bundle that opens.
        """
        entry = self._entry(key)
        if is_bundle(entry) and _is_whole(entry):
            return entry
        with self._locked(key):
            if entry.exists():
                problem = _problem(entry)
                if problem is None:
                    return entry
                logger.warning("The cached engine %s is rebuilt, because %s", entry, problem)
                shutil.rmtree(entry)
            logger.info("Building the engine %s", key[:12])
            build(entry)
            open_bundle(entry)
        return entry

    def clear(self) -> int:
        """Remove every entry that no process is building; returns how many."""
        if not self.root.is_dir():
            return 0
        removed = 0
        for entry in sorted(self.root.iterdir()):
            key = entry.name if _KEY.fullmatch(entry.name) else entry.name.removesuffix(".lock")
            if not _KEY.fullmatch(key):
                continue
            try:
                with FileLock(self.root / f"{key}.lock", timeout=0):
                    sweep_stale(self.root / key)
                    removed += (self.root / key).is_dir()
                    shutil.rmtree(self.root / key, ignore_errors=True)
            except Timeout:
                logger.info("The engine %s is being built; it stays", key[:12])
        return removed

    def _entry(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise SpecError(f"the cache key is {key!r}; expected 64 hex digits, as EngineCache.key() gives.")
        return self.root / key

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        lock = FileLock(self.root / f"{key}.lock")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.info("Waiting for another process that builds the engine %s", key[:12])
                lock.acquire()
        except OSError as error:
            raise BundleError(
                f"the engine cache {self.root} cannot be written: {error}. "
                f"Set {ENVIRONMENT} to a writable folder, or turn the cache off with cache=False."
            ) from error
        try:
            yield
        finally:
            lock.release()


def default_root() -> Path:
    """``$DEPLOYKIT_CACHE``, or deploykit's folder in the user's cache."""
    chosen = os.environ.get(ENVIRONMENT)
    return Path(chosen or platformdirs.user_cache_dir("deploykit")).expanduser().absolute()


def _problem(entry: Path) -> str | None:
    try:
        open_bundle(entry)
    except BundleError as error:
        return str(error)
    return None


def _is_whole(entry: Path) -> bool:
    return _problem(entry) is None


def _canonical(value: object, where: str) -> Any:
    """The value as JSON's types, or an error that says which part has no stable text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise SpecError(f"{where} has the key {name!r}; a cache key's parts are named by str.")
        return {name: _canonical(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
        return {"type": type(value).__qualname__, "fields": _canonical(fields, where)}
    raise SpecError(
        f"{where} is a {type(value).__name__}, which has no stable text. "
        "Give str, numbers, lists, mappings or dataclasses; name arrays and files by their digest."
    )
