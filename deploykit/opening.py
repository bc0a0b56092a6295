"""Opening the engine of an export job: from the cache, or built for this model alone."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from pathlib import Path

from deploykit.backends.runtime import Runtime
from deploykit.cache import EngineCache
from deploykit.export.job import ExportJob
from deploykit.export.pipeline import export
from deploykit.loading import load_bundle
from deploykit.places import scratch_folder
from deploykit.threads import Hint


def open_built(job: ExportJob, *, device: str, threads: int | None, hint: Hint = "latency") -> Runtime:
    """Open the engine of a job: from the cache, built into it, or built in a folder that goes with the model.

    Raises:
        DeployKitError: as `deploykit.facade.create_backbone`.
    """

    def build(folder: Path) -> None:
        export(job, folder)

    if job.options.cache:
        with EngineCache().opened(job.cache_parts(), build, title=job.title, expected=job.differs_from) as folder:
            return load_bundle(folder, device=device, threads=threads, hint=hint, trust=True)
    with ExitStack() as scratch:
        folder = scratch.enter_context(scratch_folder("engine")) / "bundle"
        build(folder)
        model = load_bundle(folder, device=device, threads=threads, hint=hint, trust=True)
        weakref.finalize(model, scratch.pop_all().close)
    return model
