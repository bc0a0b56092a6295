"""What models answer on the same images: the classes that they name, or features to compare neighbours by."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from deploykit.arrays import FloatArray, ImageArray
from deploykit.backends.runtime import Runtime, run_in_batches
from deploykit.dataset import Dataset, read_images
from deploykit.errors import DeployKitError, DeployKitWarning, ImageError, SpecError
from deploykit.progress import ImagesRun, Progress
from deploykit.spec import BackboneSpec, InputSpec

CHUNK_BYTES = 32 << 20
MOST_IN_CHUNK = 64
"""Images are decoded this many at a time, and fewer where they are large: the memory is bounded."""
BATCH = 16
"""How many images a torch module takes at once."""

IndexArray = npt.NDArray[np.int64]


@dataclass(kw_only=True)
class Subject:
    """A model that answers: ``run`` takes a batch of NumPy images and returns its outputs by name."""

    name: str
    runtime: str
    precision: str
    device: str
    input: InputSpec
    backbone: BackboneSpec
    labels: tuple[str, ...] | None
    run: Callable[[ImageArray], dict[str, FloatArray]]

    @property
    def classes(self) -> int:
        """How many classes it names; 0 where it gives features."""
        return 0 if self.backbone.features_only else self.backbone.num_classes


@dataclass(kw_only=True)
class Answers:
    """What one model answered: ``ranked``, ``(N, top)`` classes, the best first, or ``features``, ``(N, D)``."""

    ranked: list[IndexArray] = field(default_factory=list)
    features: list[FloatArray] = field(default_factory=list)
    seconds: float = 0.0

    def classes(self) -> IndexArray:
        """Return the ranked classes, ``(N, top)``."""
        return np.concatenate(self.ranked)

    def vectors(self) -> FloatArray:
        """Return the features, ``(N, D)``."""
        return np.concatenate(self.features)


def subject_of(model: Any, name: str | None = None) -> Subject:
    """Return an engine or a backbone in torch as something that answers; ``name`` is what tables call it.

    Raises:
        SpecError: it is neither.
    """
    if isinstance(model, Runtime):
        manifest = model.manifest
        return Subject(
            name=name or f"{manifest.backbone.name} in {model.runtime} {model.precision.name}",
            runtime=model.runtime,
            precision=model.precision.name,
            device=model.device,
            input=model.input_spec,
            backbone=manifest.backbone,
            labels=model.labels,
            run=lambda images: run_in_batches(model, images),
        )
    if not all(hasattr(model, each) for each in ("input_spec", "spec", "precision", "runtime")):
        raise SpecError(
            f"the model is a {type(model).__name__}; expected a bundle's folder, an engine, or what create_backbone "
            "returns. Fix: a module of your own becomes one with create_backbone(module)."
        )
    return Subject(
        name=name or f"{model.spec.name} in {model.runtime} {model.precision.name}",
        runtime=model.runtime,
        precision=model.precision.name,
        device=str(model.device),
        input=model.input_spec,
        backbone=model.spec,
        labels=model.labels,
        run=lambda images: _run_module(model, images),
    )


def collect_answers(
    subjects: Sequence[Subject],
    dataset: Dataset,
    *,
    top: int,
    keep_features: bool,
    skip_corrupt: bool,
    progress: Progress,
) -> tuple[list[Answers], list[int]]:
    """Run every model on every image; those with one input share what is decoded.

    Args:
        subjects: the models, which take turns.
        dataset: the images.
        top: how many classes of each image to keep.
        keep_features: keep what a classifier's neighbours are found by, its logits.
        skip_corrupt: go on past images that cannot be read, with a warning.
        progress: hears of the images that are done.

    Returns:
        The answers of each model, and the positions of the images that were read.
    """
    answers = [Answers() for _ in subjects]
    positions: list[int] = []
    start = perf_counter()
    for chunk in dataset.chunks(_chunk_size(subjects)):
        decoded: dict[tuple[object, ...], ImageArray] = {}
        read: list[int] = []
        for subject, own in zip(subjects, answers, strict=True):
            key = (subject.input.shape_at(1)[1:], subject.input.dtype, subject.input.preprocessing)
            if key not in decoded:
                read, images, problems = read_images(dataset, chunk, subject.input, skip_corrupt=skip_corrupt)
                for problem in problems if not decoded else ():
                    warnings.warn(f"left out: {problem}", DeployKitWarning, stacklevel=2)
                if images is None:
                    break
                decoded[key] = images
            _answer(subject, own, decoded[key], top=top, keep_features=keep_features)
        positions += read
        done = chunk.stop
        progress(ImagesRun(done=done, total=len(dataset), seconds=perf_counter() - start))
    if not positions:
        raise ImageError(f"none of the {len(dataset)} images of {dataset.name} could be read.")
    return answers, positions


def _answer(subject: Subject, own: Answers, images: ImageArray, *, top: int, keep_features: bool) -> None:
    before = perf_counter()
    outputs = subject.run(images)
    own.seconds += perf_counter() - before
    if subject.classes:
        logits = _finite(next(iter(outputs.values())), subject)
        kept = min(top, logits.shape[1])
        own.ranked.append(np.argsort(-logits, axis=1, kind="stable")[:, :kept])
        if not keep_features:
            return
        vectors = logits
    else:
        vectors = _finite(_pooled(list(outputs.values())[-1]), subject)  # the deepest level
    own.features.append(np.array(vectors, np.float32))


def _pooled(output: FloatArray) -> FloatArray:
    """Average a map ``(N, C, H, W)`` over its positions; an embedding stays as it is."""
    return output.mean(axis=(2, 3)) if output.ndim == 4 else output.reshape(len(output), -1)


def _finite(values: FloatArray, subject: Subject) -> FloatArray:
    if not np.isfinite(values).all():
        raise DeployKitError(
            f"{subject.name} gave NaN or infinity. Fix: run deploykit verify on the bundle; where it was exported at "
            "fp16, export it at fp32."
        )
    return values


def _chunk_size(subjects: Sequence[Subject]) -> int:
    most = max(4 * each.input.channels * each.input.height * each.input.width for each in subjects)
    return max(1, min(MOST_IN_CHUNK, CHUNK_BYTES // most))


def _run_module(model: Any, images: ImageArray) -> dict[str, FloatArray]:
    """Run a backbone in torch in small batches."""
    parts: list[dict[str, FloatArray]] = []
    for start in range(0, len(images), BATCH):
        outputs = model(images[start : start + BATCH])
        parts.append(dict(outputs) if isinstance(outputs, dict) else {model.spec.output_names[0]: outputs})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
