"""Where two bundles say different things of themselves: the contract, and how each was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from deploykit.manifest import Manifest

SHOWN = 4
"""How many names of a list of changes are written out."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that two bundles say differently; ``contract`` is the part an application relies on, else None."""

    what: str
    old: str
    new: str
    contract: str | None = None


def contract_differences(
    old: Manifest, new: Manifest, labels: tuple[tuple[str, ...] | None, tuple[str, ...] | None]
) -> Iterator[Difference]:
    """Yield what an application would notice: outputs, input, preprocessing, class names, levels, weights."""
    yield from _mapped("output", "outputs", _outputs(old), _outputs(new))
    yield from _mapped("input", "input", _input(old), _input(new))
    yield from _mapped("preprocessing", "preprocessing", _preprocessing(old), _preprocessing(new))
    yield from _mapped("level", "levels", _levels(old), _levels(new))
    if old.weights_digest != new.weights_digest:
        digests = old.weights_digest[:12], new.weights_digest[:12]
        yield Difference(what="weights", old=digests[0], new=digests[1], contract="weights")
    if labels[0] != labels[1]:
        before, after = _label_text(*labels), _label_text(*reversed(labels))
        yield Difference(what="labels", old=before, new=after, contract="labels")


def making_differences(old: Manifest, new: Manifest) -> Iterator[Difference]:
    """Yield how the two were made otherwise: runtime, precision, calibration, target, passes, tools."""
    rows: Mapping[str, tuple[str, str]] = {
        "backbone": (old.backbone.name, new.backbone.name),
        "runtime": (f"{old.runtime} {old.runtime_version}", f"{new.runtime} {new.runtime_version}"),
        "precision": (old.precision, new.precision),
        "calibration images": ((old.calibration_digest or "none")[:12], (new.calibration_digest or "none")[:12]),
        "target": (old.target or "the runtime's own", new.target or "the runtime's own"),
        "status": (old.status, new.status),
    }
    yield from (Difference(what=name, old=a, new=b) for name, (a, b) in rows.items() if a != b)
    if old.precision == new.precision:
        yield from _mapped("setting", None, _texts(old.precision_settings), _texts(new.precision_settings))
    yield from _mapped("tied to", None, _texts(old.requires), _texts(new.requires))
    yield from _mapped("fusion", None, _done(old.fusions), _done(new.fusions))
    yield from _mapped("tool", None, _texts(old.tools), _texts(new.tools))
    yield from _mapped("seen on", None, _place(old), _place(new))


def listed(names: list[str]) -> str:
    """Return ``"a, b, c, d and 3 more"``."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _mapped(what: str, contract: str | None, old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[Difference]:
    for name in dict.fromkeys((*old, *new)):
        before, after = old.get(name, "none"), new.get(name, "none")
        if before != after:
            yield Difference(what=f"{what} {name}", old=before, new=after, contract=contract)
    shared = [name for name in new if name in old]
    if contract == "outputs" and shared != [name for name in old if name in new]:
        yield Difference(what="order of the outputs", old=", ".join(old), new=", ".join(new), contract=contract)


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def _done(fusions: Mapping[str, int]) -> dict[str, str]:
    """Return the passes that found something."""
    return {name: str(count) for name, count in fusions.items() if count}


def _place(manifest: Manifest) -> dict[str, str]:
    """Return where an engine ran, without the versions, which have rows of their own."""
    return {name: text for name, text in manifest.seen_on.items() if name in ("system", "processor", "device")}


def _outputs(manifest: Manifest) -> dict[str, str]:
    return {each.name: f"{' x '.join(map(str, each.shape))} {each.dtype}" for each in manifest.outputs}


def _input(manifest: Manifest) -> dict[str, str]:
    raw = msgspec.to_builtins(manifest.input)
    return {name: str(value) for name, value in raw.items() if name != "preprocessing"}


def _preprocessing(manifest: Manifest) -> dict[str, str]:
    return _texts(msgspec.to_builtins(manifest.input.preprocessing))


def _levels(manifest: Manifest) -> dict[str, str]:
    return {
        level.name: f"index {level.index}, {level.channels} channels, stride {level.stride}"
        for level in manifest.backbone.levels
    }


def _label_text(labels: tuple[str, ...] | None, other: tuple[str, ...] | None) -> str:
    if labels is None:
        return "none"
    if other is None or len(labels) != len(other):
        return f"{len(labels)} names"
    changed = [f"{index} {name}" for index, (name, its) in enumerate(zip(labels, other, strict=True)) if name != its]
    return listed(changed)
