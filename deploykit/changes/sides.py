"""One of two bundles that are compared, read without its runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.bundle import open_bundle
from deploykit.bundle_files import PLAN_FILES
from deploykit.changes.plans import read_plan
from deploykit.labels import LABELS_FILE, decode_labels
from deploykit.manifest import Manifest
from deploykit.parity.report import PARITY_FILE, ParityReport


@dataclass(frozen=True, kw_only=True)
class Side:
    """A bundle whose files were verified; ``plan``, ``labels`` and ``parity`` are None where it has none."""

    folder: Path
    manifest: Manifest
    plan: Mapping[str, Any] | None
    labels: tuple[str, ...] | None
    parity: ParityReport | None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.manifest.files.values())

    def stored_db(self) -> dict[str, float]:
        """Return each level's distance from torch as it was when exported, in dB."""
        return {} if self.parity is None else {level.name: level.sqnr_db for level in self.parity.levels}


def read_side(folder: Path) -> Side:
    """Verify and read a bundle.

    Raises:
        BundleError: not a bundle, or one that is damaged.
    """
    manifest = open_bundle(folder)
    carried = manifest.files.keys()
    path = folder / LABELS_FILE
    classes = manifest.backbone.num_classes
    return Side(
        folder=folder,
        manifest=manifest,
        plan=read_plan(folder, manifest),
        labels=decode_labels(path.read_bytes(), path, classes) if LABELS_FILE in carried else None,
        parity=ParityReport.load(folder / PARITY_FILE) if PARITY_FILE in carried else None,
    )


def same_plan(old: Side, new: Side) -> bool:
    """Return whether both were rendered from one quantization plan."""
    records = [{name: side.manifest.files.get(name) for name in PLAN_FILES} for side in (old, new)]
    return old.plan is not None and records[0] == records[1]
