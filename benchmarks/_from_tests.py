"""What the benchmarks take from the tests: realistic random weights, networks, and exports without tables made anew."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from tests.backbones.realistic import randomize as realistic
from tests.backbones.realistic import settle
from tests.backbones.smallest import SMALLEST
from tests.torch_tables import keep_tables

__all__ = ["SMALLEST", "keep_tables", "realistic", "settle"]
