"""Which products of a file are means of norms, and no layers in float."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit.backends.executorch.delegate_graph import Layer
from deploykit.backends.executorch.inspect import _is_mean

MEANS = {"row": np.full((1, 8), 1 / 8), "groups": np.kron(np.eye(3), np.full((4, 4), 1 / 4))}
LAYERS = {
    "identity": np.eye(4),
    "equal weights": np.full((3, 3), 0.3),
    "zeros": np.zeros((2, 2)),
    "a sum too many": np.full((1, 6), 1 / 4),
    "several values": np.linspace(0, 0.5, 8),
    "nothing": np.zeros(0),
}


@pytest.mark.parametrize("name", [*MEANS, *LAYERS])
@pytest.mark.parametrize("kind", ["convolution", "fully connected"])
def test_a_mean_has_the_weight_of_its_share(name, kind):
    content = (MEANS | LAYERS)[name].astype(np.float32).tobytes()
    layer = Layer(kind=kind, weight=content, scales=b"", integer_weight=False, static=False, dynamic=False)
    assert _is_mean(layer) == (name in MEANS)
