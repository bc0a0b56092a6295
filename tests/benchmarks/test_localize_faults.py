"""Each kind of planted fault on a small network: the gate finds it, and the walk names its node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deploykit import export_backbone
from deploykit.spec import Fp16, Fp32, Int8

SIDE = 24
PRECISIONS = {"fp32": Fp32(), "fp16": Fp16(), "int8": Int8(min_sqnr_db=10)}
KINDS = (
    *("weight x1.01", "sign flip", "swapped channels", "wrong resize mode", "dropped activation", "renamed output"),
    *("swapped outputs", "transposed layout", "transposed kernel", "stale output"),
)
CASES = [
    *(pytest.param(kind, "fp32", id=f"{kind}-fp32") for kind in KINDS),
    *(pytest.param(kind, name, marks=pytest.mark.slow, id=f"{kind}-{name}") for kind in KINDS for name in PRECISIONS),
    pytest.param("zero point off by one", "int8"),
]


class Pyramid(nn.Module):
    """Two maps, the coarser of which is enlarged into the finer one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.side = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, images):
        fine = self.one(images).relu()
        coarse = self.two(fine).relu()
        enlarged = nn.functional.interpolate(coarse, scale_factor=2.0, mode="nearest")
        return {"fine": self.side(fine + enlarged), "coarse": self.side(coarse)}


@pytest.fixture(scope="module")
def subjects(script, tmp_path_factory):
    """The network as a bundle of a precision, exported once."""
    benchmark, images = script("localize_faults"), script("_families").smooth_images(SIDE)
    root, made = tmp_path_factory.mktemp("faults"), {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Pyramid().eval()

    def subject(name: str):
        if name not in made:
            folder: Path = root / name
            asked = {"runtime": "onnxruntime", "image_size": SIDE, "features_only": True, "calibration": images}
            export_backbone(network, folder, precision=PRECISIONS[name], **asked)
            made[name] = benchmark.Subject.of(folder, root / f"{name}-wrong")
        return made[name]

    return subject


@pytest.mark.parametrize(("kind", "precision"), CASES)
def test_a_planted_fault_is_found_at_its_node(script, subjects, kind, precision):
    subject = subjects(precision)
    (fault,) = (each for each in script("_faults").FAULTS if each.name == kind)
    candidate, expected, _ = subject.plant(fault, np.random.default_rng(0))
    assert not subject.passes_gate(candidate)
    assert subject.culprit(candidate) in expected


def test_an_untouched_copy_passes_and_has_no_culprit(subjects):
    subject = subjects("fp32")
    assert subject.passes_gate(subject.model.clone())
    assert subject.culprit(subject.model.clone()) is None
