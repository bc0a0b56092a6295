"""Features of a frozen backbone, computed once an image: for training heads on top of it."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from deploykit.arguments import check_arguments
from deploykit.arrays import Array
from deploykit.backbones.base import BaseBackbone
from deploykit.backbones.user_module import described
from deploykit.backbones.weights import weights_digest
from deploykit.errors import SpecError
from deploykit.feature_dict import Features
from deploykit.npz import read_npz

logger = logging.getLogger(__name__)

Entry: TypeAlias = dict[str, Array]

SUFFIX = ".npz"
STALE_SECONDS = 3600.0


class FeatureCache:
    """Calls a frozen backbone only for images that it has not seen; called like the backbone itself.

    An entry is one image's features, under a digest of the image's bytes, the weights, the backbone's
    options and the names of what it returns: other weights or options never get old features. Memory
    holds the entries used last, up to ``max_bytes``; a folder holds more, up to ``max_folder_bytes``,
    survives the process and may be shared by several. A file that does not read is dropped and its
    features are computed again. Safe to call from several threads; the backbone runs in one at a time.

    Features that were computed in a batch of another size differ from a fresh call by rounding.

    Args:
        backbone: in eval mode.
        max_bytes: of features in memory; 0 keeps none.
        folder: where entries are stored too; None: memory only.
        max_folder_bytes: of files in the folder; those used longest ago are removed.

    Raises:
        SpecError: a size below 0, or a folder that cannot be made.
    """

    def __init__(
        self,
        backbone: BaseBackbone,
        *,
        max_bytes: int = 1 << 30,
        folder: Path | str | None = None,
        max_folder_bytes: int = 16 << 30,
    ) -> None:
        check_arguments(FeatureCache.__init__, locals())
        if max_bytes < 0 or max_folder_bytes < 0:
            raise SpecError(f"max_bytes={max_bytes}, max_folder_bytes={max_folder_bytes}; expected 0 or more.")
        self.backbone = backbone = described(backbone)
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._names = backbone.spec.output_names
        self._memory: OrderedDict[str, Entry] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._run_lock = threading.Lock()
        self._folder = None if folder is None else _Folder(Path(folder), max_folder_bytes)
        self._model_state: tuple[tuple[int, int], ...] = ()
        self._model_digest = ""

    @property
    def memory_bytes(self) -> int:
        """The bytes of features that are in memory now."""
        return self._bytes

    def __call__(self, images: Array | Tensor) -> Array | Tensor | Features[Array | Tensor]:
        """Return the backbone's answer to ``(N, C, H, W)`` images, in the caller's kind of array and without autograd.

        Raises:
            SpecError: images that the backbone does not take, or a backbone in training mode.
        """
        if self.backbone.training:
            raise SpecError("the backbone is in training mode; a cache needs fixed features. Call backbone.eval().")
        if not isinstance(images, (np.ndarray, Tensor)) or images.ndim != 4 or len(images) == 0:
            answer: Tensor | Features[Array | Tensor] = self.backbone(images)
            return answer
        array = images if isinstance(images, np.ndarray) else images.detach().cpu().float().numpy()
        keys = self._keys(array)
        found = {key: entry for key in dict.fromkeys(keys) if (entry := self._lookup(key)) is not None}
        if missing := self._positions(keys, found):
            with self._run_lock:
                # Another thread may have computed them while this one waited.
                found.update({key: entry for key in missing if (entry := self._recall(key)) is not None})
                missing = self._positions(keys, found)
                if missing:
                    found.update(self._compute(array, missing))
        with self._lock:
            self.misses += len(missing)
            self.hits += len(keys) - len(missing)
        stacked = {name: np.stack([found[key][name] for key in keys]) for name in self._names}
        outputs: Features[Array | Tensor] = Features(stacked, self.backbone.feature_info.by_index())
        if isinstance(images, Tensor):
            device = images.device
            outputs = outputs.map(lambda feature: torch.from_numpy(feature).to(device))
        return outputs if self.backbone.spec.features_only else outputs[self._names[0]]

    def clear(self) -> None:
        """Forget all entries in memory; files stay."""
        with self._lock:
            self._memory.clear()
            self._bytes = 0

    def _keys(self, images: Array) -> list[str]:
        prefix = self._digest_of_model()
        keys = []
        for image in images:
            digest = hashlib.sha256(f"{prefix} {image.dtype} {image.shape}".encode())
            digest.update(np.ascontiguousarray(image).data)
            keys.append(digest.hexdigest())
        return keys

    def _digest_of_model(self) -> str:
        """Return the digest of weights and options; taken again when a weight was replaced or changed in place."""
        backbone = self.backbone
        state = tuple((tensor.data_ptr(), tensor._version) for tensor in backbone.state_dict().values())
        with self._lock:
            if state != self._model_state:
                text = f"{type(backbone).__qualname__} {backbone.spec} {weights_digest(backbone)}"
                self._model_digest = hashlib.sha256(text.encode()).hexdigest()
                self._model_state = state
            return self._model_digest

    @staticmethod
    def _positions(keys: list[str], found: dict[str, Entry]) -> dict[str, int]:
        """Return each key that is not there, with the first position of its image in the batch."""
        missing: dict[str, int] = {}
        for position, key in enumerate(keys):
            if key not in found:
                missing.setdefault(key, position)
        return missing

    def _recall(self, key: str) -> Entry | None:
        with self._lock:
            entry = self._memory.get(key)
            if entry is not None:
                self._memory.move_to_end(key)
            return entry

    def _lookup(self, key: str) -> Entry | None:
        entry = self._recall(key)
        if entry is None and self._folder is not None:
            entry = self._folder.read(key, self._names)
            if entry is not None:
                self._remember(key, entry)
        return entry

    def _compute(self, images: Array, missing: dict[str, int]) -> dict[str, Entry]:
        answer = self.backbone(np.ascontiguousarray(images[list(missing.values())]))
        outputs = answer if self.backbone.spec.features_only else {self._names[0]: answer}
        computed = {}
        for row, key in enumerate(missing):
            # Copies: a view would keep the whole batch in memory.
            entry = {name: outputs[name][row].copy() for name in self._names}
            computed[key] = entry
            self._remember(key, entry)
            if self._folder is not None:
                self._folder.write(key, entry)
        return computed

    def _remember(self, key: str, entry: Entry) -> None:
        size = _bytes_of(entry)
        if size > self.max_bytes:
            return
        with self._lock:
            if key in self._memory:
                return
            self._memory[key] = entry
            self._bytes += size
            while self._bytes > self.max_bytes:
                _, oldest = self._memory.popitem(last=False)
                self._bytes -= _bytes_of(oldest)


class _Folder:
    """Entries as .npz files, each written beside its place and renamed; bounded, oldest use first out."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root.expanduser().absolute()
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._warned = False
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError(
                f"the feature cache's folder {self._root} cannot be made: {error}. Choose another."
            ) from error
        for path in self._root.glob("*.tmp"):
            if _age(path) > STALE_SECONDS:
                path.unlink(missing_ok=True)
        self._bytes = sum(_size(path) for path in self._root.glob(f"*{SUFFIX}"))

    def read(self, key: str, names: tuple[str, ...]) -> Entry | None:
        path = self._root / f"{key}{SUFFIX}"
        try:
            stored = read_npz(path)
            entry = {name: stored[f"arr_{position}"] for position, name in enumerate(names)}
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError) as error:
            logger.warning("The cached features %s do not read (%s); they are computed again", path.name, error)
            self._remove(path)
            return None
        return entry

    def write(self, key: str, entry: Entry) -> None:
        path = self._root / f"{key}{SUFFIX}"
        temporary: Path | None = None
        try:
            with tempfile.NamedTemporaryFile(dir=self._root, suffix=".tmp", delete=False) as file:
                temporary = Path(file.name)
                # By position: a level's name could be that of one of np.savez's parameters.
                np.savez(file, *entry.values())
            size, replaced = _size(temporary), _size(path)
            temporary.replace(path)
        except OSError as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            if not self._warned:
                logger.warning("Features cannot be stored in %s (%s); they stay in memory only", self._root, error)
                self._warned = True
            return
        with self._lock:
            self._bytes += size - replaced
        self._evict()

    def _evict(self) -> None:
        with self._lock:
            if self._bytes <= self._max_bytes:
                return
            # Other processes write here too, so the folder is counted again.
            files = sorted((_used(path), _size(path), path) for path in self._root.glob(f"*{SUFFIX}"))
            self._bytes = sum(size for _, size, _ in files)
            for _, size, path in files:
                if self._bytes <= self._max_bytes:
                    break
                path.unlink(missing_ok=True)
                self._bytes -= size

    def _remove(self, path: Path) -> None:
        with self._lock:
            self._bytes -= _size(path)
            path.unlink(missing_ok=True)


def _bytes_of(entry: Entry) -> int:
    return sum(feature.nbytes for feature in entry.values())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _used(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _age(path: Path) -> float:
    used = _used(path)
    return time.time() - used / 1e9 if used else 0.0
