"""Array types that every layer shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

FloatArray: TypeAlias = npt.NDArray[np.float32]

Array: TypeAlias = npt.NDArray[np.generic]
"""Numbers of any dtype."""

ImageArray: TypeAlias = npt.NDArray[np.float32 | np.uint8]
"""Float32 images or uint8 pixels, as an engine's `InputSpec` says."""

Images: TypeAlias = "ImageArray | torch.Tensor"
