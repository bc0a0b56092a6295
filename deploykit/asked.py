"""Options given beside a bundle: each must be what the bundle holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploykit.bundle import Manifest, read_manifest
from deploykit.errors import SpecError
from deploykit.spec import BatchRange, SizeRange, parse_batch, parse_image_sizes, parse_precision
from deploykit.target import find_target
from deploykit.unset import UNSET


def check_asked(folder: Path, options: Mapping[str, object], *, refused: Mapping[str, bool]) -> None:
    """Refuse options that a bundle does not have.

    Args:
        folder: the bundle.
        options: those of `create_backbone` that decide an engine; `UNSET` ones ask for nothing.
        refused: options that say nothing to a bundle, which has its weights, names and images inside; whether each
            was given.

    Raises:
        SpecError: naming every option that differs, with both values.
        BundleError: no manifest there, or one that does not decode.
    """
    manifest = read_manifest(folder)
    faults = [
        f"{name}={options[name]!r}, and the bundle has {held!r}"
        for name, held in _held(manifest).items()
        if options.get(name, UNSET) is not UNSET and _normal(name, options[name], held) != held
    ]
    faults += [f"{name} was given, which a bundle has inside" for name, was_given in refused.items() if was_given]
    if faults:
        raise SpecError(
            f"{folder} is a bundle, and what was asked for is not what it holds: {'; '.join(faults)}. "
            "Fix: leave these options out, or export another bundle with them."
        )


def _held(manifest: Manifest) -> dict[str, object]:
    backbone = manifest.backbone
    return {
        "features_only": backbone.features_only,
        "output_indices": tuple(level.index for level in backbone.levels),
        "output_stride": backbone.output_stride,
        "num_classes": backbone.num_classes,
        "in_channels": backbone.in_channels,
        "image_size": manifest.input.sizes or backbone.image_size,
        "patch_size": backbone.patch_size,
        "hierarchical": backbone.hierarchical,
        "runtime": manifest.runtime,
        "precision": manifest.precision,
        "batch_size": manifest.input.batch,
        "embed_preprocessing": manifest.input.embeds_preprocessing,
        "target": manifest.target,
    }


def _sizes(value: object, held: object) -> object:
    """Return an image size, or a range of them in the steps of the bundle's, which are the network's."""
    size = parse_image_sizes(value)
    if isinstance(size, SizeRange) and isinstance(held, SizeRange):
        return replace(size, step=held.step)
    return size


def _target_name(value: object) -> object:
    """Return an edge target's name for its alias or its file; any other value as it is."""
    described = find_target(value) if isinstance(value, str) else None
    return described.name if described is not None else value


def _normal(name: str, value: Any, held: object) -> object:
    """Return the value as the manifest spells it; what stands for "the default" is what the bundle holds."""
    if name == "precision":
        return parse_precision(value).name
    if name == "batch_size":
        batch = parse_batch(value)
        # "dynamic" asks for any range, and a bundle of one is what it says.
        return held if value == "dynamic" and isinstance(held, BatchRange) else batch
    if value is None and name in ("output_indices", "image_size"):
        return held
    if name == "image_size":
        return _sizes(value, held)
    if name == "output_indices":
        return tuple(sorted(value))
    return _target_name(value) if name == "target" and value != held else value
