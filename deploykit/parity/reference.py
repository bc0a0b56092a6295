"""The reference that travels in a bundle, so that verifying an engine needs neither torch nor weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from deploykit.arrays import Array, FloatArray
from deploykit.errors import ParityError, SpecError
from deploykit.image_sizes import Size, size_text
from deploykit.npz import bundled_arrays, unpacked_limit
from deploykit.parity.compare import LOGITS, check_levels
from deploykit.places import storage_error
from deploykit.sampling import hashed_fractions

REFERENCE_FILE = "reference.npz"
CORNER_FILES = "reference-{}.npz"
"""The references of an engine for a range of image sizes, at its corners: ``reference-160x160.npz``."""
MAX_VALUES = 16384
"""How many values of each output are kept an image; logits are kept whole."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ParityReference:
    """Images and what torch FP32 gives for them, at fixed positions of each output.

    ``images`` is ``(N, C, H, W)`` float32, as the model takes them. ``expected[name]`` is
    ``(N, K)`` float32: the values at ``positions[name]``, ``(K,)`` int64 ascending, of the
    output flattened an image. ``shapes[name]`` is the output's whole shape without N.
    """

    images: FloatArray
    expected: dict[str, FloatArray]
    positions: dict[str, npt.NDArray[np.int64]]
    shapes: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        _check_images(self.images)
        if not self.expected or not self.expected.keys() == self.positions.keys() == self.shapes.keys():
            raise SpecError(
                f"the reference has values for {sorted(self.expected)}, positions for {sorted(self.positions)} and "
                f"shapes for {sorted(self.shapes)}; expected the same names, at least one."
            )
        for name, expected in self.expected.items():
            positions, size = self.positions[name], int(np.prod(self.shapes[name], dtype=np.int64))
            if expected.dtype != np.float32 or expected.shape != (len(self.images), positions.size):
                raise SpecError(
                    f"the reference's {name!r} is {expected.shape} {expected.dtype}; "
                    f"expected {(len(self.images), positions.size)} float32."
                )
            ascending = positions.ndim == 1 and positions.size > 0 and bool((np.diff(positions) > 0).all())
            if positions.dtype != np.int64 or not ascending or positions[0] < 0 or positions[-1] >= size:
                raise SpecError(f"the reference's positions of {name!r} do not lie in its {size} values, ascending.")
            if not np.isfinite(expected).all():
                raise ParityError(f"the reference's {name!r} holds NaN or infinity. Check the weights and the images.")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def logits(self) -> str | None:
        """The name of the logits; None where there are none, or only a map of that name."""
        return LOGITS if len(self.shapes.get(LOGITS, ())) == 1 else None

    def sample(self, outputs: Mapping[str, Array]) -> dict[str, FloatArray]:
        """Return an engine's outputs, each ``(n, ...)`` for any n, at the reference's positions: ``(n, K)``.

        Raises:
            ParityError: an output is missing, unknown, or of another shape than the reference's.
        """
        check_levels(self.expected, outputs)
        wrong = [
            f"{name} is {outputs[name].shape[1:]}, expected {shape}"
            for name, shape in self.shapes.items()
            if outputs[name].shape[1:] != shape
        ]
        if wrong:
            raise ParityError(f"outputs differ in shape from the reference: {'; '.join(wrong)}. Export again.")
        return {name: _take(outputs[name], positions) for name, positions in self.positions.items()}

    def save(self, path: Path) -> None:
        """Write one compressed ``.npz``; equal references give equal bytes.

        Raises:
            BundleError: the file cannot be written.
        """
        arrays: dict[str, Array] = {"images": self.images, "names": np.array(list(self.expected))}
        for name in self.expected:
            arrays[f"expected/{name}"] = self.expected[name]
            arrays[f"positions/{name}"] = self.positions[name]
            arrays[f"shape/{name}"] = np.array(self.shapes[name], dtype=np.int64)
        total = sum(array.nbytes for array in arrays.values())
        try:
            with path.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
            if total > unpacked_limit(path.stat().st_size):  # so much smaller that `load` would not trust it
                with path.open("wb") as file:
                    np.savez(file, allow_pickle=False, **arrays)
        except OSError as error:
            raise storage_error(f"the parity reference {path} cannot be written", error) from error

    @classmethod
    def load(cls, source: Path | bytes) -> ParityReference:
        """Read what `save` wrote, from the file or from its content.

        Raises:
            BundleError: the file is missing, damaged, or not a parity reference.
            StorageError: this machine cannot read it now.
        """
        with bundled_arrays("the parity reference", source) as arrays:
            images, names = arrays["images"], [str(name) for name in arrays["names"]]
            return cls(  # which checks the dtypes
                images=cast("FloatArray", images),
                expected={name: cast("FloatArray", arrays[f"expected/{name}"]) for name in names},
                positions={name: cast("npt.NDArray[np.int64]", arrays[f"positions/{name}"]) for name in names},
                shapes={name: tuple(int(side) for side in arrays[f"shape/{name}"]) for name in names},
            )


def corner_file(size: Size) -> str:
    """Return the name of the reference for images of ``(height, width)``."""
    return CORNER_FILES.format(size_text(size))


def capture(images: FloatArray, outputs: Mapping[str, Array]) -> ParityReference:
    """Return the reference for these images: at most `MAX_VALUES` values of each output an image.

    Args:
        images: ``(N, C, H, W)`` float32, as the model takes them.
        outputs: torch FP32's outputs for all of them, each ``(N, ...)``.

    Raises:
        SpecError: no images, no outputs, or shapes that do not go together.
        ParityError: an output holds NaN or infinity.
    """
    _check_images(images)
    for name, output in outputs.items():
        if output.ndim < 2 or len(output) != len(images) or output.size == 0:
            raise SpecError(f"output {name!r} has shape {output.shape}; expected ({len(images)}, ...) with values.")
    positions = {
        name: choose_positions(output[0].size, whole=name == LOGITS and output.ndim == 2)
        for name, output in outputs.items()
    }
    return ParityReference(
        images=np.ascontiguousarray(images),
        expected={name: _take(output, positions[name]) for name, output in outputs.items()},
        positions=positions,
        shapes={name: output.shape[1:] for name, output in outputs.items()},
    )


def choose_positions(size: int, *, whole: bool = False) -> npt.NDArray[np.int64]:
    """Ascending positions in a flat output of ``size`` values: all, or one in each of `MAX_VALUES` equal cells.

    Where in its cell follows a hash (see `deploykit.sampling`): a fixed step divides the width of most maps and
    sees only a few of their columns.
    """
    if whole or size <= MAX_VALUES:
        return np.arange(size, dtype=np.int64)
    cells = np.arange(MAX_VALUES, dtype=np.int64)
    starts, ends = cells * size // MAX_VALUES, (cells + 1) * size // MAX_VALUES
    return starts + np.floor(hashed_fractions(0, MAX_VALUES) * (ends - starts)).astype(np.int64)


def _take(output: Array, positions: npt.NDArray[np.int64]) -> FloatArray:
    return output.reshape(len(output), -1)[:, positions].astype(np.float32)


def _check_images(images: Array) -> None:
    if images.dtype != np.float32 or images.ndim != 4 or images.size == 0:
        raise SpecError(f"the parity images are {images.shape} {images.dtype}; expected (N, C, H, W) float32, N >= 1.")
