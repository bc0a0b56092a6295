"""The options that say which backbone a command takes: one definition, which every such command shares."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from deploykit.backbones.checkpoint_names import SUFFIXES, is_checkpoint_name
from deploykit.errors import SpecError
from deploykit.spec import CropMode, Interpolation, Size, SizeRange, parse_image_size

_PANEL = "Backbone"
_OWN_WEIGHTS = "Weights of your own"


def option(*names: str, panel: str, help: str, metavar: str | None = None, default: str | None = None) -> Any:
    """Return an option in a panel of the help; ``default`` says what stands where it is not given."""
    return typer.Option(
        *names, rich_help_panel=panel, help=help, metavar=metavar, show_default=default if default else True
    )


NameArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME_OR_WEIGHTS",
        help="A backbone that `deploykit list` shows, timm/NAME, or a checkpoint file (then mostly with --backbone).",
    ),
]
BackboneOption = Annotated[
    str | None,
    option(
        "--backbone",
        panel=_PANEL,
        metavar="NAME",
        default="as the file says",
        help="Whose weights a checkpoint file holds.",
    ),
]
PretrainedFlag = Annotated[
    bool, option("--pretrained", panel=_PANEL, help="Load the default weights instead of random ones.")
]
WeightsOption = Annotated[
    str | None,
    option("--weights", panel=_PANEL, metavar="FILE|TAG", help="Load a checkpoint file, or a hub tag."),
]
FeaturesFlag = Annotated[
    bool, option("--features-only", panel=_PANEL, help="Return feature maps by level instead of logits.")
]
IndicesOption = Annotated[
    str | None,
    option(
        "--output-indices",
        panel=_PANEL,
        metavar="I,J,...",
        default="all levels",
        help="Which levels: index i has stride 2**(i+1) pixels, so 2,3,4 is strides 8, 16, 32.",
    ),
]
StrideOption = Annotated[
    int | None,
    option(
        "--output-stride", panel=_PANEL, metavar="8|16|32", default="32", help="Stride of the last level, in pixels."
    ),
]
ClassesOption = Annotated[
    int | None,
    option(
        "--num-classes",
        panel=_PANEL,
        default="those of the weights, else 1000",
        help="Outputs of the classifier; 0 for the pooled embedding.",
    ),
]
ChannelsOption = Annotated[
    int | None,
    option("--in-channels", panel=_PANEL, default="those of the weights, else 3", help="Channels of the images."),
]
SizeOption = Annotated[
    str | None,
    option(
        "--image-size",
        panel=_PANEL,
        metavar="S|HxW|MIN,OPT,MAX",
        default="the size of the weights",
        help="In pixels: 224, or height x width as 256x320; or three of them, for an engine that takes a range.",
    ),
]
PatchOption = Annotated[
    int | None,
    option("--patch-size", panel=_PANEL, default="the variant's", help="Another patch for a plain ViT, in pixels."),
]
HierarchicalFlag = Annotated[
    bool,
    option("--hierarchical", panel=_PANEL, help="Feature maps of strides 4 to 32 from a plain ViT."),
]
KeyOption = Annotated[
    str | None,
    option(
        "--checkpoint-key",
        panel=_OWN_WEIGHTS,
        metavar="KEY",
        default="averaged weights first",
        help="Which of several state dicts in the file: state_dict_ema, model.",
    ),
]
NewHeadFlag = Annotated[
    bool,
    option(
        "--new-head",
        panel=_OWN_WEIGHTS,
        help="Draw a new classifier for --num-classes, untrained.",
    ),
]
LabelsOption = Annotated[
    str | None,
    option(
        "--labels",
        panel=_OWN_WEIGHTS,
        metavar="FILE",
        default="as the weights say, else the class folders of --calibration",
        help="Class names in the order of the classes: one a line, or a JSON list or object.",
    ),
]
MeanOption = Annotated[
    str | None,
    option(
        "--mean",
        panel=_OWN_WEIGHTS,
        metavar="M|M,M,M",
        default="as the weights say",
        help="Mean of each channel that training subtracted, of pixels from 0 to 1.",
    ),
]
StdOption = Annotated[
    str | None,
    option(
        "--std",
        panel=_OWN_WEIGHTS,
        metavar="S|S,S,S",
        default="as the weights say",
        help="Standard deviation of each channel that training divided by.",
    ),
]
InterpolationOption = Annotated[
    str | None,
    option(
        "--interpolation",
        panel=_OWN_WEIGHTS,
        metavar="|".join(get_args(Interpolation)),
        default="as the weights say",
        help="How photographs are resized.",
    ),
]
CropPctOption = Annotated[
    float | None,
    option(
        "--crop-pct",
        panel=_OWN_WEIGHTS,
        metavar="SHARE",
        default="as the weights say",
        help="Side of the crop over the side of the resized photograph, 0 to 1.",
    ),
]
CropModeOption = Annotated[
    str | None,
    option(
        "--crop-mode",
        panel=_OWN_WEIGHTS,
        metavar="|".join(get_args(CropMode)),
        default="as the weights say",
        help="Cut the middle, squash the whole photograph, or fill a border.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class BackboneChoice:
    """Which backbone the user asked for: its name, and the options of `create_backbone` that were given."""

    name: str
    options: dict[str, Any]


def chosen_backbone(
    name: NameArgument,
    *,
    backbone: BackboneOption = None,
    pretrained: PretrainedFlag = False,
    weights: WeightsOption = None,
    features_only: FeaturesFlag = False,
    output_indices: IndicesOption = None,
    output_stride: StrideOption = None,
    num_classes: ClassesOption = None,
    in_channels: ChannelsOption = None,
    image_size: SizeOption = None,
    patch_size: PatchOption = None,
    hierarchical: HierarchicalFlag = False,
    checkpoint_key: KeyOption = None,
    new_head: NewHeadFlag = False,
    labels: LabelsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    crop_pct: CropPctOption = None,
    crop_mode: CropModeOption = None,
) -> BackboneChoice:
    """Turn the command's words into what `create_backbone` takes.

    Raises:
        SpecError: a word that cannot be, or options that exclude each other.
    """
    chosen, source = choose_weights(name, backbone=backbone, pretrained=pretrained, weights=weights)
    preprocessing = preprocessing_of(
        mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode
    )
    options = given(
        pretrained=source,
        features_only=features_only or None,
        output_indices=None if output_indices is None else integers_of(output_indices, "--output-indices"),
        output_stride=output_stride,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size_of(image_size),
        patch_size=patch_size,
        hierarchical=hierarchical or None,
        checkpoint_key=checkpoint_key,
        new_head=new_head or None,
        labels=labels,
        preprocessing=preprocessing,
    )
    return BackboneChoice(name=chosen, options=options)


def preprocessing_of(
    *,
    mean: str | None,
    std: str | None,
    interpolation: str | None,
    crop_pct: float | None,
    crop_mode: str | None,
) -> dict[str, Any] | None:
    """Return the fields of `deploykit.spec.Preprocessing` that were given; None: none was."""
    return (
        given(
            mean=None if mean is None else numbers_of(mean, "--mean"),
            std=None if std is None else numbers_of(std, "--std"),
            interpolation=interpolation,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
        )
        or None
    )


def takes_backbone(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the parameters of `chosen_backbone` in place of its first, a `BackboneChoice`."""
    shared = inspect.signature(chosen_backbone, eval_str=True).parameters
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [*shared.values(), *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own)]

    @functools.wraps(command)
    def run(**words: Any) -> None:
        chosen = chosen_backbone(**{name: words.pop(name) for name in shared})
        command(chosen, **words)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def choose_weights(name: str, *, backbone: str | None, pretrained: bool, weights: str | None) -> tuple[str, bool | str]:
    """Return the backbone's name, and what `create_backbone` takes as ``pretrained``.

    Raises:
        SpecError: a checkpoint that does not say whose it is, or options that exclude each other.
        WeightsError: a checkpoint that cannot be read.
    """
    if weights is not None and pretrained:
        raise SpecError("--pretrained and --weights were both given. Leave out --pretrained, or the file or tag.")
    is_checkpoint = is_checkpoint_name(name) or Path(name).is_file()
    if not is_checkpoint:
        if backbone is not None:
            raise SpecError(
                f"--backbone {backbone} was given, and {name!r} is no checkpoint file ({', '.join(SUFFIXES)}). "
                f"Leave out --backbone, or write: deploykit export {backbone} --weights FILE."
            )
        return name, weights if weights is not None else pretrained
    if weights is not None or pretrained:
        raise SpecError(f"{name} is a checkpoint already. Leave out {'--weights' if weights else '--pretrained'}.")
    return backbone or _architecture_of(name), name


def _architecture_of(name: str) -> str:
    """Return whose weights a checkpoint holds, as it says itself."""
    said = None
    if Path(name).is_file():
        from deploykit.backbones.weights import architecture_of

        said = architecture_of(Path(name))
    if said is None:
        raise SpecError(
            f"{name} is a checkpoint that does not say which backbone it belongs to. "
            "Add --backbone NAME (`deploykit list` shows the names)."
        )
    return said


def image_size_of(text: str | None) -> Size | SizeRange | None:
    """Return ``"224"`` or ``"256x320"`` to (height, width) in pixels, and ``"160,224,320"`` to a range.

    Raises:
        SpecError: anything else, or sizes out of order.
    """
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) == 1:
        return one_size_of(text)
    if len(parts) != 3:
        raise SpecError(f"--image-size is {text!r}; expected one size, or the three sizes MIN,OPT,MAX.")
    low, opt, high = map(one_size_of, parts)
    return SizeRange(min=low, opt=opt, max=high)


def one_size_of(text: str) -> Size:
    """Return ``"224"`` or ``"256x320"`` to (height, width) in pixels.

    Raises:
        SpecError: anything else.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise SpecError(f"--image-size is {text!r}; expected one number of pixels (224), or height x width (256x320).")
    return parse_image_size((int(sides[0]), int(sides[-1])))


def integers_of(text: str, option: str) -> tuple[int, ...]:
    """Turn ``"2,3,4"`` into ints.

    Raises:
        SpecError: a part is not an int.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise SpecError(f"{option} is {text!r}; expected whole numbers with commas between, as in 2,3,4.") from error


def numbers_of(text: str, option: str) -> tuple[float, ...]:
    """Return ``"0.5"`` or ``"0.485,0.456,0.406"`` to floats.

    Raises:
        SpecError: a part is not a number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise SpecError(
            f"{option} is {text!r}; expected one number, or one a channel with commas between, as in 0.5,0.4,0.4."
        ) from error


def given(**options: Any) -> dict[str, Any]:
    """Keep the options that were given: those whose value is not None."""
    return {name: value for name, value in options.items() if value is not None}
