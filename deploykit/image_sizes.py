"""Image sizes that an engine takes: one, or a range of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from deploykit.errors import SpecError

Size: TypeAlias = tuple[int, int]
"""``(height, width)`` in pixels."""


@dataclass(frozen=True, kw_only=True)
class SizeRange:
    """Image sizes from ``min`` to ``max`` in steps of ``step`` pixels, tuned for ``opt``.

    Each is ``(height, width)`` in pixels, or one number for both. ``step`` is the network's: the stride of its
    deepest map, so that every level has whole pixels; it is filled in when a backbone takes the range.
    """

    min: int | Size
    opt: int | Size
    max: int | Size
    step: int = 1

    def __post_init__(self) -> None:
        for name in ("min", "opt", "max"):
            object.__setattr__(self, name, parse_image_size(getattr(self, name)))
        if isinstance(self.step, bool) or not isinstance(self.step, int) or self.step < 1:
            raise SpecError(f"step is {self.step!r}; expected a number of pixels, 1 or more.")
        if not all(low <= opt <= high for low, opt, high in self.sides):
            raise SpecError(f"the image size range is {self}; it must satisfy min <= opt <= max, in height and width.")
        wrong = [size for size in zip(*self.sides, strict=True) if any(side % self.step for side in size)]
        if wrong:
            near = dict.fromkeys(size_text(self._near(size)) for size in wrong)
            raise SpecError(
                f"the image size range has {', '.join(map(size_text, wrong))}, and this network takes multiples of "
                f"{self.step} pixels a side. The nearest such sizes: {', '.join(near)}."
            )

    @property
    def sides(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """``(min, opt, max)`` of the height, and of the width."""
        low, opt, high = (parse_image_size(size) for size in (self.min, self.opt, self.max))
        return (low[0], opt[0], high[0]), (low[1], opt[1], high[1])

    @property
    def best(self) -> Size:
        """The size that an engine is tuned for."""
        return parse_image_size(self.opt)

    @property
    def corners(self) -> tuple[Size, ...]:
        """The sizes at which an engine is proved: ``min``, ``opt``, ``max``, and the flattest image that fits."""
        (low, opt, high), (narrow, best, wide) = self.sides
        return tuple(dict.fromkeys([(low, narrow), (opt, best), (high, wide), (low, wide)]))

    def accepts(self, size: Sequence[int | str]) -> bool:
        """Return whether images of ``(height, width)`` are within the range and on its steps."""
        return all(
            isinstance(side, int) and low <= side <= high and side % self.step == 0
            for side, (low, _, high) in zip(size, self.sides, strict=True)
        )

    def nearest(self, size: Sequence[int]) -> Size:
        """Return the size within the range that is nearest to ``(height, width)``."""
        near = self._near((size[0], size[1]))
        height, width = (min(max(side, low), high) for side, (low, _, high) in zip(near, self.sides, strict=True))
        return height, width

    def _near(self, size: Size) -> Size:
        height, width = (max(1, round(side / self.step)) * self.step for side in size)
        return height, width

    def __str__(self) -> str:
        low, opt, high = (size_text(parse_image_size(size)) for size in (self.min, self.opt, self.max))
        return f"{low} to {high}, best {opt}{f', in steps of {self.step}' if self.step > 1 else ''}"


def size_text(size: Size) -> str:
    """Return ``(256, 320)`` as ``256x320``: height, then width."""
    return f"{size[0]}x{size[1]}"


def parse_image_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return an int or ``(height, width)`` in pixels to ``(height, width)``.

    Raises:
        SpecError: not one or two positive ints.
    """
    listed = tuple(image_size) if isinstance(image_size, Iterable) else ()
    size = (image_size, image_size) if isinstance(image_size, int) else listed
    if len(size) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in size):
        raise SpecError(f"image_size is {image_size!r}; give one int, or (height, width), in pixels.")
    return (size[0], size[1])


def parse_image_sizes(image_size: object) -> Size | SizeRange:
    """Return an int or ``(height, width)`` to ``(height, width)``, and ``(min, opt, max)`` to a `SizeRange`.

    Raises:
        SpecError: anything else, or sizes out of order.
    """
    if isinstance(image_size, SizeRange):
        return image_size
    if isinstance(image_size, (tuple, list)) and len(image_size) == 3:
        low, opt, high = image_size
        return SizeRange(min=low, opt=opt, max=high)
    if isinstance(image_size, (int, tuple, list)):
        return parse_image_size(image_size)  # type: ignore[arg-type]  # which checks it
    raise SpecError(f"image_size is {image_size!r}; give one int, (height, width), or (min, opt, max), in pixels.")
