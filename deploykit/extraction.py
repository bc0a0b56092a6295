"""Features of any number of images into Parquet: in shards that a stopped run keeps, with memory for one shard."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np

from deploykit.arrays import FloatArray
from deploykit.backends.runtime import Runtime, run_in_batches
from deploykit.cluster import cluster, run_pieces
from deploykit.dataset import Dataset, DatasetSource, open_dataset, read_images
from deploykit.errors import ImageError, SpecError, StorageError
from deploykit.loading import load_bundle
from deploykit.locks import locked_folder
from deploykit.optional import require
from deploykit.output_places import check_outside_bundles
from deploykit.places import storage_error
from deploykit.progress import ImagesRun, Progress, quiet

SHARD = 2048
"""Rows of a shard, which are lost where a run is killed while it makes one."""
MOST_SHARD = 1 << 20
CHUNK = 32
"""Images in memory at a time."""
SHARDS_SUFFIX = ".shards"
JOB_FILE = "job.json"
LOCK_SECONDS = 5.0

ShardMaker: TypeAlias = Callable[[Path, list[int]], Iterator[int]]
"""Makes the shards of these numbers in a folder, and yields how many images are done each time."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What was written: the file, its rows, those of them without features, and how many rows were there before."""

    output: str
    rows: int
    skipped: int
    resumed: int
    images_per_s: float


def extract(
    source: DatasetSource,
    bundle: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    pool: bool = True,
    shard: int = SHARD,
    skip_corrupt: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    threads: int | None = None,
    trust: bool | None = None,
    ray: bool = False,
    workers: int | None = None,
    progress: Progress = quiet,
) -> Extraction:
    """Run a bundle on every image of a source and write one row an image, in the source's order.

    Rows hold ``image`` (its path, or its position in an array), ``label`` where there are labels, ``error`` (null, or
    why the image could not be read), and a column of float32 lists for each output. Shards lie beside the output until
    all are there; a run that was stopped goes on after them, and gives the rows that an unbroken one gives.

    Args:
        source: as for `deploykit.dataset.open_dataset`.
        bundle: the engine's bundle.
        output: the ``.parquet`` file to write.
        pool: average feature maps over their positions; False: keep every value, channel by channel.
        shard: rows of a shard, which bounds the memory.
        skip_corrupt: write a row with ``error`` for an image that cannot be read, instead of raising.
        overwrite: replace the output.
        device: where the engine runs.
        threads: how many threads it computes in.
        trust: as for `deploykit.load_bundle`.
        ray: make the shards in processes of a Ray cluster (``RAY_ADDRESS``, else of this machine), which reach the
            images, the bundle and the output's folder under the same paths. The rows are those of one process.
        workers: how many of them; None: one for each processor of the cluster.
        progress: hears of the images that are done.

    Raises:
        SpecError: a source without images, an output that is there already, or another job's shards beside it.
        ImageError: images that cannot be read.
        MissingDependency: pyarrow is not installed.
        StorageError: the output cannot be written.
        BundleError, IncompatibleEngine, DeviceUnavailable: the bundle cannot be opened here.
    """
    target = Path(output)
    _check_output(target, overwrite=overwrite)
    if isinstance(shard, bool) or not isinstance(shard, int) or not 1 <= shard <= MOST_SHARD:
        raise SpecError(f"shard is {shard!r}; expected rows, 1 to {MOST_SHARD}.")
    if workers is not None and not ray:
        raise SpecError(f"workers is {workers!r}, and ray is off. Leave it out, or add ray=True.")
    require("pyarrow.parquet")
    dataset = open_dataset(source)
    opening = {"folder": Path(bundle).absolute(), "device": device, "threads": threads, "trust": trust}
    folder = target.with_name(f".{target.name}{SHARDS_SUFFIX}")
    try:
        with load_bundle(bundle, device=device, threads=threads, trust=trust) as model:
            job = _Job(model=model, dataset=dataset, pool=pool, shard=shard, skip_corrupt=skip_corrupt)
            make = partial(job.make_on_cluster, opening=opening, workers=workers) if ray else job.make_here
            folder.mkdir(exist_ok=True)
            with locked_folder(folder, f"to write {target.name}", seconds=LOCK_SECONDS):
                return job.run(folder, target, make, progress)
    except OSError as error:
        raise storage_error(f"{target} cannot be written", error) from error


@dataclass(frozen=True, kw_only=True)
class _Job:
    model: Runtime
    dataset: Dataset
    pool: bool
    shard: int
    skip_corrupt: bool

    def run(self, folder: Path, target: Path, make: ShardMaker, progress: Progress) -> Extraction:
        """Make the shards that are not there, and put them together."""
        self._claim(folder)
        total, start, done = len(self.dataset), perf_counter(), 0
        shards = list(enumerate(self.dataset.chunks(self.shard)))
        missing = [number for number, _ in shards if not shard_path(folder, number).exists()]
        resumed = total - sum(len(positions) for number, positions in shards if number in set(missing))
        for count in make(folder, missing):
            done += count
            progress(ImagesRun(done=resumed + done, total=total, seconds=perf_counter() - start))
        skipped = _join(sorted(folder.glob("*.parquet")), target, skip_corrupt=self.skip_corrupt)
        shutil.rmtree(folder, ignore_errors=True)
        rate = done / (perf_counter() - start) if done else 0.0
        return Extraction(output=str(target), rows=total, skipped=skipped, resumed=resumed, images_per_s=round(rate, 1))

    def make_here(self, folder: Path, numbers: list[int]) -> Iterator[int]:
        """Make shards one after the other; yields how many images each piece of one had."""
        for number in numbers:
            start = number * self.shard
            positions = range(start, min(start + self.shard, len(self.dataset)))
            yield from self._write_shard(shard_path(folder, number), positions)

    def make_on_cluster(
        self, folder: Path, numbers: list[int], *, opening: Mapping[str, Any], workers: int | None
    ) -> Iterator[int]:
        """Make shards in processes of a Ray cluster; yields how many images each had."""
        settings = {"pool": self.pool, "shard": self.shard, "skip_corrupt": self.skip_corrupt}
        own = {"here": Path.cwd(), "folder": folder.absolute()}
        arguments = {**own, "dataset": self.dataset, "opening": opening, "settings": settings}
        with cluster() as ray:
            for count in run_pieces(ray, ShardWorker, arguments, numbers, workers):
                yield int(count)

    def _claim(self, folder: Path) -> None:
        """Take the folder of shards, which is new or what the same job left.

        Raises:
            SpecError: another job left one.
        """
        told = self._describe()
        try:
            found = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None  # new, or killed before it was written, so that no shard is there either
        if found is not None and found != told:
            different = sorted(key for key in told if found.get(key) != told[key]) if isinstance(found, dict) else []
            raise SpecError(
                f"{folder} holds shards of another job, which differs in {', '.join(different) or 'its form'}. "
                "Fix: remove that folder, or write to another file."
            )
        _put(folder / JOB_FILE, json.dumps(told, indent=1).encode())
        for part in folder.glob("*.part"):
            part.unlink(missing_ok=True)

    def _describe(self) -> dict[str, object]:
        """Return all that decides the rows, as JSON takes it."""
        manifest = self.model.manifest
        digest = hashlib.sha256()
        for position in range(len(self.dataset)):
            digest.update(f"{self.dataset.name_of(position)}\0".encode())
            if self.dataset.arrays is None:
                status = self.dataset.files[position].stat()
                digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
            else:
                digest.update(np.ascontiguousarray(self.dataset.arrays[position]).tobytes())
        labels = "" if self.dataset.labels is None else repr(self.dataset.labels)
        engine = {name: record.sha256 for name, record in manifest.files.items()}
        return {
            "images": digest.hexdigest(),
            "labels": hashlib.sha256(labels.encode()).hexdigest(),
            "engine": hashlib.sha256(json.dumps(engine, sort_keys=True).encode()).hexdigest(),
            "rows": len(self.dataset),
            "shard": self.shard,
            "pool": self.pool,
        }

    def _write_shard(self, path: Path, positions: range) -> Iterator[int]:
        """Write a shard under its name once it is whole; yields how many images each piece of it had."""
        parquet = require("pyarrow.parquet")
        part = path.with_suffix(".part")
        writer = None
        try:
            for start in range(positions.start, positions.stop, CHUNK):
                piece = range(start, min(start + CHUNK, positions.stop))
                table = self._table(piece)
                writer = writer or parquet.ParquetWriter(part, table.schema)
                writer.write_table(table)
                yield len(piece)
        finally:
            if writer is not None:
                writer.close()
        _sync(part)
        part.rename(path)

    def _table(self, positions: range) -> Any:
        """Run some images and return their rows."""
        arrow = require("pyarrow")
        spec = self.model.input_spec
        read, images, problems = read_images(self.dataset, positions, spec, skip_corrupt=self.skip_corrupt)
        outputs = {} if images is None else run_in_batches(self.model, images)
        errors = dict(zip(sorted(set(positions) - set(read)), problems, strict=True))
        names = [self.dataset.name_of(each) for each in positions]
        columns: dict[str, object] = {"image": arrow.array(names, arrow.string())}
        if self.dataset.labels is not None:
            columns["label"] = arrow.array([str(self.dataset.labels[each]) for each in positions], arrow.string())
        columns["error"] = arrow.array([errors.get(each) for each in positions], arrow.string())
        places = {position: row for row, position in enumerate(read)}
        for output in self.model.manifest.outputs:
            rows = self._rows(outputs, output.name)
            values = [rows[places[each]] if each in places else None for each in positions]
            columns[output.name] = arrow.array(values, arrow.list_(arrow.float32()))
        return arrow.table(columns)

    def _rows(self, outputs: Mapping[str, FloatArray], name: str) -> FloatArray:
        """Return an output as ``(N, values)``."""
        if name not in outputs:
            return np.empty((0, 0), np.float32)
        found = outputs[name]
        if self.pool and found.ndim == 4:
            found = found.mean(axis=(2, 3))
        return np.asarray(found.reshape(len(found), -1), np.float32)


class ShardWorker:
    """Makes shards in a process of its own, with an engine of its own."""

    def __init__(
        self, here: Path, folder: Path, dataset: Dataset, opening: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> None:
        os.chdir(here)  # the files may have paths relative to it, which the rows repeat
        self._folder = folder
        self._job = _Job(model=load_bundle(**opening), dataset=dataset, **settings)

    def __call__(self, number: int) -> bytes:
        """Make one shard; returns how many images it has, in decimal."""
        return str(sum(self._job.make_here(self._folder, [number]))).encode()


def shard_path(folder: Path, number: int) -> Path:
    """Return where a shard lies."""
    return folder / f"{number:08}.parquet"


def _join(shards: list[Path], target: Path, *, skip_corrupt: bool) -> int:
    """Put shards together, one at a time; returns how many rows have an error.

    Raises:
        ImageError: some have, and ``skip_corrupt`` is off: a run that skipped them left their shard.
        StorageError: a shard cannot be read.
    """
    parquet = require("pyarrow.parquet")
    part = target.with_name(f".{target.name}.part")
    skipped = 0
    writer = None
    try:
        for shard in shards:
            try:
                file = parquet.ParquetFile(shard)
            except (OSError, ValueError) as error:
                raise StorageError(f"{shard} cannot be read ({error}). Fix: remove it and run again.") from error
            with file:
                writer = writer or parquet.ParquetWriter(part, file.schema_arrow)
                table = file.read()
                skipped += len(table) - table.column("error").null_count
                writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
    if skipped and not skip_corrupt:
        part.unlink()
        raise ImageError(f"{skipped} images could not be read. To go on past such files, pass skip_corrupt=True.")
    _sync(part)
    part.replace(target)
    return skipped


def _check_output(target: Path, *, overwrite: bool) -> None:
    if target.suffix.lower() != ".parquet":
        raise SpecError(f"the output is {target}; expected a name that ends in .parquet.")
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise SpecError(f"{target}: is a folder, or lies in none that exists. Give a file in a folder that exists.")
    if target.exists() and not overwrite:
        raise SpecError(f"{target} exists already. Choose another name, or allow it with overwrite=True.")
    check_outside_bundles(target)


def _put(path: Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(content)
    _sync(part)
    part.replace(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
