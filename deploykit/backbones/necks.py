"""Necks: what stands between a backbone's levels and a detector's or segmenter's heads.

A neck is a module with ``feature_info`` that takes a dict of features and returns one. `WithNeck`
makes it part of the backbone, so that both export as one engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.backbones.base import BaseBackbone, PretrainedSource
from deploykit.backbones.features import WHOLE_IMAGE
from deploykit.errors import SpecError, nearest
from deploykit.feature_dict import Features
from deploykit.spec import FeatureInfo, FeatureLevel, InputSpec


class Neck(nn.Module):
    """A dict of features to another; ``feature_info`` describes what comes out, shallow to deep."""

    feature_info: FeatureInfo


class FeatureSelector(Neck):
    """Picks levels of a feature dict, and renames them.

    Args:
        levels: those that come in.
        names: the levels to keep, or a mapping from each to its new name.

    Raises:
        SpecError: no such level, none at all, or two with one name.
    """

    def __init__(self, levels: Sequence[FeatureLevel], names: Sequence[str] | Mapping[str, str]) -> None:
        super().__init__()
        self.names = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
        have = {level.name: level for level in levels}
        for name in self.names:
            if name not in have:
                raise SpecError(f"there is no level {name!r} to select. {nearest(name, have)}")
        if not self.names or len(set(self.names.values())) != len(self.names):
            raise SpecError(
                f"the selection is {self.names}; expected at least one level, each under a name of its own."
            )
        kept = [replace(level, name=self.names[level.name]) for level in levels if level.name in self.names]
        self.feature_info = FeatureInfo(kept)

    def forward(self, features: Mapping[str, Tensor]) -> Features[Tensor]:
        """The chosen ``(N, C, H, W)`` maps, unchanged, in the order in which they came."""
        picked = {self.names[name]: feature for name, feature in features.items() if name in self.names}
        return Features(picked, self.feature_info.by_index())


class FeaturePyramid(Neck):
    """Lin et al. 2017, "Feature Pyramid Networks for Object Detection".

    A 1x1 convolution to ``channels`` a level; from the deepest up, each is added to the next finer
    one by nearest upsampling; a 3x3 convolution a level. A finer map of odd size takes the far row and
    column of its coarser one once. Outputs are called ``p2``, ``p3``, ... where ``p<k>`` has the index
    k - 1, so stride ``2**k`` unless the backbone is dilated.

    Args:
        levels: those that come in, shallow to deep.
        channels: of every output.
        extra_levels: coarser levels after the deepest, each half as large as the one before.
        extra: how they are made: ``"pool"`` takes every second value of the one before (Lin et al.),
            ``"conv"`` applies a 3x3 convolution of stride 2 (Lin et al. 2017, RetinaNet).

    Raises:
        SpecError: no levels, or strides that do not grow by whole factors.
    """

    def __init__(
        self,
        levels: Sequence[FeatureLevel],
        channels: int = 256,
        *,
        extra_levels: int = 0,
        extra: Literal["pool", "conv"] = "pool",
    ) -> None:
        super().__init__()
        if extra not in ("pool", "conv"):
            raise SpecError(f"extra is {extra!r}. {nearest(str(extra), ('pool', 'conv'))}")
        if channels < 1 or extra_levels < 0:
            raise SpecError(f"channels={channels}, extra_levels={extra_levels}; expected at least 1 and at least 0.")
        self.factors = _factors(levels)
        self.inputs = tuple(level.name for level in levels)
        self.lateral = nn.ModuleList(nn.Conv2d(level.channels, channels, 1) for level in levels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in levels)
        convolved = extra_levels if extra == "conv" else 0
        self.extra = nn.ModuleList(nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(convolved))
        self.extra_levels = extra_levels
        _initialise(self)
        self.feature_info = FeatureInfo(self._describe(levels, channels))

    def _describe(self, levels: Sequence[FeatureLevel], channels: int) -> list[FeatureLevel]:
        described: list[FeatureLevel] = []
        merged = levels[-1].receptive_field
        for level in reversed(levels):
            merged = _widest(merged, level.receptive_field)
            described.insert(0, _output_level(level.index, channels, level.stride, _grown(merged, level.stride)))
        for _ in range(self.extra_levels):
            last = described[-1]
            field = _grown(last.receptive_field, last.stride) if self.extra else last.receptive_field
            described.append(_output_level(last.index + 1, channels, last.stride * 2, field))
        return described

    def forward(self, features: Mapping[str, Tensor]) -> Features[Tensor]:
        """``(N, C, H/stride, W/stride)`` maps by level name to ``(N, channels, H/stride, W/stride)`` by ``p<k>``."""
        merged = [lateral(features[name]) for lateral, name in zip(self.lateral, self.inputs, strict=True)]
        for position in range(len(merged) - 2, -1, -1):
            finer, coarser = merged[position], merged[position + 1]
            merged[position] = finer + _upsample(coarser, self.factors[position], finer)
        outputs = [output(feature) for output, feature in zip(self.output, merged, strict=True)]
        for position in range(self.extra_levels):
            last = outputs[-1]
            outputs.append(self.extra[position](last) if self.extra else F.max_pool2d(last, 1, stride=2))
        return Features(zip(self.feature_info.names(), outputs, strict=True), self.feature_info.by_index())


class PathAggregation(Neck):
    """Liu et al. 2018, "Path Aggregation Network for Instance Segmentation": a bottom-up path after an FPN.

    From the finest level down, each output goes through a 3x3 convolution of the levels' stride ratio,
    is added to the next coarser level of the pyramid, and through another 3x3 convolution; a ReLU
    follows each convolution. Outputs are called ``n2``, ``n3``, ... and the finest is the pyramid's own.

    Args:
        levels: those that come in, shallow to deep.
        channels: of every output.

    Raises:
        SpecError: no levels, or strides that do not grow by whole factors.
    """

    def __init__(self, levels: Sequence[FeatureLevel], channels: int = 256) -> None:
        super().__init__()
        self.top_down = FeaturePyramid(levels, channels)
        factors = self.top_down.factors
        self.down = nn.ModuleList(nn.Conv2d(channels, channels, 3, stride=factor, padding=1) for factor in factors)
        self.fuse = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in factors)
        _initialise(self.down)
        _initialise(self.fuse)
        self.feature_info = FeatureInfo(self._describe())

    def _describe(self) -> list[FeatureLevel]:
        finest, *coarser = self.top_down.feature_info
        described = [replace(finest, name=f"n{finest.index + 1}")]
        for level in coarser:
            before = described[-1]
            field = _widest(level.receptive_field, _grown(before.receptive_field, before.stride))
            described.append(
                replace(level, name=f"n{level.index + 1}", receptive_field=_grown(field, level.stride)),
            )
        return described

    def forward(self, features: Mapping[str, Tensor]) -> Features[Tensor]:
        """``(N, C, H/stride, W/stride)`` maps by level name to ``(N, channels, H/stride, W/stride)`` by ``n<k>``."""
        finest, *coarser = self.top_down(features).values()
        outputs = [finest]
        for pyramid, down, fuse in zip(coarser, self.down, self.fuse, strict=True):
            outputs.append(F.relu(fuse(pyramid + F.relu(down(outputs[-1])))))
        return Features(zip(self.feature_info.names(), outputs, strict=True), self.feature_info.by_index())


class WithNeck(BaseBackbone):
    """A backbone whose levels are a neck's outputs; exports, quantizes and runs as one engine.

    It returns features only. ``backbone`` and ``neck`` stay as they are and share their parameters.
    """

    family: ClassVar[str] = "with_neck"
    variants: ClassVar[Mapping[str, Any]] = {}
    output_strides: ClassVar[tuple[int, ...]] = (8, 16, 32)
    takes_patch_size: ClassVar[bool] = True

    def __init__(self, backbone: BaseBackbone, neck: Neck) -> None:
        options = replace(
            backbone.options,
            features_only=True,
            output_indices=None,
            image_size=backbone.spec.image_size,
            architecture=(),
        )
        super().__init__(f"{backbone.name}+{type(neck).__name__.lower()}", options)
        self.backbone = backbone
        self.neck = neck
        source = PretrainedSource(tag="", preprocessing=backbone.input_spec.preprocessing, label_set=None)
        self.finish(neck.feature_info, pretrained=source)
        self.spec = replace(self.spec, weights=backbone.spec.weights)
        self.train(backbone.training)

    def forward_levels(self, images: Tensor, depth: int) -> tuple[list[Tensor], Tensor]:
        """See `BaseBackbone.forward_levels`; the state is the deepest map."""
        maps, _ = self.backbone.forward_levels(images, self.backbone._depth())
        by_name = {level.name: feature for level, feature in zip(self.backbone.all_levels, maps, strict=False)}
        levels = self.backbone.feature_info
        outputs = self.neck(Features({level.name: by_name[level.name] for level in levels}, levels.by_index()))
        features = list(outputs.values())
        return features[:depth], features[-1]

    def forward_head(self, trunk: Tensor) -> Tensor:
        """A backbone with a neck has no head.

        Raises:
            SpecError: always.
        """
        raise SpecError(f"{self.name} gives features only. Call its .backbone for logits.")

    def stage_modules(self) -> dict[str, tuple[nn.Module, ...]]:
        """The backbone's stages by the backbone's level names; the neck counts as head."""
        return self.backbone.stage_modules()

    def freeze(self, up_to: str | None) -> None:
        """As `BaseBackbone.freeze`, by the backbone's level names."""
        self.backbone.freeze(up_to)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As the backbone's."""
        self.backbone.set_grad_checkpointing(enable)
        self.grad_checkpointing = enable

    def _spec_for(self, shape: tuple[int, ...]) -> InputSpec:
        return self.backbone._spec_for(shape)


def _factors(levels: Sequence[FeatureLevel]) -> tuple[int, ...]:
    """How much coarser each level is than the one before it."""
    strides = [level.stride for level in levels]
    pairs = list(itertools.pairwise(strides))
    if not strides or any(coarser % finer for finer, coarser in pairs):
        raise SpecError(
            f"the levels have strides {strides}; expected at least one, each a multiple of the one before. "
            "Choose others with output_indices=, or hierarchical=True for a plain ViT."
        )
    return tuple(coarser // finer for finer, coarser in pairs)


def _upsample(coarser: Tensor, factor: int, finer: Tensor) -> Tensor:
    """Nearest by a whole factor, cut to the finer map's size: all sizes are static in a graph."""
    if factor > 1:
        coarser = F.interpolate(coarser, scale_factor=float(factor), mode="nearest")
    height, width = finer.shape[2:]
    return coarser if coarser.shape[2:] == finer.shape[2:] else coarser[:, :, :height, :width]


def _output_level(index: int, channels: int, stride: int, field: int) -> FeatureLevel:
    return FeatureLevel(name=f"p{index + 1}", index=index, channels=channels, stride=stride, receptive_field=field)


def _widest(one: int, other: int) -> int:
    return WHOLE_IMAGE if WHOLE_IMAGE in (one, other) else max(one, other)


def _grown(field: int, stride: int) -> int:
    """The receptive field after a 3x3 convolution on values ``stride`` pixels apart."""
    return field if field == WHOLE_IMAGE else field + 2 * stride


def _initialise(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_uniform_(part.weight, a=1)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
