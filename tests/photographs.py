"""Six small photographs, the same bytes wherever they are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "rocket")
SHORT_SIDE = 128


def write_photographs(folder: Path) -> Path:
    """Write them into a folder, which is returned; scikit-image carries them."""
    from skimage import data

    for name in PHOTOGRAPHS:
        image = Image.fromarray(np.asarray(getattr(data, name)()))
        ratio = SHORT_SIDE / min(image.size)
        small = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC)
        small.save(folder / f"{name}.jpg", quality=92)
    return folder
