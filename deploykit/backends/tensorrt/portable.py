"""Portable TensorRT bundles: the device builds its own plan when it first opens one, and keeps it in the cache."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from deploykit.backends.tensorrt import api
from deploykit.backends.tensorrt.build import SETTINGS_FILE, BuildSettings, build_plan, requirements
from deploykit.bundle import read_manifest, write_manifest, writing
from deploykit.cache import EngineCache
from deploykit.errors import BundleError
from deploykit.places import scratch_folder
from deploykit.store import Store, address

if TYPE_CHECKING:
    from deploykit.backends.engine_file import EngineFile
    from deploykit.bundle import Manifest

PLAN_FILE = "model.plan"

logger = logging.getLogger(__name__)


def is_portable(manifest: Manifest) -> bool:
    """Return whether a bundle holds the graph instead of a plan."""
    return manifest.engine.endswith(".onnx")


@contextmanager
def local_plan(manifest: Manifest, graph: EngineFile, identity: dict[str, str]) -> Iterator[tuple[Manifest, Path]]:
    """Give the manifest and the folder of the plan for this GPU, from the cache or built into it.

    Args:
        manifest: of the portable bundle.
        graph: its ONNX file, of which the build reads a private copy.
        identity: the GPU and its driver, from `deploykit.backends.tensorrt.cuda_driver.gpu_identity`.

    Raises:
        BundleError: the settings of the build are missing or not readable.
        ExportError: the build failed, with the end of its log.
    """
    settings = _settings(manifest, graph, identity["compute_capability"])
    version = api.flavour_version(settings.flavour)
    parts: dict[str, object] = {
        "portable": True,
        "files": {name: record.sha256 for name, record in graph.records.items()},
        "settings": settings,
        "identity": identity,
        "version": version,
    }
    store = Store()

    def build(entry: Path) -> None:
        logger.warning(
            "Building the TensorRT plan of %s for %s with %s %s, once; it can take minutes. It is kept in %s.",
            manifest.backbone.name,
            identity["gpu"] or identity["compute_capability"],
            settings.flavour,
            version,
            store.root or "no cache, because there is no folder for one",
        )
        timings = address("tensorrt-timings", {"identity": identity, "version": version}, title=identity["gpu"])
        with writing(entry) as staging, scratch_folder("timings") as scratch:
            timing_cache = None if settings.flavour == api.RTX else scratch / "timing.cache"
            if timing_cache is not None and (known := store.load(timings)) is not None:
                timing_cache.write_bytes(known)
            onnx, plan = Path(os.fspath(graph)), staging / PLAN_FILE
            build_plan(onnx, plan, settings, progress=_log_step, timing_cache=timing_cache)
            if timing_cache is not None and timing_cache.is_file():
                store.save(timings, timing_cache.read_bytes())
            write_manifest(staging, _plan_manifest(manifest, settings, version))

    title = f"{manifest.backbone.name} tensorrt {manifest.precision}, from a portable bundle"
    with EngineCache(store).opened(parts, build, title=title) as entry:
        yield read_manifest(entry), entry


def _settings(manifest: Manifest, graph: EngineFile, capability: str) -> BuildSettings:
    """Return the build's settings in the bundle, with the package and the GPU of this machine."""
    try:
        carried = msgspec.json.decode(graph.read_beside(SETTINGS_FILE), type=BuildSettings)
    except (BundleError, msgspec.MsgspecError) as error:
        raise BundleError(
            f"{SETTINGS_FILE}, which says how to build {manifest.engine}, is not readable ({error}). "
            "Copy the bundle again, or export it again with portable=True."
        ) from error
    flavour = api.default_flavour()
    return dataclasses.replace(carried, flavour=flavour, capability=capability)


def _plan_manifest(manifest: Manifest, settings: BuildSettings, version: str) -> Manifest:
    return dataclasses.replace(
        manifest,
        engine=PLAN_FILE,
        runtime_version=version,
        requires=requirements(settings),
        files={},
        status="built",
    )


def _log_step(phase: str, step: int, steps: int) -> None:
    logger.info("TensorRT: %s, %d of %d", phase, step, steps)
