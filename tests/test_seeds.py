"""Random weights of the tests are the same on every run and in every order."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def drawn_from(name: str) -> tuple[float, float, float]:
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return drawn()


@pytest.fixture
def early():
    return drawn()


@pytest.fixture
def network(early):
    return drawn()


def test_fixtures_and_tests_start_anew_by_their_names(early, network):
    own = drawn()
    assert own == drawn_from("test_fixtures_and_tests_start_anew_by_their_names")
    assert (early, network) == (drawn_from("early"), drawn_from("network"))
    assert len({own, early, network}) == 3
