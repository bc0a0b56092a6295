"""Inductor's modes, which are the targets of torch_compile."""

from __future__ import annotations

INDUCTOR_MODES: dict[str, dict[str, object]] = {
    "onednn": {},
    "templates": {"max_autotune": True, "max_autotune_gemm_backends": "CPP"},
    "autotuned": {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"},
}
"""Inductor's settings in each mode, beside frozen weights, which all have. They differ in matrix products: oneDNN's
kernels; inductor's own C++ templates, into which what follows is fused; or the faster of the two for each product,
timed alone while it compiles.
"""

FASTEST_MODE = "fastest"
"""The target that stands for the mode that takes the least time on this machine."""
