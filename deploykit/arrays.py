"""Array types that every layer shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

FloatArray: TypeAlias = npt.NDArray[np.float32]

ImageArray: TypeAlias = npt.NDArray[Any]
"""Float32 images or uint8 pixels, as an engine's `InputSpec` says."""

Images: TypeAlias = "ImageArray | torch.Tensor"
