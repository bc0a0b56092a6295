from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from deploykit.errors import ExportError, FusionError
from deploykit.fusion.pipeline import EXPORT_PASSES, FusionPass, fuse, run_passes
from deploykit.fusion.program import export_program
from deploykit.spec import BatchRange, InputSpec
from tests.fusion.test_fold_batchnorm import SPEC, Tuple, images, norm_of


def small() -> nn.Module:
    return Tuple(nn.Conv2d(4, 8, 3), norm_of(8), nn.ReLU()).eval()


def scale_weights(module) -> int:
    with torch.no_grad():
        getattr(module, "0").weight.mul_(1.01)
    return 1


def fail(module) -> int:
    raise RuntimeError("no such node")


def test_a_pass_that_changes_the_numbers_is_named_with_those_before_it():
    passes = (*EXPORT_PASSES, FusionPass(name="scale-weights", rewrite=scale_weights, min_sqnr_db=100))
    with pytest.raises(FusionError, match=r"'scale-weights' changed the numbers: \d.*dB.*promises 100.*fold-batchnorm"):
        run_passes(export_program(small(), SPEC).module(), images(), passes)


def test_a_pass_that_gives_nan_is_stopped():
    def spoil(module):
        with torch.no_grad():
            getattr(module, "0").bias.fill_(float("nan"))
        return 1

    with pytest.raises(FusionError, match="'spoil' changed the numbers"):
        run_passes(
            export_program(small(), SPEC).module(), images(), (FusionPass(name="spoil", rewrite=spoil, min_sqnr_db=1),)
        )


def test_a_pass_that_raises_is_named_with_those_before_it():
    first = FusionPass(name="nothing", rewrite=lambda module: 0, min_sqnr_db=100)
    with pytest.raises(FusionError, match=r"'fail' failed: no such node\. Passes already run: nothing\."):
        run_passes(
            export_program(small(), SPEC).module(),
            images(),
            (first, FusionPass(name="fail", rewrite=fail, min_sqnr_db=100)),
        )


def test_a_small_change_within_the_promise_is_recorded():
    step = FusionPass(name="scale-weights", rewrite=scale_weights, min_sqnr_db=20)
    (record,) = run_passes(export_program(small(), SPEC).module(), images(), (step,))
    assert (record.name, record.rewrites) == ("scale-weights", 1)
    assert 20 < record.sqnr_db < 60


@pytest.mark.parametrize("batch", [1, 3, BatchRange()], ids=str)
def test_fusing_gives_a_program_that_still_takes_the_batch(batch):
    spec = InputSpec(batch=batch, channels=4, height=12, width=12)
    module = small()
    fused = fuse(export_program(module, spec), spec, images().numpy())
    assert [(record.name, record.rewrites) for record in fused.records] == [("fold-batchnorm", 1)]
    for count in (batch,) if isinstance(batch, int) else (1, 3, 8):
        many = torch.cat([images(seed) for seed in range(count)])
        with torch.no_grad():
            (found,), (expected,) = fused.program.module()(many), module(many)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_module_that_cannot_be_traced_is_an_export_error():
    class Branching(nn.Module):
        def forward(self, inputs):
            return (inputs * 2 if inputs.sum() > 0 else inputs,)

    with pytest.raises(ExportError, match=r"cannot trace the backbone at \(1, 4, 12, 12\).*control flow"):
        export_program(Branching(), SPEC)
