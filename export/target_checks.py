"""Whether an engine fits the target that it is for."""

from __future__ import annotations

from pathlib import Path

from deploykit.backends.backend import Engine
from deploykit.backends.runtime import version_key
from deploykit.errors import ExportError
from deploykit.export.job import ExportJob
from deploykit.target import Target

MEGABYTE = 1_000_000


def check_fits(job: ExportJob, engine: Engine, folder: Path) -> None:
    """Refuse an engine that its target has not the memory or the runtime's version for.

    Raises:
        ExportError: either.
    """
    target = job.options.made_for
    if target is None:
        return
    _check_memory(folder, target)
    newest = target.choice(job.options.runtime).version
    if newest is None:
        return
    needed = job.backend.oldest_version((folder / engine.file).read_bytes(), engine.file) or engine.runtime_version
    # "1.23" stands for every 1.23.x, and a portable engine needs no version: it says "any".
    if version_key(needed)[: len(version_key(newest))] > version_key(newest):
        raise ExportError(
            f"the engine needs {job.backend.package.distribution} {needed}, and {target.name} has at most {newest}. "
            "Choose another runtime of it, or another precision or recipe."
        )


def _check_memory(folder: Path, target: Target) -> None:
    """Refuse an engine whose files alone are over the target's memory budget; it needs more when it runs.

    Raises:
        ExportError: it is over the budget.
    """
    if target.memory_mb is None:
        return
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / MEGABYTE
    if size > target.memory_mb:
        raise ExportError(
            f"the engine's files take {size:.1f} MB, and the memory budget of {target.name} is {target.memory_mb} MB. "
            "Choose a smaller backbone or precision, or a target file of your own with another memory_mb."
        )
