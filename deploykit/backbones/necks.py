"""Necks: what stands between a backbone's levels and a detector's or segmenter's heads.

A neck is a module with ``feature_info`` that takes a dict of features and returns one. `WithNeck`
makes it part of the backbone, so that both export as one engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.arguments import check_arguments
from deploykit.backbones.base import BaseBackbone, PretrainedSource
from deploykit.backbones.features import WHOLE_IMAGE
from deploykit.backbones.user_module import described
from deploykit.errors import SpecError, nearest
from deploykit.feature_dict import Features
from deploykit.spec import FeatureInfo, FeatureLevel, InputSpec


class Neck(nn.Module):
    """A dict of features to another; ``feature_info`` describes what comes out, shallow to deep."""

    feature_info: FeatureInfo


class FeatureSelector(Neck):
    """Picks levels of a backbone, or of a feature dict.

    ``FeatureSelector(backbone, output_indices)`` is called with images and gives a list of maps, in the order of the
    indices. ``FeatureSelector(levels, names)`` is a neck: it is called with features, and gives features.

    Args:
        levels: a backbone that gives features; or the levels that come in.
        names: the indices of the levels to give; or the names of the levels to keep, or a mapping from each to
            its new name.
        backbone: the first by its other name.
        output_indices: the second by its other name.

    Raises:
        SpecError: no such level, none at all, two with one name, or a backbone that gives no features.
    """

    def __init__(
        self,
        levels: Sequence[FeatureLevel] | nn.Module | None = None,
        names: Sequence[str] | Mapping[str, str] | Sequence[int] | None = None,
        *,
        backbone: nn.Module | None = None,
        output_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_arguments(FeatureSelector.__init__, locals())
        source: Any = levels if backbone is None else backbone
        chosen: Any = names if output_indices is None else output_indices
        if source is None or chosen is None:
            raise SpecError("a FeatureSelector was given too little; expected a backbone and the indices of levels.")
        self.backbone: nn.Module | None = source if callable(source) else None
        self.output_indices: tuple[int, ...] = ()
        if self.backbone is not None:
            self.output_indices = tuple(chosen)
            self._check_indices(_described_levels(self.backbone))
            return
        self.names = dict(chosen) if isinstance(chosen, Mapping) else {name: name for name in chosen}
        have: dict[str, FeatureLevel] = {level.name: level for level in source}
        for name in self.names:
            if name not in have:
                raise SpecError(f"there is no level {name!r} to select. {nearest(name, have)}")
        if not self.names or len(set(self.names.values())) != len(self.names):
            raise SpecError(
                f"the selection is {self.names}; expected at least one level, each under a name of its own."
            )
        kept = [replace(level, name=self.names[level.name]) for level in have.values() if level.name in self.names]
        self.feature_info = FeatureInfo(kept)

    def _check_indices(self, levels: FeatureInfo | None) -> None:
        if levels is None:
            return
        have = {level.index: level for level in levels}
        absent = [index for index in self.output_indices if index not in have]
        if absent or not self.output_indices:
            listed = ", ".join(f"{level.index} ({level.name}, stride {level.stride})" for level in levels)
            raise SpecError(f"there are no levels {absent or '()'} to select; the backbone gives {listed}.")
        self.feature_info = FeatureInfo(have[index] for index in sorted(set(self.output_indices)))

    def forward(self, features: Any) -> Any:
        """Images to a list of maps, or features to the chosen maps, unchanged, in the order in which they came."""
        if self.backbone is not None:
            maps = self.backbone(features)
            return [maps[index] for index in self.output_indices]
        picked = {self.names[name]: feature for name, feature in features.items() if name in self.names}
        return Features(picked, self.feature_info.by_index())


class FeaturePyramid(Neck):
    """Lin et al. 2017, "Feature Pyramid Networks for Object Detection".

    A 1x1 convolution to ``channels`` a level; from the deepest up, each is added to the next finer
    one by nearest upsampling; a 3x3 convolution a level. A finer map of odd size takes the far row and
    column of its coarser one once. Outputs are called ``p2``, ``p3``, ... where ``p<k>`` has the index
    k - 1, so stride ``2**k`` unless the backbone is dilated.

    ``FeaturePyramid(backbone, fpn_channels)`` is called with images; ``FeaturePyramid(levels, channels)`` is a neck,
    called with features. Where the levels are not known yet (a module of your own, or None: see `build_fpn`), the
    convolutions are made in the first call, from the maps that come in: run it once before you hand its parameters
    to an optimizer or load a state dict.

    Args:
        levels: a backbone that gives features; the levels that come in, shallow to deep; or None.
        channels: of every output.
        extra_levels: coarser levels after the deepest, each half as large as the one before.
        extra: how they are made: ``"pool"`` takes every second value of the one before (Lin et al.),
            ``"conv"`` applies a 3x3 convolution of stride 2 (Lin et al. 2017, RetinaNet).
        backbone: the first by its other name.
        fpn_channels: the second by its other name.

    Raises:
        SpecError: no levels, strides that do not grow by whole factors, or a backbone that gives no features.
    """

    def __init__(
        self,
        levels: Sequence[FeatureLevel] | nn.Module | None = None,
        channels: int = 256,
        *,
        extra_levels: int = 0,
        extra: Literal["pool", "conv"] = "pool",
        backbone: nn.Module | None = None,
        fpn_channels: int | None = None,
    ) -> None:
        super().__init__()
        check_arguments(FeaturePyramid.__init__, locals())
        source: Any = levels if backbone is None else backbone
        self.channels = channels if fpn_channels is None else fpn_channels
        if extra not in ("pool", "conv"):
            raise SpecError(f"extra is {extra!r}. {nearest(str(extra), ('pool', 'conv'))}")
        if not isinstance(self.channels, int) or self.channels < 1 or extra_levels < 0:
            raise SpecError(
                f"channels={self.channels}, extra_levels={extra_levels}; expected at least 1 and at least 0."
            )
        self.backbone: nn.Module | None = source if callable(source) else None
        self.extra_levels, self._extra_kind = extra_levels, extra
        self.lateral, self.output, self.extra = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        known = _described_levels(source) if callable(source) else source
        if known is not None:
            self.make(known)

    @property
    def is_built(self) -> bool:
        """Whether the convolutions are there, which follow the channels of the levels that come in."""
        return len(self.lateral) > 0

    def make(self, levels: Sequence[FeatureLevel]) -> None:
        """Make the convolutions for the levels that come in, shallow to deep.

        Raises:
            SpecError: no levels, or strides that do not grow by whole factors.
        """
        channels = self.channels
        self.factors = _factors(levels)
        self.inputs = tuple(level.name for level in levels)
        convolved = self.extra_levels if self._extra_kind == "conv" else 0
        self.lateral.extend(nn.Conv2d(level.channels, channels, 1) for level in levels)
        self.output.extend(nn.Conv2d(channels, channels, 3, padding=1) for _ in levels)
        self.extra.extend(nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(convolved))
        _initialise(nn.ModuleList([self.lateral, self.output, self.extra]))
        self.feature_info = FeatureInfo(self._describe(levels, channels))

    def _describe(self, levels: Sequence[FeatureLevel], channels: int) -> list[FeatureLevel]:
        described: list[FeatureLevel] = []
        merged = levels[-1].receptive_field
        for level in reversed(levels):
            merged = _widest(merged, level.receptive_field)
            described.insert(0, _output_level(level.index, channels, level.stride, _grown(merged, level.stride)))
        for _ in range(self.extra_levels):
            last = described[-1]
            field = _grown(last.receptive_field, last.stride) if len(self.extra) else last.receptive_field
            described.append(_output_level(last.index + 1, channels, last.stride * 2, field))
        return described

    def forward(self, features: Any) -> Features[Tensor]:
        """Images, or ``(N, C, H/stride, W/stride)`` maps by level name, to ``(N, channels, ...)`` by ``p<k>``."""
        maps = features if self.backbone is None else self.backbone(features)
        if not isinstance(maps, Mapping):
            maps = {str(position): feature for position, feature in enumerate(maps)}
        if not self.is_built:
            if torch.compiler.is_compiling():
                raise SpecError("this feature pyramid has no convolutions yet. Run it once before it is compiled.")
            self.make(_levels_of(maps))
            self.to(next(iter(maps.values())))
        merged = [lateral(maps[name]) for lateral, name in zip(self.lateral, self.inputs, strict=True)]
        for position in range(len(merged) - 2, -1, -1):
            finer, coarser = merged[position], merged[position + 1]
            merged[position] = finer + _upsample(coarser, self.factors[position], finer)
        outputs = [output(feature) for output, feature in zip(self.output, merged, strict=True)]
        for position in range(self.extra_levels):
            last = outputs[-1]
            outputs.append(self.extra[position](last) if len(self.extra) else F.max_pool2d(last, 1, stride=2))
        return Features(zip(self.feature_info.names(), outputs, strict=True), self.feature_info.by_index())


def build_fpn(fpn_channels: int, *, extra_levels: int = 0, extra: Literal["pool", "conv"] = "pool") -> FeaturePyramid:
    """Make a feature pyramid for whatever features come in; its convolutions are made in the first call.

    Args:
        fpn_channels: of every output.
        extra_levels: as for `FeaturePyramid`.
        extra: as for `FeaturePyramid`.

    Raises:
        SpecError: channels below 1, or an unknown kind of extra levels.
    """
    return FeaturePyramid(None, fpn_channels, extra_levels=extra_levels, extra=extra)


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
        check_arguments(PathAggregation.__init__, locals())
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
    variants: ClassVar[Mapping[str, object]] = {}
    output_strides: ClassVar[tuple[int, ...]] = (8, 16, 32)
    takes_patch_size: ClassVar[bool] = True

    def __init__(self, backbone: BaseBackbone, neck: Neck) -> None:
        check_arguments(WithNeck.__init__, locals())
        backbone = described(backbone)
        if getattr(neck, "backbone", None) is not None:
            raise SpecError(f"the {type(neck).__name__} holds a backbone already. Give one of levels, or use it alone.")
        if isinstance(neck, FeaturePyramid) and not neck.is_built:
            neck.make(backbone.feature_info)
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
        """Return a backbone with a neck has no head.

        Raises:
            SpecError: always.
        """
        raise SpecError(f"{self.name} gives features only. Call its .backbone for logits.")

    def stage_modules(self) -> dict[str, tuple[nn.Module, ...]]:
        """Return the backbone's stages by the backbone's level names; the neck counts as head."""
        return self.backbone.stage_modules()

    def freeze(self, up_to: str | None) -> None:
        """As `BaseBackbone.freeze`, by the backbone's level names."""
        self.backbone.freeze(up_to)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As the backbone's."""
        self.backbone.set_grad_checkpointing(enable)
        self.grad_checkpointing = enable

    def _spec_for(self, shape: tuple[int, ...]) -> InputSpec:
        return self.input_spec if self.input_spec.sizes is not None else self.backbone._spec_for(shape)


def _described_levels(source: object) -> FeatureInfo | None:
    """Return the levels that a backbone or an engine gives; None where that shows in a call only.

    Raises:
        SpecError: it gives no features.
    """
    spec = getattr(source, "spec", None) or getattr(getattr(source, "manifest", None), "backbone", None)
    levels: FeatureInfo | None = getattr(source, "feature_info", None)
    if spec is not None and levels is not None and not spec.features_only:
        raise SpecError(f"{spec.name} gives {spec.head_name}, not feature maps. Build it with features_only=True.")
    return levels


def _levels_of(maps: Mapping[str, Tensor]) -> list[FeatureLevel]:
    """Describe maps by their sizes; their indices, where they carry none, count from 1 (stride 4)."""
    names = list(maps)
    if not names or any(not isinstance(feature, Tensor) or feature.dim() != 4 for feature in maps.values()):
        raise SpecError(f"a feature pyramid was called with {names or 'no maps'}; expected maps (N, C, H, W).")
    names.sort(key=lambda name: -maps[name].shape[2])
    indices = {name: index for index, name in maps.indices.items()} if isinstance(maps, Features) else {}
    first = indices.get(names[0], 1)
    deepest = maps[names[-1]].shape[2]
    levels = []
    for position, name in enumerate(names):
        # From the finest map's stride on, the nearest power of two: 7 rows become 4 by a stride of 2.
        ratio = 2 ** round(math.log2(maps[names[0]].shape[2] / maps[name].shape[2])) if deepest else 1
        levels.append(
            FeatureLevel(
                name=name,
                index=indices.get(name, first + position),
                channels=maps[name].shape[1],
                stride=2 ** (first + 1) * ratio,
                receptive_field=WHOLE_IMAGE,
            )
        )
    return levels


def _factors(levels: Sequence[FeatureLevel]) -> tuple[int, ...]:
    """Return how much coarser each level is than the one before it."""
    strides = [level.stride for level in levels]
    pairs = list(itertools.pairwise(strides))
    if not strides or any(not finer or coarser % finer for finer, coarser in pairs):
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
    if coarser.shape[2] < height or coarser.shape[3] < width:
        return F.interpolate(coarser, size=(height, width), mode="nearest")
    return coarser if coarser.shape[2:] == finer.shape[2:] else coarser[:, :, :height, :width]


def _output_level(index: int, channels: int, stride: int, field: int) -> FeatureLevel:
    return FeatureLevel(name=f"p{index + 1}", index=index, channels=channels, stride=stride, receptive_field=field)


def _widest(one: int, other: int) -> int:
    return WHOLE_IMAGE if WHOLE_IMAGE in (one, other) else max(one, other)


def _grown(field: int, stride: int) -> int:
    """Return the receptive field after a 3x3 convolution on values ``stride`` pixels apart."""
    return field if field == WHOLE_IMAGE else field + 2 * stride


def _initialise(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_uniform_(part.weight, a=1)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
