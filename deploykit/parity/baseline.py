"""What an engine itself gave when it was exported, and how much of that may move when it runs again.

An INT8 engine is far from torch, so its distance from torch hides much: 12 dB also pass for outputs that are a tenth
too large. From what the engine gave itself it differs only by roundings, of which a bundle carries a measure: how far
the outputs move when the images change by `probes.ROUNDING`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deploykit.errors import ParityError, SpecError
from deploykit.npz import bundled_arrays
from deploykit.parity.compare import LOGITS
from deploykit.parity.metrics import sqnr_db
from deploykit.parity.probes import ImageArray, mixed_images, noisy_images, nudged_images
from deploykit.parity.reference import choose_positions
from deploykit.places import storage_error

BASELINE_FILE = "baseline.npz"

MIXED = 4
"""How many images are asked that the bundle does not carry: they are made from those that it does."""

NUDGES = 2
NOISY = 8
CHUNK = 8
_EVERY = 4
"""One of so many of the reference's values of a level is kept; logits are kept whole."""

FloatArray = npt.NDArray[np.float32]
Run = Callable[[ImageArray], Mapping[str, FloatArray]]
"""Give the outputs by name, each ``(n, ...)``, for a few images."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelBaseline:
    """One output of an engine.

    ``values`` is ``(N, K)``: at ``positions`` of an output of ``size`` values an image, for the reference's images
    and then the mixed ones. ``spread`` is the root mean square of what moves with the roundings, or with the images
    that share a batch where that is more, and ``class_spread`` that of each class, empty for others than logits;
    ``gain_spread`` is by how much they scale the output. ``response_db`` is how far the outputs move with noise in the
    images, in dB; infinite: not at all.
    """

    size: int
    positions: npt.NDArray[np.int64]
    values: FloatArray
    spread: float
    class_spread: FloatArray
    gain_spread: float
    response_db: float

    def __post_init__(self) -> None:
        columns = self.positions.size
        ascending = self.positions.ndim == 1 and columns > 0 and bool((np.diff(self.positions) > 0).all())
        if not ascending or self.positions[0] < 0 or self.positions[-1] >= self.size:
            raise SpecError(f"the positions do not lie in {self.size} values, ascending.")
        if self.values.ndim != 2 or self.values.shape[1] != columns or not np.isfinite(self.values).all():
            raise SpecError(f"the values are {self.values.shape} and {columns} positions; expected finite (N, K).")
        if self.class_spread.size not in (0, columns) or not np.isfinite(self.class_spread).all():
            raise SpecError(f"there are {self.class_spread.size} classes' figures for {columns} values.")
        if not (self.spread >= 0 and self.gain_spread >= 0) or math.isnan(self.response_db):
            raise SpecError("a figure is negative or not a number.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """What an engine gave on ``machine`` (`deploykit.processor.machine_key`), level by level."""

    machine: str
    levels: dict[str, LevelBaseline]

    @property
    def images(self) -> int:
        """How many images each level has values for, the mixed ones among them."""
        return len(next(iter(self.levels.values())).values)

    def save(self, path: Path) -> None:
        """Write one ``.npz``; equal baselines give equal bytes.

        Raises:
            StorageError: the file cannot be written.
        """
        arrays: dict[str, npt.NDArray[Any]] = {"machine": np.array(self.machine), "names": np.array(list(self.levels))}
        for name, level in self.levels.items():
            arrays |= {f"positions/{name}": level.positions, f"values/{name}": level.values}
            arrays |= {f"class_spread/{name}": level.class_spread}
            arrays[f"figures/{name}"] = np.array([level.size, level.spread, level.gain_spread, level.response_db])
        try:
            with path.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
        except OSError as error:
            raise storage_error(f"the baseline {path} cannot be written", error) from error

    @classmethod
    def load(cls, source: Path | bytes) -> Baseline:
        """Read what `save` wrote, from the file or from its content; nothing is unpickled.

        Raises:
            BundleError: the file is damaged, or not a baseline.
            StorageError: this machine cannot read it now.
        """
        with bundled_arrays("the baseline", source) as arrays:
            names = [str(name) for name in arrays["names"]]
            levels = {name: _read_level(arrays, name) for name in names}
            counts = {len(level.values) for level in levels.values()}
            if len(counts) != 1:
                raise SpecError(f"the levels have these numbers of images: {sorted(counts)}; expected one.")
            return cls(machine=str(arrays["machine"]), levels=levels)


def measure_baseline(run: Run, images: ImageArray, machine: str) -> Baseline:
    """Run an engine on the reference's images, on mixed ones, and on changed ones.

    Args:
        run: the engine.
        images: the reference's, as the engine takes them.
        machine: where it runs.

    Raises:
        ParityError: an output holds NaN or infinity.
    """
    asked = asked_images(images)
    shapes = {name: output.shape[1:] for name, output in run(asked[:1]).items()}
    positions = {name: _positions(name, shape) for name, shape in shapes.items()}
    values = sampled(run, asked, positions)
    order = np.random.default_rng(NUDGES).permutation(len(asked))  # `verify` asks in another order each time
    back = np.argsort(order)
    again = {name: each[back] for name, each in sampled(run, asked[order], positions).items()}
    if any(not np.array_equal(again[name], base) for name, base in values.items()):
        machine = ""  # not even one machine gives equal bits, so that none is taken to do so
    moved = [sampled(run, nudged_images(asked, seed), positions) for seed in range(NUDGES)]
    noisy = sampled(run, noisy_images(images[:NOISY], np.random.default_rng(NUDGES)), positions)
    levels = {}
    for name, base in values.items():
        if not np.isfinite(base).all():
            raise ParityError(f"output {name!r} of the engine holds NaN or infinity. Check the weights and the images.")
        errors = np.stack([(each[name].astype(np.float64) - base) for each in moved])
        shuffled = again[name].astype(np.float64) - base
        is_logits = name == LOGITS and len(shapes[name]) == 1
        levels[name] = LevelBaseline(
            size=math.prod(shapes[name]),
            positions=positions[name],
            values=base,
            spread=max(_rms(errors), _rms(shuffled)),
            class_spread=np.maximum(_by_class(errors), _by_class(shuffled)) if is_logits else np.zeros(0, "f4"),
            gain_spread=max(abs(gain(base, each[name])) for each in (*moved, again)),
            response_db=sqnr_db(base[: len(noisy[name])], noisy[name]),
        )
    return Baseline(machine=machine, levels=levels)


def asked_images(images: ImageArray) -> ImageArray:
    """Return the reference's images, and behind them the mixed ones."""
    return np.concatenate([images, mixed_images(images, MIXED)])


def sampled(run: Run, images: ImageArray, positions: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, FloatArray]:
    """Run an engine on any number of images, and keep only some values of each output.

    Raises:
        ParityError: an output is missing, or smaller than its positions.
    """
    parts: dict[str, list[FloatArray]] = {name: [] for name in positions}
    for chunk in _chunks(images):
        outputs = run(chunk)
        for name, chosen in positions.items():
            if name not in outputs or outputs[name][0].size <= chosen[-1]:
                raise ParityError(
                    f"the engine's output {name!r} is missing or smaller than when it was exported. Export again."
                )
            parts[name].append(outputs[name].reshape(len(chunk), -1)[:, chosen].astype(np.float32))
    return {name: np.concatenate(each) for name, each in parts.items()}


def gain(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> float:
    """By how much values were scaled, least squares: 0.1 for a tenth larger; 0 where all were zero."""
    one, other = (array.reshape(-1).astype(np.float64) for array in (before, after))
    power = float(np.dot(one, one))
    return float(np.dot(one, other)) / power - 1 if power else 0.0


def _positions(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    whole = name == LOGITS and len(shape) == 1
    chosen = choose_positions(math.prod(shape), whole=whole)
    return chosen if whole else chosen[::_EVERY].copy()


def _read_level(arrays: Mapping[str, npt.NDArray[Any]], name: str) -> LevelBaseline:
    size, spread, gain_spread, response = (float(figure) for figure in arrays[f"figures/{name}"])
    return LevelBaseline(
        size=int(size),
        positions=arrays[f"positions/{name}"],
        values=arrays[f"values/{name}"],
        spread=spread,
        class_spread=arrays[f"class_spread/{name}"],
        gain_spread=gain_spread,
        response_db=response,
    )


def _chunks(images: ImageArray) -> Iterator[ImageArray]:
    for start in range(0, len(images), CHUNK):
        yield images[start : start + CHUNK]


def _by_class(values: npt.NDArray[Any]) -> FloatArray:
    classes = values.reshape(-1, values.shape[-1])
    rms: FloatArray = np.sqrt((classes**2).mean(axis=0)).astype(np.float32)
    return rms


def _rms(values: npt.NDArray[Any]) -> float:
    return math.sqrt(float((values.astype(np.float64) ** 2).mean()))
