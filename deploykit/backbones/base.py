"""BaseBackbone: what every family is, and what a user subclasses.

A family gives its table of variants, builds timm's parameter names in ``__init__``, and implements
three methods: `forward_levels`, `forward_head` and `stage_modules`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, count
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deploykit.backbones.feature_tree import register_features
from deploykit.backbones.kept_statistics import KeptStatistics
from deploykit.backbones.module_copy import copy_module, detached
from deploykit.backbones.own_forward import to_numpy, to_tensor, with_indices
from deploykit.backends.input_checks import check_has_values, check_images
from deploykit.errors import SpecError, nearest
from deploykit.feature_dict import Features
from deploykit.predict import Prediction, predict
from deploykit.spec import (
    BackboneSpec,
    BatchRange,
    FeatureInfo,
    FeatureLevel,
    Fp32,
    InputSpec,
    Precision,
    Preprocessing,
)

if TYPE_CHECKING:
    from deploykit.images.preprocess import SomeImages

Backbone = TypeVar("Backbone", bound="BaseBackbone")

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

PYRAMIDS = ("resample", "simple_feature_pyramid")
"""How a plain ViT makes levels of stride 4, 8, 16, 32: without parameters, or ViTDet's module."""


@dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """The options of `create_backbone` that shape a torch module; ``image_size`` is (height, width).

    ``hierarchical`` is True or one of `PYRAMIDS`; True means ``"resample"``. ``architecture`` holds
    the fields of the variant's dataclass that the weights to be loaded were trained with otherwise.
    """

    features_only: bool = False
    output_indices: tuple[int, ...] | None = None
    output_stride: int = 32
    num_classes: int = 1000
    in_channels: int = 3
    image_size: tuple[int, int] | None = None
    patch_size: int | None = None
    hierarchical: bool | str = False
    architecture: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        if self.output_stride not in (8, 16, 32):
            raise SpecError(f"output_stride is {self.output_stride}; it must be 8, 16 or 32.")
        if self.num_classes < 0:
            raise SpecError(f"num_classes is {self.num_classes}; it must be 0 (embedding) or more.")
        if self.in_channels < 1:
            raise SpecError(f"in_channels is {self.in_channels}; it must be at least 1.")
        if self.patch_size is not None and self.patch_size < 1:
            raise SpecError(f"patch_size is {self.patch_size}; it must be at least 1.")
        if not isinstance(self.hierarchical, bool) and self.hierarchical not in PYRAMIDS:
            raise SpecError(f"hierarchical is {self.hierarchical!r}; it must be True, False or one of {PYRAMIDS}.")


@dataclass(frozen=True, kw_only=True)
class PretrainedSource:
    """Where the default weights of a variant come from: timm's repository on the model hub.

    ``tag`` is timm's name of the training recipe; the repository is ``timm/<variant>.<tag>``.
    """

    tag: str
    preprocessing: Preprocessing = Preprocessing()
    image_size: tuple[int, int] = (224, 224)
    num_classes: int = 1000
    label_set: str | None = "imagenet-1k"


class BaseBackbone(nn.Module):
    """A vision backbone in torch, with the interface that every runtime has.

    ``model(images)`` takes ``(N, C, H, W)`` float32, normalised as
    ``input_spec.preprocessing`` says. With ``features_only`` it returns `Features`, a dict from level name to
    ``(N, C, H/stride, W/stride)`` that takes a level's index too, shallow to deep; otherwise
    ``(N, num_classes)`` logits, or the pooled ``(N, D)`` embedding when ``num_classes=0``. NumPy in gives NumPy
    out, without autograd.

    To make a backbone of your own: subclass, call ``super().__init__()`` and ``self.build_backbone(config)``, and
    define ``forward``, which returns a dict of maps, a list of them, or logits. `create_backbone` takes it, and finds
    its levels by running it once.

    To make a family of your own, whose variants are built by name: fill ``variants`` (name to a dataclass that has a
    ``pretrained: PretrainedSource | None``), take ``(name, options)``, define `forward_levels`, `forward_head` and
    `stage_modules` instead of ``forward``, and decorate with `deploykit.backbones.registry.register_backbone`.
    """

    family: ClassVar[str] = "custom"
    variants: ClassVar[Mapping[str, object]] = {}
    output_strides: ClassVar[tuple[int, ...]] = (32,)
    """The values of ``output_stride`` that the family can make."""
    why_not_output_stride: ClassVar[str] = "its stages cannot be dilated"
    architecture_fields: ClassVar[tuple[str, ...]] = ()
    """The fields of a variant that ``options.architecture`` may replace."""
    fixed_size: ClassVar[bool] = False
    """Whether a built module takes one image size only (absolute position embeddings, windows)."""
    size_factor: ClassVar[int] = 1
    """By how many pixels of its deepest map the sides of images in a range of sizes may differ."""
    untrained_prefixes: ClassVar[tuple[str, ...]] = ()
    """How the names of parameters begin that checkpoints of the variant lack, and that start random."""
    takes_patch_size: ClassVar[bool] = False
    """Whether ``patch_size`` and ``hierarchical`` mean something in the family (a plain ViT)."""
    runtime: ClassVar[str] = "torch"

    spec: BackboneSpec
    input_spec: InputSpec
    feature_info: FeatureInfo
    precision: Precision
    labels: tuple[str, ...] | None = None
    """The class names in the order of the logits; None where nobody has said them."""
    guesses_preprocessing: bool = False
    """Whether ``input_spec.preprocessing`` is the variant's, with weights of the user's own that say nothing of it."""

    def __init__(self, name: str | None = None, options: BackboneOptions | None = None) -> None:
        super().__init__()
        name, options = name or type(self).__name__.lower(), options or BackboneOptions()
        if options.output_stride not in self.output_strides:
            raise SpecError(
                f"{name} cannot make output_stride={options.output_stride}: {self.why_not_output_stride}. "
                f"It has {', '.join(map(str, self.output_strides))}."
            )
        if not self.takes_patch_size and (options.patch_size is not None or options.hierarchical):
            raise SpecError(
                f"{name} was given patch_size={options.patch_size}, hierarchical={options.hierarchical!r}: "
                "only a plain ViT has these options. Leave them out, or choose a name like vit_small_patch16_224."
            )
        if unknown := [field for field, _ in options.architecture if field not in self.architecture_fields]:
            raise SpecError(
                f"the weights for {name} ask for another {', '.join(unknown)}; of its architecture "
                f"{', '.join(self.architecture_fields) or 'nothing'} can be replaced. Use other weights."
            )
        self.name = name
        self.options = options
        self.precision = Fp32()
        self.grad_checkpointing = False
        self._frozen_stages: tuple[str, ...] = ()

    def build_backbone(self, config: object) -> None:
        """Make the modules of a backbone of your own; a subclass defines it, and calls it in ``__init__``.

        Raises:
            SpecError: the subclass has none.
        """
        raise SpecError(
            f"{type(self).__name__} has no build_backbone(config). Define it, and make the modules there; or build one "
            "by name with create_backbone."
        )

    @property
    def is_described(self) -> bool:
        """Whether the levels and the input are known; not so where `forward` alone was defined (see `wrap_module`)."""
        return "spec" in self.__dict__

    def finish(self, levels: Sequence[FeatureLevel], *, pretrained: PretrainedSource | None) -> None:
        """Record the levels that the family has; a subclass calls it at the end of ``__init__``.

        Raises:
            SpecError: an output index that the family lacks.
        """
        source = pretrained or PretrainedSource(tag="", label_set=None)
        options = self.options
        self.all_levels = tuple(levels)
        self.feature_info = FeatureInfo(self._select_levels(options.output_indices))
        size = options.image_size or source.image_size
        self.spec = BackboneSpec(
            name=self.name,
            family=self.family,
            levels=tuple(self.feature_info),
            features_only=options.features_only,
            output_stride=options.output_stride,
            num_classes=options.num_classes,
            in_channels=options.in_channels,
            image_size=size,
            patch_size=options.patch_size,
            hierarchical=options.hierarchical,
        )
        self.set_preprocessing(source.preprocessing)

    def set_preprocessing(self, preprocessing: Preprocessing) -> None:
        """State how images become inputs; weights bring their own. Other channel counts use mean 0.5."""
        channels, (height, width) = self.spec.in_channels, self.spec.image_size
        if len(preprocessing.mean) != channels:
            preprocessing = replace(preprocessing, mean=(0.5,) * channels, std=(0.5,) * channels)
        names = {level.name for level in self.all_levels}
        candidates = chain([InputSpec.name], map("input_{}".format, count()))
        self.input_spec = InputSpec(
            # A name in a graph stands for one tensor, and a user's level may have the input's.
            name=next(name for name in candidates if name not in names),
            batch=BatchRange(max=2**31 - 1),
            channels=channels,
            height=height,
            width=width,
            preprocessing=preprocessing,
        )

    @abstractmethod
    def forward_levels(self, images: Tensor, depth: int) -> tuple[list[Tensor], Tensor]:
        """Run until the first ``depth`` of ``all_levels`` are there.

        Returns:
            Their maps, ``(N, C, H/stride, W/stride)`` each, shallow to deep; and the state that
            `forward_head` takes, which is meant only when ``depth`` is the number of all levels.
        """

    @abstractmethod
    def forward_head(self, trunk: Tensor) -> Tensor:
        """Return the state after the last level to ``(N, num_classes)`` logits or the ``(N, D)`` embedding."""

    @abstractmethod
    def stage_modules(self) -> dict[str, tuple[nn.Module, ...]]:
        """Return the modules by level name, in the order in which they run; parameters outside count as head."""

    def forward(self, images: Tensor) -> Any:
        """See the class; `__call__` also checks the images and takes NumPy."""
        if self.spec.features_only:
            maps, _ = self.forward_levels(images, self._depth())
            by_name = {level.name: feature for level, feature in zip(self.all_levels, maps, strict=False)}
            return Features(
                {level.name: by_name[level.name] for level in self.feature_info}, self.feature_info.by_index()
            )
        _, trunk = self.forward_levels(images, len(self.all_levels))
        return self.forward_head(trunk)

    def forward_everything(self, images: Tensor) -> dict[str, Tensor]:
        """Return every selected level and the head's output by name: what parity compares.

        With ``features_only`` the head is left out and the trunk stops at the deepest level.
        """
        if self.spec.features_only:
            features: dict[str, Tensor] = self.forward(images)
            return features
        maps, trunk = self.forward_levels(images, len(self.all_levels))
        outputs = {level.name: feature for level, feature in zip(self.all_levels, maps, strict=True)}
        chosen = {level.name: outputs[level.name] for level in self.feature_info}
        return {**chosen, self.spec.head_name: self.forward_head(trunk)}

    def __call__(self, images: Any, *args: object, **kwargs: object) -> Any:
        """Check the images, run, and answer in the caller's kind of array.

        Raises:
            SpecError: wrong type, rank, channels, size or dtype, or NaN or infinity in the images.
        """
        if not self.is_described:
            return self._run_own_forward(images, *args, **kwargs)
        if torch.compiler.is_compiling() or isinstance(images, torch.fx.Proxy):
            return super().__call__(images, *args, **kwargs)
        if isinstance(images, np.ndarray):
            with torch.inference_mode():
                # A copy: torch warns at memory that it may not write, and a module may write into its input.
                checked = torch.tensor(check_images(images, self._spec_for(images.shape)))
                return to_numpy(self(checked.to(computes_in(self).device)))
        self._check_tensor(images)
        dtype = computes_in(self).dtype
        outputs = super().__call__(images.to(dtype), *args, **kwargs)
        return outputs if dtype == torch.float32 else _to_float(outputs)

    def _run_own_forward(self, images: Any, *args: object, **kwargs: object) -> Any:
        """Run the ``forward`` of a subclass that defines nothing else."""
        if type(self).forward is BaseBackbone.forward:
            raise SpecError(f"{self.name} defines no forward(images). Define it, or call self.finish(levels).")
        if isinstance(images, Tensor):
            return with_indices(super().__call__(images, *args, **kwargs), images)
        anchor = computes_in(self)
        with torch.inference_mode():
            return to_numpy(self(to_tensor(images, anchor.device).to(anchor.dtype), *args, **kwargs))

    def predict(self, image: SomeImages, top: int = 5) -> list[Prediction] | list[list[Prediction]]:
        """Name the most probable classes of one image, or of each in a list; see `deploykit.predict.predict`."""
        if not self.is_described:
            raise SpecError(f"the input and the classes of {self.name} are not known yet. Fix: create_backbone(model).")
        return predict(self, self.spec, image, top)

    @property
    def device(self) -> str:
        """Where the parameters are: ``"cpu"``, ``"cuda:0"``."""
        return str(computes_in(self).device)

    def placed(self: Backbone, dtype: torch.dtype, device: torch.device | None = None) -> Backbone:
        """Return itself where it computes in a dtype and on a device (None: any); otherwise a copy that does."""
        now = computes_in(self)
        if dtype == now.dtype and device in (None, now.device):
            return self
        copied = copy_module(self, detached(dtype, device))
        assert isinstance(copied, type(self))  # noqa: S101  (a copy has its original's type)
        return copied

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint of the variant as it fits this module's options; called before a strict load.

        A family overrides it where a weight's shape follows the image or patch size.
        """
        return state

    def image_size_in(self, state: Mapping[str, Tensor]) -> tuple[int, int] | None:
        """Return the (height, width) in pixels that a checkpoint was trained at, where its shapes tell; else None.

        A family overrides it where a weight's shape follows the image size.
        """
        return None

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: recompute each stage in the backward pass (Chen et al. 2016).

        Gradients and running statistics are those of training without it.
        """
        self.grad_checkpointing = enable

    def run_stage(self, stage: nn.Module, features: Tensor) -> Tensor:
        """Run one stage, or one block of it, checkpointed when that was asked for in training."""
        output: Tensor
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
            output = stage(features)
        elif torch.compiler.is_compiling():  # the compiler refuses contexts, and leaves statistics alone itself
            output = checkpoint(stage, features, use_reentrant=False)
        else:
            contexts = (nullcontext(), KeptStatistics(stage))
            output = checkpoint(stage, features, use_reentrant=False, context_fn=lambda: contexts)
        return output

    def freeze(self, up_to: str | None) -> None:
        """Freeze the stages from the input up to and including a level; None thaws all.

        Frozen stages get no gradients and stay in eval mode, so their BatchNorm statistics stand.

        Raises:
            SpecError: no level of that name.
        """
        stages = self.stage_modules()
        if up_to is not None and up_to not in stages:
            raise SpecError(f"{self.name} has no level {up_to!r} to freeze up to. {nearest(up_to, stages)}")
        names = list(stages)
        self._frozen_stages = tuple(names[: names.index(up_to) + 1]) if up_to is not None else ()
        for name, modules in stages.items():
            for module in modules:
                module.requires_grad_(name not in self._frozen_stages)
        self.train(self.training)

    def train(self: Backbone, mode: bool = True) -> Backbone:
        """As torch's, but frozen stages stay in eval mode."""
        super().train(mode)
        if self._frozen_stages:
            stages = self.stage_modules()
            for name in self._frozen_stages:
                for module in stages[name]:
                    module.eval()
        return self

    def close(self) -> None:
        """Nothing to give back: a torch module is freed with its last reference."""

    def __enter__(self: Backbone) -> Backbone:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _depth(self) -> int:
        names = {level.name for level in self.feature_info}
        return max(position for position, level in enumerate(self.all_levels, 1) if level.name in names)

    def _select_levels(self, indices: tuple[int, ...] | None) -> tuple[FeatureLevel, ...]:
        if indices is None:
            return self.all_levels
        have = {level.index: level for level in self.all_levels}
        absent = [index for index in indices if index not in have]
        if absent or not indices:
            levels = ", ".join(f"{level.index} ({level.name}, stride {level.stride})" for level in self.all_levels)
            has = f"It has {levels}." if levels else "It gives no feature maps. Fix: leave output_indices out."
            raise SpecError(f"{self.name} has no levels {absent or list(indices)}. {has}")
        return tuple(have[index] for index in sorted(set(indices)))

    def _spec_for(self, shape: tuple[int, ...]) -> InputSpec:
        """Return the input spec with the size of these images, where the family takes any size."""
        fixed = self.fixed_size or self.input_spec.sizes is not None
        if fixed or len(shape) != 4 or shape[1] != self.input_spec.channels:
            return self.input_spec
        return replace(self.input_spec, height=shape[2], width=shape[3])

    def _check_tensor(self, images: object) -> None:
        if not isinstance(images, Tensor):
            raise SpecError(
                f"the images are a {type(images).__name__}; expected a numpy.ndarray or a torch.Tensor. "
                "Files are read with deploykit.load_images(files, model.input_spec)."
            )
        check_has_values(images)
        spec = self._spec_for(tuple(images.shape))
        here = computes_in(self).device
        if images.device != here:
            raise SpecError(f"the images are on {images.device}, and the model is on {here}. Fix: images.to('{here}').")
        if images.device.type == "cpu" and images.dtype == torch.float32:
            check_images(images.detach().resolve_neg().numpy(), spec)
        elif images.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not spec.accepts_size(images.shape):
            raise SpecError(
                f"the images are {tuple(images.shape)} {images.dtype}; "
                f"expected {spec.shape} torch.float32 {spec.layout}."
            )


def computes_in(module: nn.Module) -> Tensor:
    """The tensor whose dtype and device a module computes in: its first parameter, or buffer, in floating point."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor for tensor in tensors if tensor.dtype in FLOATS), torch.zeros(()))


def _to_float(outputs: Tensor | Features[Tensor]) -> Tensor | Features[Tensor]:
    if isinstance(outputs, Features):
        return outputs.map(Tensor.float)
    return outputs.float()


register_features()
