"""What every adapter shares: verified bytes, checks on the way in, copies on the way out, closing, threads, processes.

An adapter is one class in one file with the methods `_open`, `_run`, `_close` and `devices`.
"""

from __future__ import annotations

import os
import platform
import re
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.arrays import FloatArray, ImageArray, Images
from deploykit.backends.backend import Backend
from deploykit.backends.engine_file import EngineFile, read_verified
from deploykit.backends.input_checks import check_images, from_torch
from deploykit.backends.onnx_external import load_external_data
from deploykit.backends.table import backend_of
from deploykit.backends.tuning import Tuning, remembered, tell
from deploykit.errors import (
    BundleError,
    DeployKitError,
    IncompatibleEngine,
    SaturationWarning,
    SpecError,
    TargetWarning,
    nearest,
)
from deploykit.feature_dict import Features
from deploykit.labels import LABELS_FILE, decode_labels
from deploykit.processor import read_processor, this_machine, this_processor
from deploykit.spec import FeatureInfo, InputSpec, Int8, Precision, parse_precision
from deploykit.threads import Hint, allowed_processors, check_threads, checked_hint, count_cores, thread_limit
from deploykit.trust import check_trust
from deploykit.unset import UNSET, UnsetType

if TYPE_CHECKING:
    from deploykit.backends.run_queue import RunQueue
    from deploykit.bundle import Manifest
    from deploykit.images.preprocess import SomeImages
    from deploykit.predict import Prediction

LATENCY_IN_FLIGHT = 2
"""Runs of a stream under the hint ``latency``: the next frame is read while one computes."""

RUNS_AHEAD = 3
"""For throughput: how many runs are started for each that is computed, so that none waits for its frame."""


class Runtime(ABC):
    """A backbone behind one runtime, called like the torch module.

    ``model(images)`` takes ``(N, C, H, W)`` float32, normalised as ``input_spec.preprocessing``
    says; or ``(N, H, W, C)`` uint8 pixels where ``input_spec.embeds_preprocessing``. NumPy in gives
    NumPy out, torch in gives torch out (on the CPU). With ``features_only``
    the result is a dict from level name to ``(N, C, H/stride, W/stride)`` (`Features`); otherwise
    ``(N, num_classes)`` logits, or the ``(N, D)`` embedding. The caller owns every returned
    buffer. Calls are safe from several threads. A forked process cannot use its parent's engine; pickling and
    copying open the same engine once more, by its folder, with its digests checked.

    Args:
        manifest: of the bundle.
        folder: where the engine's files are.
        device: where it runs; ``"auto"`` is the runtime's first device.
        threads: how many threads compute; None: as many as the process may use.
        hint: ``"latency"``: one call at a time uses all threads; ``"throughput"``: several calls at a time, from
            `stream` or from several threads, share them.
        trust: of an engine that is machine code and not this user's own: True opens it, False refuses it; None opens
            it with a warning.
        tuning: how it is opened, where no threads are given; not given: as ``deploykit tune`` measured best for it
            here; None: by the defaults.

    Raises:
        BundleError: an engine file is missing or not the one that the manifest describes, or is refused.
        DeviceUnavailable: the device asked for is not here.
        IncompatibleEngine: the engine was built by a runtime version that this one cannot read.
    """

    simulator: str | None = None
    """What computes in place of the engine's device, which is not here; None: the device itself."""

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        hint: Hint = "latency",
        trust: bool | None = None,
        tuning: Tuning | UnsetType | None = UNSET,
    ) -> None:
        self.hint = checked_hint(hint)
        # A copy has the same digests, so that it is as trusted as this one.
        made_for = manifest.made_for
        device = made_for.device if made_for is not None and device == "auto" else device
        self._options: dict[str, Any] = {"device": device, "threads": threads, "hint": hint, "trust": True}
        self._folder = folder.absolute()
        self._process = os.getpid()
        self.backend: Backend = backend_of(manifest)
        self.backend.check_system()
        self.backend.require()
        self._choose_threads(manifest, device, check_threads(threads), tuning)
        self.runtime = manifest.runtime
        self.manifest = manifest
        self.input_spec: InputSpec = manifest.input
        self.feature_info = FeatureInfo(manifest.backbone.levels)
        self.precision: Precision = parse_precision(manifest.precision, manifest.precision_settings)
        self._output_names = tuple(output.name for output in manifest.outputs)
        self._features_only = manifest.backbone.features_only
        self._sample_shape = self.input_spec.shape[1:]
        self._closed = False
        self.labels = self._read_labels()
        self._check_version()
        self.open_options = self._checked_options()
        self._engine_file = EngineFile(manifest, folder)
        try:
            if manifest.files and self.backend.is_code(manifest.engine):
                check_trust(folder, manifest.engine, self._engine_file.records, trust)
            if self._engine_file.name.endswith(".onnx"):
                load_external_data(self._engine_file, compiled=self.backend.is_code(manifest.engine))
            self.device = self._open(self._engine_file, device)
        except BaseException:
            self._engine_file.close()
            raise
        self._engine_file.release()
        if self.tuned is not None:
            self.in_flight = self.tuned.in_flight
            tell(manifest, self.tuned)
        _OPEN.add(self)
        self._warn_of_saturation()
        self._warn_of_another_machine()

    @abstractmethod
    def _open(self, engine: EngineFile, device: str) -> str:
        """Load the engine, to compute in ``self.threads`` (None: the runtime's own choice); return its device."""

    @abstractmethod
    def _run(self, images: ImageArray) -> list[FloatArray]:
        """Run once, from any thread; new arrays in the order of the manifest's outputs."""

    @abstractmethod
    def _close(self) -> None:
        """Give the engine's memory back."""

    @classmethod
    @abstractmethod
    def devices(cls) -> tuple[str, ...]:
        """Return the devices of this machine that the runtime can use; needs the package."""

    def __call__(self, images: Images) -> Any:
        """Run the engine; see the class for shapes.

        Raises:
            SpecError: wrong type, rank, layout, size, dtype or batch, NaN or infinity in the
                images, or the model is closed.
            DeployKitError: the runtime itself failed; its error is chained.
        """
        array, to_caller = self._taken(images)
        return self._answer(partial(self._run, array), to_caller)

    def stream(self, frames: Iterable[Images], in_flight: int | None = None) -> Iterator[Any]:
        """Run frame after frame, several at a time, and yield what a call would give for each, in their order.

        After a frame that is refused no more are taken; the answers for those before it come first, then the error.
        A frame is what a call takes, and is copied, so that its buffer may be used again. No frame is taken from
        ``frames`` before there is room for it: at most ``in_flight`` are taken and not yet answered.

        Args:
            frames: batches of images, also from a generator that never ends.
            in_flight: how many runs are started and not yet answered; None: as many as the runtime and the hint make
                use of.

        Raises:
            SpecError: as a call, for the frame at fault, or for ``in_flight``.
            DeployKitError: as a call.
        """
        from deploykit.backends.stream import streamed

        return streamed(self, frames, in_flight)

    def map(self, images: Iterable[ImageArray], in_flight: int | None = None) -> Iterator[Any]:
        """Run single images, ``(C, H, W)`` each, in batches that the engine takes; yield what each gives, in order.

        Args:
            images: an array ``(N, C, H, W)``, or any iterable of images.
            in_flight: as for `stream`.

        Raises:
            SpecError, DeployKitError: as `stream`.
        """
        from deploykit.backends.stream import mapped

        return mapped(self, images, in_flight)

    def open_queue(self, in_flight: int) -> RunQueue:
        """Return the queue of a stream; see `stream`."""
        if self._closed or os.getpid() != self._process:
            raise self._unusable()
        return self._queue(in_flight)

    def start(self, queue: RunQueue, images: Images) -> Callable[[], Any]:
        """Start a run on a copy of some images; what is returned waits for it and gives what a call would."""
        array, to_caller = self._taken(images)
        return partial(self._answer, queue.start(array), to_caller)

    def _queue(self, in_flight: int) -> RunQueue:
        """Return what starts runs without waiting for them; threads, where the runtime has nothing of its own."""
        from deploykit.backends.run_queue import ThreadQueue

        return ThreadQueue(self._run, min(in_flight, self.parallel))

    def _choose_threads(
        self, manifest: Manifest, device: str, threads: int | None, tuning: Tuning | UnsetType | None
    ) -> None:
        """Set threads, streams and runs in flight: those asked for, else as tuned, else the defaults."""
        if tuning is UNSET:
            tuning = remembered(manifest, self.backend, device, self.hint) if threads is None else None
        self.tuned = tuning
        self.threads = threads or (tuning.threads if tuning is not None else None) or thread_limit()
        self.streams = tuning.streams if tuning is not None else None
        self.parallel = (self.streams or self._cores()) if self.hint == "throughput" else 1
        self.in_flight = RUNS_AHEAD * self.parallel if self.hint == "throughput" else LATENCY_IN_FLIGHT
        self._options["tuning"] = tuning

    def _cores(self) -> int:
        """Return how many runs of one thread each the process has processors for."""
        return self.threads or count_cores(allowed_processors())

    def _taken(self, images: Images) -> tuple[ImageArray, Callable[[FloatArray], object] | None]:
        """Check a call's images; return them as an array, and what brings outputs into the caller's form."""
        if self._closed or os.getpid() != self._process:
            raise self._unusable()
        array, to_caller = (images, None) if isinstance(images, np.ndarray) else from_torch(images, self.input_spec)
        return check_images(array, self.input_spec), to_caller

    def _answer(self, run: Callable[[], list[FloatArray]], to_caller: Callable[[FloatArray], object] | None) -> Any:
        """Run, or wait for a run, and return its outputs in the caller's form."""
        try:
            outputs: list[Any] = run()
        except (DeployKitError, MemoryError):
            raise
        except Exception as error:
            # Runtimes raise classes of their own, which share no base.
            if self._closed:
                raise self._unusable() from error
            raise DeployKitError(
                f"{self.backend.package.module} failed to run the engine on {self.device}: {error}. "
                "Export the bundle again; deploykit verify says whether the engine ever ran."
            ) from error
        if to_caller is not None:
            outputs = [to_caller(output) for output in outputs]
        if self._features_only:
            return Features(zip(self._output_names, outputs, strict=True), self.feature_info.by_index())
        return outputs[0]

    def predict(self, image: SomeImages, top: int = 5) -> list[Prediction] | list[list[Prediction]]:
        """Name the most probable classes of one image, or of each in a list; see `deploykit.predict.predict`."""
        from deploykit.predict import predict

        return predict(self, self.manifest.backbone, image, top)

    def seen_on(self) -> dict[str, str]:
        """Return the machine, the device and the versions that run this engine, for a bundle's manifest.

        In a simulator of its device there is no ``device``, and ``simulator`` in its place.
        """
        where = {"device": self.device} if self.simulator is None else {"simulator": self.simulator}
        return machine() | where | {self.backend.package.module: self.backend.installed_version() or "unknown"}

    def read_file(self, name: str) -> bytes:
        """Read another file of the engine's bundle: the one that its manifest describes.

        Raises:
            BundleError: it is missing, or the bundle was replaced since it was opened.
        """
        return read_verified(self.manifest, self._folder, name)

    def close(self) -> None:
        """Give the engine's memory back; calling twice is harmless, and in a forked process nothing is given back."""
        if not self._closed:
            self._closed = True
            if os.getpid() == self._process:
                self._close()
                self._engine_file.close()

    def __reduce__(self) -> tuple[object, ...]:
        """Open the same engine where the copy is made: another process, or another place in this one.

        Raises:
            SpecError: the model is closed.
        """
        if self._closed:
            raise self._unusable()
        manifest = replace(self.manifest, files=self.manifest.files or self._engine_file.records)
        return _reopen, (manifest, self._folder, self._options)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<{self.manifest.backbone.name} in {self.runtime} {self.manifest.precision} on {self.device}, "
            f"images {self.input_spec.shape}{f'; {self.tuned}' if self.tuned is not None else ''}>"
        )

    def _read_labels(self) -> tuple[str, ...] | None:
        """The class names in the bundle, which are those that its manifest describes; None where it has none."""
        classes = 0 if self._features_only else self.manifest.backbone.num_classes
        path = self._folder / LABELS_FILE
        carried = LABELS_FILE in self.manifest.files if self.manifest.files else path.exists()
        return decode_labels(self.read_file(LABELS_FILE), path, classes) if classes and carried else None

    def _unusable(self) -> SpecError:
        """Return the error of a model that is closed, or that another process opened."""
        if os.getpid() != self._process:
            return SpecError(
                f"this {self.runtime} model was opened in process {self._process} and called in its forked child "
                f"{os.getpid()}, where the runtime's threads are missing and a call would hang. Fix: open the bundle "
                f"in the child, load_bundle({str(self._folder)!r}), or start the workers with the method 'spawn'."
            )
        return SpecError(f"this {self.runtime} model is closed. Open the bundle again with load_bundle().")

    def _warn_of_saturation(self) -> None:
        """Say so where this processor may not give the numbers that the engine was compared with."""
        exact = not isinstance(self.precision, Int8) or self.precision.reduce_range
        if exact or not self.device.startswith("cpu") or not this_processor().saturates:
            return
        warnings.warn(
            f"this int8 engine has weights whose products can saturate on this processor "
            f"({this_processor().model}, without VNNI), so its outputs may differ from those it was compared with. "
            "Run deploykit verify here, or export it again for this processor: target='x86-avx2'.",
            SaturationWarning,
            stacklevel=4,
        )

    def _warn_of_another_machine(self) -> None:
        """Say so where this machine is not of the kind that the engine was made for."""
        target = self.manifest.made_for
        if target is None or self.simulator is not None:
            return
        here = this_processor()
        missing = [name for name in target.instructions if name not in here.int8]
        if target.machine not in (None, this_machine()):
            reason = f"which is {target.machine}, and this machine is {this_machine()}"
        elif missing:
            reason = f"which has {', '.join(missing)}, and this processor ({here.model}) has not"
        else:
            return
        warnings.warn(
            f"this engine was made for {target.title}, {reason}. It runs, at another speed and perhaps with other "
            "numbers. Run deploykit verify on its target, or export it for this machine.",
            TargetWarning,
            stacklevel=4,
        )

    def _checked_options(self) -> dict[str, str]:
        """The runtime's own settings that the bundle asks for, which are of the few that a target may give."""
        options = self.manifest.made_for.options if self.manifest.made_for is not None else {}
        for name in options:
            if name not in self.backend.open_options:
                raise BundleError(
                    f"the manifest sets {name!r} of {self.runtime}, which no target may. "
                    f"{nearest(name, self.backend.open_options)} Export the bundle again."
                )
        return options

    def _check_version(self) -> None:
        built, here = self.manifest.runtime_version, self.backend.installed_version() or "unknown"
        exact = self.backend.version_rule == "exact"
        usable = built == here if exact else version_key(here) >= version_key(built)
        if not usable and not exact:
            needed = self.backend.oldest_version(self.read_file(self.manifest.engine), self.manifest.engine)
            usable = needed is not None and version_key(here) >= version_key(needed)
            built = needed or built
        if not usable:
            relation = "exactly" if exact else "at least"
            package, wrote = self.backend.package.build, self.manifest.runtime_version
            raise IncompatibleEngine(
                f"this engine was built with {package} {wrote} and {here} is installed here; it needs {relation} "
                f"{built}. Install '{package}{'==' if exact else '>='}{built.partition('+')[0]}', or export the bundle "
                "again here."
            )


def _reopen(manifest: Manifest, folder: Path, options: dict[str, Any]) -> Runtime:
    """Open a pickled engine: the folder must still hold the files that the manifest describes."""
    return backend_of(manifest).load_adapter()(manifest, folder, **options)


def _abandon_engines() -> None:
    """Let a forked child end: the runtimes' threads stayed in the parent, so that destroying an engine waits for ever.

    One more reference, which nothing gives back, keeps each engine from being destroyed, also when the child ends.
    """
    if _OPEN:
        import ctypes

        for engine in _OPEN:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))


_OPEN: weakref.WeakSet[Runtime] = weakref.WeakSet()
"""The engines of this process that were opened."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_engines)


def machine() -> dict[str, str]:
    """Return the operating system and the processor of this machine."""
    return {"system": f"{platform.system()} {platform.machine()}", "processor": read_processor().model}


def run_in_batches(model: Runtime, images: ImageArray) -> dict[str, FloatArray]:
    """Run a model over any number of images in batches that it takes; every output by name.

    A last partial batch is filled up by repeating its images, and the surplus is cut off.
    """
    batch = model.input_spec.batch
    size = batch if isinstance(batch, int) else min(batch.max, max(batch.min, 4))
    parts: list[dict[str, FloatArray]] = []
    for start in range(0, len(images), size):
        piece = images[start : start + size]
        filled = piece[np.arange(size) % len(piece)]
        outputs = model(filled)
        named = outputs if isinstance(outputs, dict) else {model.manifest.outputs[0].name: outputs}
        parts.append({name: output[: len(piece)] for name, output in named.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def version_key(version: str) -> tuple[int, ...]:
    """Turn ``"2026.4.1+cpu"`` into ``(2026, 4, 1)``, for ordering; a part that is no number ends it."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
