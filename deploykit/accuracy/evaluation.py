"""Labelled accuracy of engines, and what they lost against another model on the same images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from deploykit.accuracy.answers import Answers, Subject, collect_answers, subject_of
from deploykit.accuracy.class_indices import class_indices, own_indices
from deploykit.accuracy.intervals import mcnemar, paired_drop, wilson
from deploykit.accuracy.neighbours import neighbour_agreement, neighbour_classes
from deploykit.arguments import check_arguments
from deploykit.backends.runtime import Runtime
from deploykit.dataset import Dataset, DatasetSource, open_dataset
from deploykit.errors import SpecError
from deploykit.facade import create_backbone, named_bundle
from deploykit.labels import LabelSource, parse_labels
from deploykit.loading import load_bundle
from deploykit.progress import Progress, quiet

if TYPE_CHECKING:
    from torch import nn

Evaluated: TypeAlias = "str | os.PathLike[str] | Runtime | nn.Module"
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """One class: its images, how many of them are right, and how many the reference has right."""

    index: int
    label: str
    images: int
    right: int
    reference_right: int | None = None

    @property
    def lost(self) -> int:
        """How many images more the reference has right; without a reference, how many are wrong."""
        return (self.images if self.reference_right is None else self.reference_right) - self.right


@dataclass(frozen=True, kw_only=True)
class Drop:
    """A model against a reference on the same images.

    ``points`` is how much lower its top-1 is, in percentage points, and ``interval`` the 95% interval of that;
    ``lost`` images the reference alone has right, ``won`` the model alone; ``p_value`` is McNemar's exact test. These
    are None without labels. ``agreement``, 0 to 1, is the share of images with the same class; ``neighbours`` that of
    nearest neighbours that are the same, where there are features to compare.
    """

    reference: str
    points: float | None = None
    interval: tuple[float, float] | None = None
    lost: int | None = None
    won: int | None = None
    p_value: float | None = None
    agreement: float | None = None
    neighbours: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model is worth on some images.

    Shares are from 0 to 1, intervals are Wilson's at 95%. ``by``: ``"logits"``, or ``"neighbours"`` where a model
    without a classifier is judged by a vote of each image's nearest neighbours. ``top1`` is None without labels, and
    ``top5`` too where there are no more than five classes, or no logits. ``images_per_s`` is the model's own share of
    the time. ``float(evaluation)`` is the figure to search by: ``top1``, else the agreement with the reference.
    """

    model: str
    runtime: str
    precision: str
    device: str
    images: int
    skipped: int = 0
    by: str = "logits"
    top1: float | None = None
    top1_interval: tuple[float, float] | None = None
    top5: float | None = None
    top5_interval: tuple[float, float] | None = None
    drop: Drop | None = None
    classes: tuple[ClassScore, ...] = ()
    images_per_s: float = 0.0

    def __float__(self) -> float:
        if self.top1 is not None:
            return self.top1
        drop = self.drop or Drop(reference="")
        return float(drop.agreement if drop.agreement is not None else drop.neighbours or 0.0)


@dataclass(frozen=True, kw_only=True)
class _Marked:
    """The answers of one model, marked: which images are right among the first, and among the first five."""

    subject: Subject
    answers: Answers
    top1: BoolArray | None
    top5: BoolArray | None


def evaluate(
    model: Evaluated, images: DatasetSource, *, against: Evaluated | None = None, **options: Any
) -> Evaluation:
    """Run a model on labelled images and count what it has right; needs no torch where the models are engines.

    As a metric of the mixed-precision search: ``metric=lambda engine: evaluate(engine, "validation/").top1``.

    Args:
        model: a bundle's folder, an engine, a backbone in torch, or a module.
        images: a folder with one subfolder a class, a ``.csv``, ``.tsv`` or ``.npz`` file, or arrays; see
            `deploykit.dataset.open_dataset`.
        against: the model to compare with on the same images.
        options: as for `evaluate_models`.

    Raises:
        DeployKitError: as `evaluate_models`.
    """
    check_arguments(evaluate, locals())
    return evaluate_models([model], images, against=against, **options)[0]


def evaluate_models(
    models: Sequence[Evaluated],
    images: DatasetSource,
    *,
    against: Evaluated | None = None,
    labels: LabelSource | None = None,
    unlabelled: bool = False,
    skip_corrupt: bool = False,
    device: str = "auto",
    threads: int | None = None,
    trust: bool | None = None,
    progress: Progress = quiet,
) -> list[Evaluation]:
    """Run several models on the same images, decoded once; see `evaluate`.

    Args:
        models: as for `evaluate`.
        images: as for `evaluate`.
        against: as for `evaluate`; None: the first of several models.
        labels: the labels of the images in the order of the classifier's outputs, where neither its class names nor
            the order of the folders are that.
        unlabelled: leave the labels out, and compare with the reference alone.
        skip_corrupt: go on past images that cannot be read, with a warning for each.
        device: where bundles run.
        threads: how many threads each bundle's engine computes in.
        trust: as for `create_backbone`.
        progress: hears of the images that are done.

    Returns:
        One evaluation a model, in their order.

    Raises:
        SpecError: labels that fit no class, nothing to compare with, or models that cannot be compared.
        ImageError: images that cannot be read.
        BundleError, IncompatibleEngine, DeviceUnavailable: a bundle that cannot be opened here.
    """
    dataset = open_dataset(images)
    if unlabelled:
        dataset = replace(dataset, labels=None, unlabelled="unlabelled=True leaves the labels out")
    with ExitStack() as opened:
        subjects = [_open(model, opened, device=device, threads=threads, trust=trust) for model in models]
        reference = subjects[0] if against is None and len(subjects) > 1 else None
        if against is not None:
            reference = _open(against, opened, device=device, threads=threads, trust=trust)
        named = None if labels is None else parse_labels(labels)
        return _evaluate(subjects, dataset, reference, named, skip_corrupt=skip_corrupt, progress=progress)


def _open(model: Evaluated, opened: ExitStack, *, device: str, threads: int | None, trust: bool | None) -> Subject:
    if isinstance(model, (str, os.PathLike)):
        folder = named_bundle(model)
        if folder is None:
            raise SpecError(f"{os.fspath(model)} is no bundle. Give the folder that `deploykit export` wrote.")
        engine = opened.enter_context(load_bundle(folder, device=device, threads=threads, trust=trust))
        return subject_of(engine, folder.name or str(folder))
    if isinstance(model, Runtime):
        return subject_of(model)
    return subject_of(create_backbone(model))


def _evaluate(
    subjects: Sequence[Subject],
    dataset: Dataset,
    reference: Subject | None,
    named: Sequence[str] | None,
    *,
    skip_corrupt: bool,
    progress: Progress,
) -> list[Evaluation]:
    _check_comparable(subjects, dataset, reference)
    together = [*subjects, *([reference] if reference is not None else [])]
    truth, names = _truth(dataset, next((each for each in together if each.labels), subjects[0]), named)
    running = [*subjects] if reference is None or reference in subjects else [*subjects, reference]
    answers, positions = collect_answers(
        running, dataset, top=5, keep_features=truth is None, skip_corrupt=skip_corrupt, progress=progress
    )
    known = None if truth is None else truth[positions]
    marked = {id(s): _mark(s, own, known) for s, own in zip(running, answers, strict=True)}
    base = None if reference is None else marked[id(reference)]
    skipped = len(dataset) - len(positions)
    return [_summarize(marked[id(subject)], base, known, names, skipped) for subject in subjects]


def _check_comparable(subjects: Sequence[Subject], dataset: Dataset, reference: Subject | None) -> None:
    """Refuse models of different classes, and images without labels where nothing is compared with."""
    together = [*subjects, *([reference] if reference is not None else [])]
    counts = {each.classes for each in together}
    if len(counts) > 1:
        seen = ", ".join(f"{each.name} has {each.classes or 'no'} classes" for each in together)
        raise SpecError(f"the models cannot be compared: {seen}. Give models of one classifier, or features alone.")
    named = [each for each in together if each.labels]
    other = next((each for each in named if each.labels != named[0].labels), None)
    if other is not None:
        raise SpecError(
            f"the models cannot be compared: the class names of {named[0].name} and of {other.name}, or their order, "
            "differ. Fix: export both with the same labels."
        )
    if dataset.labels is None and reference is None:
        raise SpecError(
            f"{dataset.name} has no labels ({dataset.unlabelled}), and there is no model to compare with. Fix: give a "
            "folder with one subfolder a class, or against=, whose answers are then compared."
        )


def _truth(
    dataset: Dataset, model: Subject, named: Sequence[str] | None
) -> tuple[npt.NDArray[np.int64] | None, tuple[str, ...]]:
    """Return the class index of each image, None without labels, and the names of the classes."""
    if dataset.labels is None:
        return None, ()
    if not model.classes:
        return own_indices(dataset.labels)
    names = model.labels or (tuple(named) if named else None) or _folder_names(dataset, model.classes)
    return class_indices(dataset, model.classes, model.labels, named), names


def _folder_names(dataset: Dataset, classes: int) -> tuple[str, ...]:
    different = sorted({str(label) for label in dataset.labels or ()})
    if dataset.in_folders and len(different) == classes:
        return tuple(different)
    return tuple(f"class {index}" for index in range(classes))


def _mark(subject: Subject, answers: Answers, truth: npt.NDArray[np.int64] | None) -> _Marked:
    if truth is None:
        return _Marked(subject=subject, answers=answers, top1=None, top5=None)
    if not subject.classes:
        voted = neighbour_classes(answers.vectors(), truth)
        return _Marked(subject=subject, answers=answers, top1=voted == truth, top5=None)
    hits = answers.classes() == truth[:, None]
    five = hits.any(axis=1) if subject.classes > 5 else None
    return _Marked(subject=subject, answers=answers, top1=hits[:, 0], top5=five)


def _summarize(
    model: _Marked,
    reference: _Marked | None,
    truth: npt.NDArray[np.int64] | None,
    names: Sequence[str],
    skipped: int,
) -> Evaluation:
    subject, own = model.subject, model.answers
    images = len(own.classes() if own.ranked else own.vectors())
    share, interval = _share(model.top1)
    share5, interval5 = _share(model.top5)
    compared = reference if reference is not None and reference is not model else None
    return Evaluation(
        model=subject.name,
        runtime=subject.runtime,
        precision=subject.precision,
        device=subject.device,
        images=images,
        skipped=skipped,
        by="logits" if subject.classes else "neighbours",
        top1=share,
        top1_interval=interval,
        top5=share5,
        top5_interval=interval5,
        drop=None if compared is None else _drop(model, compared, images),
        classes=_class_scores(model, compared, truth, names),
        images_per_s=round(images / own.seconds, 1) if own.seconds else 0.0,
    )


def _share(right: BoolArray | None) -> tuple[float | None, tuple[float, float] | None]:
    if right is None:
        return None, None
    return float(right.mean()), wilson(int(right.sum()), len(right))


def _drop(model: _Marked, reference: _Marked, images: int) -> Drop:
    own, other = model.answers, reference.answers
    same = float((own.classes()[:, 0] == other.classes()[:, 0]).mean()) if own.ranked else None
    neighbours = neighbour_agreement(other.vectors(), own.vectors()) if own.features and images > 1 else None
    found = Drop(reference=reference.subject.name, agreement=same, neighbours=neighbours)
    if model.top1 is None or reference.top1 is None:
        return found
    lost = int((reference.top1 & ~model.top1).sum())
    won = int((model.top1 & ~reference.top1).sum())
    points, low, high = (100 * each for each in paired_drop(lost, won, images))
    return replace(found, points=points, interval=(low, high), lost=lost, won=won, p_value=mcnemar(lost, won))


def _class_scores(
    model: _Marked, reference: _Marked | None, truth: npt.NDArray[np.int64] | None, names: Sequence[str]
) -> tuple[ClassScore, ...]:
    """Return every class that has images, the one that lost most first."""
    if truth is None or model.top1 is None:
        return ()
    count = len(names)
    images, right = np.bincount(truth, minlength=count), np.bincount(truth[model.top1], minlength=count)
    of_reference = None
    if reference is not None and reference.top1 is not None:
        of_reference = np.bincount(truth[reference.top1], minlength=count)
    scores = [
        ClassScore(
            index=index,
            label=names[index],
            images=int(images[index]),
            right=int(right[index]),
            reference_right=None if of_reference is None else int(of_reference[index]),
        )
        for index in np.flatnonzero(images).tolist()
    ]
    return tuple(sorted(scores, key=lambda score: (-score.lost / score.images, score.index)))
