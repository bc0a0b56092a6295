"""What the benchmarks take from the tests: realistic random weights, and timm beside a CPU torch."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from tests.torchvision_operators import declare_torchvision_operators

from tests.backbones.realistic import randomize as realistic

__all__ = ["declare_torchvision_operators", "realistic"]
