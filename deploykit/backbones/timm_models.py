"""Build any timm model as a backbone, by the name ``timm/<name>``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from deploykit.backbones.base import BackboneOptions, BaseBackbone, PretrainedSource
from deploykit.backbones.features import levels_by_stride
from deploykit.backbones.fit import fit_state, settle_channels, settle_classes, warn_of_rest
from deploykit.backbones.registry import describe, open_options
from deploykit.backbones.request import BackboneRequest, Pretrained
from deploykit.backbones.timm_layout import adapt_as_timm, timm_layout
from deploykit.backbones.timm_protocols import LevelInfo, TimmConfig, TimmModule, TimmPackage, pretrained_config
from deploykit.backbones.weights import is_path, open_weights, record_weights, resolve_source
from deploykit.errors import SpecError, WeightsError, nearest
from deploykit.labels import class_labels
from deploykit.optional import require
from deploykit.spec import InputSpec, Preprocessing
from deploykit.unset import UNSET

PREFIX = "timm/"


class TimmBackbone(BaseBackbone):
    """A model of timm behind deploykit's interface; ``model`` is timm's module, with timm's parameter names.

    A level is what timm's ``features_only`` gives: in a pyramid its index follows its stride, in an
    isotropic model it is the block's number, and by default the last three blocks are returned.
    Receptive fields are not computed: every level says 0.
    """

    family: ClassVar[str] = "timm"
    variants: ClassVar[Mapping[str, object]] = {}
    output_strides: ClassVar[tuple[int, ...]] = (8, 16, 32)
    takes_patch_size: ClassVar[bool] = True

    def __init__(self, name: str, options: BackboneOptions, model: nn.Module, source: PretrainedSource) -> None:
        infos = _feature_infos(model)
        isotropic = len({info["reduction"] for info in infos}) == 1 and len(infos) > 1
        if isotropic and options.output_indices is None:
            options = replace(options, output_indices=tuple(range(len(infos)))[-3:])
        super().__init__(name, options)
        self.model = model
        self._modules_by_level = [str(info["module"]) for info in infos]
        strides, channels = [int(info["reduction"]) for info in infos], [int(info["num_chs"]) for info in infos]
        self._first = 0 if isotropic else sum(stride < 2 for stride in strides)
        self.finish(levels_by_stride(strides[self._first :], channels[self._first :]), pretrained=source)

    @property
    def _timm(self) -> TimmModule:
        """The model, by the methods that every model of timm has."""
        return cast("TimmModule", self.model)

    def forward(self, images: Tensor) -> Any:
        """See `BaseBackbone`."""
        if self.spec.features_only:
            return super().forward(images)
        return self.model(images)

    def forward_levels(self, images: Tensor, depth: int) -> tuple[list[Tensor], Tensor]:
        """See `BaseBackbone.forward_levels`; the state is that of timm's ``forward_features``."""
        model = self._timm
        if depth == 0:
            return [], model.forward_features(images)
        indices = list(range(self._first, self._first + depth))
        if depth < len(self.all_levels) or self.spec.features_only:
            only = model.forward_intermediates(
                images, indices=indices, stop_early=True, intermediates_only=True, output_fmt="NCHW"
            )
            return list(only), only[-1]
        trunk, maps = model.forward_intermediates(images, indices=indices, output_fmt="NCHW")
        return list(maps), trunk

    def forward_head(self, trunk: Tensor) -> Tensor:
        """See `BaseBackbone.forward_head`."""
        model = self._timm
        return model.forward_head(trunk)

    def stage_modules(self) -> dict[str, tuple[nn.Module, ...]]:
        """See `BaseBackbone.stage_modules`: timm's modules up to and including the one that gives the level."""
        ends = self._modules_by_level[self._first :]
        stages: dict[str, list[nn.Module]] = {level.name: [] for level in self.all_levels}
        pieces = _pieces(self.model, "", self._modules_by_level)
        names = [path for path, _ in pieces]
        start = 0
        for level, end in zip(self.all_levels, ends, strict=True):
            if end not in names:
                raise SpecError(
                    f"timm does not say which modules of {self.name} make the level {level.name!r} "
                    f"(it names {end!r}). Freeze parameters of backbone.model by hand."
                )
            stop = names.index(end) + 1
            stages[level.name] = [module for _, module in pieces[start:stop]]
            start = max(start, stop)
        return {name: tuple(modules) for name, modules in stages.items()}

    def freeze(self, up_to: str | None) -> None:
        """As `BaseBackbone.freeze`; parameters of the model itself (class token, positions) go with the first level."""
        super().freeze(up_to)
        for parameter in self.model.parameters(recurse=False):
            parameter.requires_grad_(up_to is None)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `BaseBackbone.set_grad_checkpointing`, by timm's own.

        Raises:
            SpecError: the model has none.
        """
        model = self._timm
        try:
            model.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError, NotImplementedError) as error:
            raise SpecError(f"{self.name} has no gradient checkpointing in timm ({error}). Leave it off.") from error
        self.grad_checkpointing = enable

    def _spec_for(self, shape: tuple[int, ...]) -> InputSpec:
        config: Mapping[str, object] = getattr(self.model, "pretrained_cfg", None) or {}
        return self.input_spec if config.get("fixed_input_size") else super()._spec_for(shape)


def build_timm(name: str, options: BackboneOptions, pretrained: Pretrained = False) -> BaseBackbone:
    """Build a timm model in eval mode, with the options of `BackboneOptions` as they are.

    Raises:
        DeployKitError: as `build_requested_timm`.
    """
    asked = {field.name: getattr(options, field.name) for field in fields(options) if field.name != "architecture"}
    return build_requested_timm(name, BackboneRequest(**asked, pretrained=pretrained))


def build_requested_timm(name: str, request: BackboneRequest) -> BaseBackbone:
    """Build a timm model in eval mode.

    Args:
        name: timm's name, with or without ``timm/`` before it, with or without ``.<tag>``.
        request: as for deploykit's own; ``hierarchical`` is refused. True or a tag as ``pretrained`` is left to
            timm, a checkpoint file is read as for deploykit's own.

    Raises:
        MissingDependency: timm is not installed.
        SpecError: timm has no such model, or it refuses the options.
        WeightsError: timm cannot get the weights, or they do not fit what was asked for.
    """
    timm = require("timm")
    own = name.removeprefix(PREFIX)
    base = own.partition(".")[0]
    if not timm.is_model(base):
        raise SpecError(f"timm {timm.__version__} has no model {own!r}. {nearest(base, timm.list_models())}")
    if request.hierarchical:
        raise SpecError(
            f"{PREFIX}{own} was given hierarchical={request.hierarchical!r}, which only deploykit's own plain ViTs "
            "have. Leave it out, or choose a name like vit_small_patch16_224."
        )
    source = request.pretrained
    if isinstance(source, Path) or (isinstance(source, str) and is_path(source)):
        backbone = _from_file(timm, own, request, Path(source))
    else:
        backbone = _from_timm(timm, own, request)
    describe(backbone, request)
    return backbone.eval()


def _from_timm(timm: TimmPackage, own: str, request: BackboneRequest) -> BaseBackbone:
    """Return a model with timm's own weights, or random ones."""
    base, pretrained = own.partition(".")[0], request.pretrained
    model_name = f"{base}.{pretrained}" if isinstance(pretrained, str) else own
    config = _config(timm, model_name, str(pretrained or own))
    options = open_options(request)
    if pretrained:
        has = int(getattr(config, "num_classes", 0) or 0)
        if request.num_classes is UNSET and not request.new_head:
            options = replace(options, num_classes=has)
        elif options.num_classes not in (0, has) and not request.new_head:
            raise WeightsError(
                f"timm's weights {model_name} have {has} classes, and num_classes={options.num_classes} was asked for. "
                "Fix: leave num_classes out, which takes theirs; or new_head=True draws a new classifier."
            )
    fixed = bool(config and config.fixed_input_size)
    model = _create(timm, _timm_arguments(model_name, options), bool(pretrained), fixed)
    published = _source(timm, model)
    backbone = TimmBackbone(f"{PREFIX}{own}", options, model, published)
    if pretrained:
        label_set = published.label_set if options.num_classes == 1000 and not request.new_head else None
        backbone.spec = replace(backbone.spec, weights=published.tag or "default", label_set=label_set)
        backbone.labels = class_labels(label_set)
    return backbone


def _from_file(timm: TimmPackage, own: str, request: BackboneRequest, path: Path) -> BaseBackbone:
    """Return a model with the weights of a checkpoint file."""
    resolved = resolve_source(own, path)
    if resolved is None:
        raise WeightsError(f"there is no file {path}; expected a checkpoint. Check the path.")
    config = _config(timm, own, own)
    fixed = bool(config and config.fixed_input_size)
    options = open_options(request)
    sized = replace(options, num_classes=int(getattr(config, "num_classes", 0) or 1000))
    first = _create(timm, _timm_arguments(own, sized, with_head=True), False, fixed)
    layout = timm_layout(first)
    opened = open_weights(resolved, own, layout, request.checkpoint_key)
    options = replace(
        options,
        num_classes=settle_classes(request, opened.found, layout, opened.tag),
        in_channels=settle_channels(request, opened.found, layout, opened.tag),
        image_size=request.image_size or opened.config.image_size or layout.image_size_in(opened.found.tensors),
    )
    model = _create(timm, _timm_arguments(own, options), False, fixed)
    classes = 0 if options.features_only else options.num_classes
    state = fit_state(
        model,
        opened.found,
        layout,
        options=replace(options, num_classes=classes),
        adapt=partial(adapt_as_timm, model),
        names=(opened.tag, f"{PREFIX}{own}"),
        new_head=request.new_head and classes > 0,
    )
    model.load_state_dict(state, strict=True)
    warn_of_rest(opened.found, opened.tag)
    backbone = TimmBackbone(f"{PREFIX}{own}", options, model, _source(timm, model))
    record_weights(backbone, opened, new_head=request.new_head)
    return backbone


def _config(timm: TimmPackage, model_name: str, asked: str) -> TimmConfig | None:
    """Return what timm knows of the weights of a model.

    Raises:
        SpecError: no weights of that tag.
    """
    try:
        return timm.get_pretrained_cfg(model_name)
    except RuntimeError as error:
        base = model_name.partition(".")[0]
        tags = [tag.partition(".")[2] for tag in timm.list_pretrained(f"{base}.*")]
        raise SpecError(f"timm's {base} has no weights {model_name!r}. {nearest(asked, tags)}") from error


def _timm_arguments(name: str, options: BackboneOptions, *, with_head: bool = False) -> dict[str, object]:
    arguments: dict[str, object] = {"in_chans": options.in_channels}
    arguments["num_classes"] = 0 if options.features_only and not with_head else options.num_classes
    if options.output_stride != 32:
        arguments["output_stride"] = options.output_stride
    if options.patch_size is not None:
        arguments["patch_size"] = options.patch_size
    if options.image_size is not None:
        arguments["img_size"] = options.image_size
    return {"model_name": name, **arguments}


def _create(timm: TimmPackage, arguments: dict[str, object], pretrained: bool, fixed_size: bool) -> nn.Module:
    if not fixed_size:
        # Models of any size mostly have no such parameter.
        arguments = {key: value for key, value in arguments.items() if key != "img_size"}
    name = arguments["model_name"]
    try:
        model = timm.create_model(**arguments, pretrained=pretrained)
    except Exception as error:  # timm, the hub's client and its HTTP library raise what they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if pretrained and _builds(timm, arguments):
            raise WeightsError(
                f"timm cannot get the weights of {name}: {reason}. Pass a checkpoint file as pretrained=, or fill "
                "the model hub's cache on a machine that reaches the hub."
            ) from error
        options = ", ".join(f"{key}={value!r}" for key, value in arguments.items() if key != "model_name")
        raise SpecError(f"timm cannot build {name} with {options}: {reason}. Leave out the option it names.") from error
    return model


def _builds(timm: TimmPackage, arguments: dict[str, object]) -> bool:
    """Return whether the model itself can be built, so that only its weights fail."""
    try:
        timm.create_model(**arguments, pretrained=False)
    except Exception:  # as above: any failure is the answer
        return False
    return True


def _source(timm: TimmPackage, model: nn.Module) -> PretrainedSource:
    """Return what timm says of the weights: their preprocessing, size and classes."""
    data = timm.data.resolve_model_data_config(model)
    config = pretrained_config(model)
    known = config.get("num_classes")
    classes = known if isinstance(known, int) else 0
    return PretrainedSource(
        tag=str(config.get("tag") or ""),
        preprocessing=Preprocessing(
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            interpolation=data["interpolation"],
            crop_pct=data["crop_pct"],
            crop_mode=data["crop_mode"],
        ),
        image_size=(data["input_size"][1], data["input_size"][2]),
        num_classes=classes,
        label_set="imagenet-1k" if classes == 1000 and "in1k" in str(config.get("tag")) else None,
    )


def _feature_infos(model: nn.Module) -> list[LevelInfo]:
    """Return the ``feature_info`` of timm as dicts; empty where the model cannot give intermediate maps."""
    if not hasattr(model, "forward_intermediates"):
        return []
    info: Iterable[LevelInfo] = getattr(model, "feature_info", ())
    levels: Iterable[LevelInfo] = getattr(info, "info", info)
    return [level.copy() for level in levels]


def _pieces(module: nn.Module, path: str, ends: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Return the modules below ``module`` in order, taken apart only where a level ends inside one."""
    pieces: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        own = f"{path}.{name}" if path else name
        inside = any(end.startswith(f"{own}.") for end in ends)
        pieces += _pieces(child, own, ends) if inside else [(own, child)]
    return pieces
