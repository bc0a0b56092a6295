"""Reading arrays from a ``.npz`` file that may be damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Every array of a file by its name; nothing is unpickled.

    A damaged directory can lose arrays without any checksum failing: ask for each by its name.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is damaged, or no ``.npz``.
    """
    with path.open("rb") as file:
        try:
            with np.lib.npyio.NpzFile(file, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except Exception as error:
            # The ZIP, its compression and NumPy's header parser each raise types of their own, tokenize's among them.
            raise ValueError(f"not a readable .npz: {error!r}") from error
