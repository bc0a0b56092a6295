"""A range of image sizes for a backbone: which families take one, and in which steps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from deploykit.errors import SpecError
from deploykit.image_sizes import size_text
from deploykit.spec import SizeRange

if TYPE_CHECKING:
    from deploykit.backbones.base import BaseBackbone


def set_image_sizes(backbone: BaseBackbone, sizes: SizeRange) -> None:
    """Let a backbone take a range of image sizes; its ``input_spec`` says which, tuned for ``sizes.opt``.

    Raises:
        SpecError: the backbone takes one size only, or the range has sizes that are not multiples of what it needs.
    """
    spec, step = backbone.input_spec, size_step(backbone)
    other = spec.shape_at(1, (spec.height + step, spec.width))
    if backbone._spec_for(other).height == spec.height:
        raise SpecError(
            f"{backbone.name} takes one image size, {spec.height}x{spec.width}: its positions or windows are made for "
            f"it, and image_size is the range {sizes}. Give one size, or take a convolutional network or MobileViT."
        )
    fitted = replace(sizes, step=step)
    height, width = fitted.best
    if min(height, width) < 2 * step:
        raise SpecError(
            f"the best size of the range is {size_text(fitted.best)}, where the deepest map of {backbone.name} has one "
            f"pixel a side; expected at least {2 * step} pixels a side."
        )
    backbone.spec = replace(backbone.spec, image_size=(height, width))
    backbone.input_spec = replace(spec, height=height, width=width, sizes=fitted)


def size_step(backbone: BaseBackbone) -> int:
    """Return what both sides of an image are multiples of, in pixels, where every map is to have whole pixels."""
    depth = backbone._depth() if backbone.spec.features_only else len(backbone.all_levels)
    own = backbone.size_factor * max(level.stride for level in backbone.all_levels[:depth])
    inner = getattr(backbone, "backbone", None)  # of a backbone with a neck
    return max(own, size_step(inner)) if inner is not None else own
