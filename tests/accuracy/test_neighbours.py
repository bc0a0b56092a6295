"""Neighbours of features, against a search of every pair."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit.accuracy import neighbours
from deploykit.accuracy.neighbours import neighbour_agreement, neighbour_classes


@pytest.fixture(scope="module")
def features():
    return np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)


def nearest(features, count):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    return np.argsort(-cosines, axis=1)[:, :count]


def test_the_same_features_have_the_same_neighbours(features):
    assert neighbour_agreement(features, features * 3) == 1.0


def test_agreement_is_that_of_every_pair(features):
    noisy = features + np.random.default_rng(1).normal(size=features.shape).astype(np.float32)
    own, other = nearest(features, 5), nearest(noisy, 5)
    expected = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(own, other, strict=True)])
    assert neighbour_agreement(features, noisy, 5) == pytest.approx(expected)
    assert 0.1 < expected < 0.9


def test_blocks_change_nothing(features, monkeypatch):
    noisy = features + np.random.default_rng(2).normal(size=features.shape).astype(np.float32)
    whole = neighbour_agreement(features, noisy)
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", 7 * 4 * len(features))
    assert neighbour_agreement(features, noisy) == whole


def test_clusters_vote_for_their_own_class():
    generator = np.random.default_rng(3)
    labels = np.repeat(np.arange(3), 20)
    features = (np.eye(3)[labels] * 5 + generator.normal(size=(60, 3))).astype(np.float32)
    assert (neighbour_classes(features, labels) == labels).mean() > 0.9


def test_an_image_has_no_vote_for_itself():
    features = np.array([[1, 0], [0.99, 0.1], [0.98, 0.2]], np.float32)
    assert neighbour_classes(features, np.array([0, 1, 1]), count=2)[0] == 1
