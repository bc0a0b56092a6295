"""The class index of each labelled image: by the model's class names, by indices, or by the order of the folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from deploykit.dataset import Dataset, Label
from deploykit.errors import SpecError
from deploykit.labels import check_count

NAMED = 8
"""How many labels a message names."""
REMEDY = (
    "Fix: give labels=, the labels of the images in the order of the classifier's outputs (a list or a file with one "
    "a line), or unlabelled=True to leave them out."
)


def class_indices(
    dataset: Dataset, classes: int, names: Sequence[str] | None, given: Sequence[str] | None
) -> npt.NDArray[np.int64]:
    """Return the index of each image's class in a classifier's outputs, ``(N,)``.

    Args:
        dataset: images with labels.
        classes: how many outputs the classifier has.
        names: its class names, in their order; None: it has none.
        given: the labels of the images in the order of the outputs, as the user says; None: not said.

    Raises:
        SpecError: labels that no class is known for.
    """
    labels = dataset.labels or ()
    different = sorted(set(labels), key=str)
    table = _table(dataset, different, classes, names, given)
    missing = [label for label in different if label not in table]
    if missing:
        known = given if given is not None else names
        whose = "labels=" if given is not None else "the model's class names"
        seen = f"{whose} hold {_listed(known)}" if known else f"the model has {classes} classes without names"
        raise SpecError(
            f"{dataset.name}: {len(missing)} of its {len(different)} labels stand for no class: {_listed(missing)}; "
            f"{seen}. {REMEDY}"
        )
    return np.array([table[label] for label in labels], np.int64)


def own_indices(labels: Sequence[Label]) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Return an index of each image's label and the labels by it, where no classifier says an order."""
    different = sorted(set(labels), key=str)
    table = {label: index for index, label in enumerate(different)}
    return np.array([table[label] for label in labels], np.int64), tuple(map(str, different))


def _table(
    dataset: Dataset,
    different: Sequence[Label],
    classes: int,
    names: Sequence[str] | None,
    given: Sequence[str] | None,
) -> dict[Label, int]:
    if given is not None:
        check_count(given, classes)
        return _named(dataset, different, _by_text(given, str), str)
    if all(isinstance(label, int) for label in different):
        return {label: label for label in range(classes)}
    for spelling in (_exact, _plain):
        by_name = _by_text(names or (), spelling)
        if by_name and all(spelling(label) in by_name for label in different):
            return _named(dataset, different, by_name, spelling)
    if not dataset.in_folders or len(different) != classes:
        return {}
    numbers = all(str(label).isdecimal() for label in different)
    if numbers and sorted(different, key=int) != list(different):
        raise SpecError(
            f"{dataset.name}: its {classes} folders are numbers, {_listed(different)}, whose order as text and as "
            f"numbers differ, and nothing says by which the classifier was trained. {REMEDY}"
        )
    return {label: index for index, label in enumerate(different)}  # as torchvision's ImageFolder


def _by_text(names: Sequence[str], spelling: Callable[[Label], str]) -> dict[str, list[int]]:
    """Return the classes of each name: two may have one, as ImageNet's Cardigan and cardigan but for the case."""
    by_text: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        by_text.setdefault(spelling(name), []).append(index)
    return by_text


def _named(
    dataset: Dataset, different: Sequence[Label], by_text: Mapping[str, list[int]], spelling: Callable[[Label], str]
) -> dict[Label, int]:
    """Return the class of each label that is the name of one; raises SpecError for the name of several."""
    found = {label: by_text[spelling(label)] for label in different if spelling(label) in by_text}
    for label, indices in found.items():
        if len(indices) > 1:
            raise SpecError(
                f"{dataset.name}: the label {label!r} is the name of {len(indices)} classes, {_listed(indices)}; "
                "expected one. Fix: label the images by class index, or give these classes names of their own."
            )
    return {label: indices[0] for label, indices in found.items()}


def _exact(label: Label) -> str:
    return str(label).strip().replace("_", " ")


def _plain(label: Label) -> str:
    return _exact(label).casefold()


def _listed(labels: Sequence[Label]) -> str:
    return ", ".join(map(str, labels[:NAMED])) + (", ..." if len(labels) > NAMED else "")
