"""What two quantization plans do differently, read without onnx."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from deploykit.bundle_files import PLAN_FILE
from deploykit.changes.differences import Difference, listed
from deploykit.errors import BundleError
from deploykit.manifest import Manifest

RANGE_RATIO = 1.05
"""A range that grew or shrank by no more than this is the same."""

Span: TypeAlias = Mapping[str, float]
"""``low`` and ``high`` of a range, or of what was seen of a tensor."""


def read_plan(folder: Path, manifest: Manifest) -> Mapping[str, Any] | None:
    """Return a bundle's quantization plan as it is written; None where it has none.

    Raises:
        BundleError: not a quantization plan.
    """
    if PLAN_FILE not in manifest.files:
        return None
    try:
        plan = msgspec.json.decode((folder / PLAN_FILE).read_bytes(), type=dict[str, Any])
        _ = plan["placement"]["weights"], plan["placement"]["float_nodes"], dict(plan["ranges"])
    except (OSError, msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{folder / PLAN_FILE} is not a quantization plan ({error!r}). Export the bundle again."
        ) from error
    return plan


def plan_differences(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> Iterator[Difference]:
    """Yield what the new plan does differently: calibrator, images, nodes in float and in integers, ranges."""
    if old is None or new is None:
        if old is not new:
            yield Difference(what="quantization plan", old=_size(old), new=_size(new))
        return
    for name in ("calibrator", "images", "reduce_range", "float_dtype"):
        if old.get(name) != new.get(name):
            yield Difference(what=f"plan {name}", old=str(old.get(name)), new=str(new.get(name)))
    for title, key in (("nodes in integers", "weights"), ("nodes in float", "float_nodes")):
        before, after = set(old["placement"][key]), set(new["placement"][key])
        if before != after:
            gone, come = sorted(before - after), sorted(after - before)
            yield Difference(
                what=title,
                old=f"{len(before)}{f', only here {listed(gone)}' if gone else ''}",
                new=f"{len(after)}{f', only here {listed(come)}' if come else ''}",
            )
    yield from _range_differences(old["ranges"], new["ranges"])


def _size(plan: Mapping[str, Any] | None) -> str:
    return "none" if plan is None else f"{len(plan['placement']['weights'])} weights, {len(plan['ranges'])} ranges"


def _range_differences(old: Mapping[str, Span], new: Mapping[str, Span]) -> Iterator[Difference]:
    moved: list[tuple[float, str]] = []
    for name in old.keys() & new.keys():
        before, after = _width(old[name]), _width(new[name])
        ratio = max(before, after) / min(before, after) if min(before, after) > 0 else float(before != after) * 1e9 + 1
        if ratio > RANGE_RATIO:
            moved.append((ratio, name))
    if moved:
        names = [name for _, name in sorted(moved, reverse=True)]
        yield Difference(
            what=f"{len(moved)} of {len(old)} activation ranges",
            old=listed([f"{name} {range_text(old[name])}" for name in names]),
            new=listed([f"{name} {range_text(new[name])}" for name in names]),
        )


def _width(span: Span) -> float:
    return float(span["high"]) - float(span["low"])


def range_text(span: Span) -> str:
    """Return ``"-1.5 to 2"`` for a range or what was seen of a tensor."""
    return f"{float(span['low']):.4g} to {float(span['high']):.4g}"
