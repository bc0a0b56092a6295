"""Nearest neighbours of features: what a model without a classifier is judged by."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from deploykit.arrays import FloatArray

NEIGHBOURS = 10
TEMPERATURE = 0.07
"""Neighbours are weighted by ``exp(cosine / TEMPERATURE)`` (Wu et al. 2018, arXiv:1805.01978)."""
_BLOCK_BYTES = 64 << 20

IndexArray = npt.NDArray[np.int64]


def neighbour_agreement(reference: FloatArray, found: FloatArray, count: int = NEIGHBOURS) -> float:
    """Return the share, 0 to 1, of each image's nearest neighbours that are the same by both models' features.

    Args:
        reference: ``(N, D)`` features of one model.
        found: ``(N, E)`` of the other, for the same images.
        count: neighbours of an image; fewer where there are fewer images.
    """
    same = total = 0
    for (own, _), (other, _) in zip(_nearest(reference, count), _nearest(found, count), strict=True):
        same += sum(len(np.intersect1d(a, b)) for a, b in zip(own, other, strict=True))
        total += own.size
    return same / total if total else 1.0


def neighbour_classes(features: FloatArray, labels: IndexArray, count: int = NEIGHBOURS) -> IndexArray:
    """Return the class of each image by the weighted vote of its nearest neighbours, itself left out.

    Args:
        features: ``(N, D)``.
        labels: ``(N,)`` class indices, from 0.
        count: neighbours that vote.
    """
    classes = int(labels.max()) + 1
    chosen: list[IndexArray] = []
    for nearest, cosines in _nearest(features, count):
        votes = np.zeros((len(nearest), classes))
        weights = np.exp((cosines - cosines.max(axis=1, keepdims=True, initial=-1.0)) / TEMPERATURE)
        np.add.at(votes, (np.arange(len(nearest))[:, None], labels[nearest]), weights)
        chosen.append(votes.argmax(axis=1))
    return np.concatenate(chosen)


def _nearest(features: FloatArray, count: int) -> Iterator[tuple[IndexArray, FloatArray]]:
    """Yield, block by block of images, their neighbours by cosine, ``(block, count)``, and the cosines."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.maximum(norms, np.finfo(np.float32).tiny)
    images = len(unit)
    count = min(count, images - 1)
    block = max(1, _BLOCK_BYTES // (4 * images))
    for start in range(0, images, block):
        cosines = unit[start : start + block] @ unit.T
        rows = np.arange(len(cosines))
        cosines[rows, start + rows] = -np.inf
        nearest = np.argpartition(-cosines, min(count, images - 1), axis=1)[:, :count]
        yield nearest, np.take_along_axis(cosines, nearest, axis=1)
