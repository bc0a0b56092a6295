"""The options of ``deploykit export``: how each is described, and from its text to its value."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from deploykit.backends.table import engine_names
from deploykit.errors import SpecError
from deploykit.options import ExportOptions
from deploykit.spec import (
    PRECISIONS,
    Batch,
    BatchRange,
    Calibrator,
    HardwareCompatibility,
    Int8,
    parse_batch,
    parse_image_size,
)

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".index.json")

DEFAULTS = ExportOptions(runtime="")
"""The command's defaults are those of the options' class."""

_BUDGETS = ", ".join(
    f"{name} {next(entry.default for entry in fields(kind) if entry.name == 'min_sqnr_db'):g}"
    for name, kind in PRECISIONS.items()
)
_BACKBONE, _ENGINE, _NUMBERS, _BUNDLE = "Backbone", "Engine", "Calibration and budget", "Output"


def _option(*names: str, panel: str, help: str, metavar: str | None = None, default: str | None = None) -> Any:
    return typer.Option(
        *names, rich_help_panel=panel, help=help, metavar=metavar, show_default=default if default else True
    )


NameArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME_OR_WEIGHTS",
        help="A backbone that `deploykit list` shows, timm/NAME, or a checkpoint file (then with --backbone).",
    ),
]
BackboneOption = Annotated[
    str | None, _option("--backbone", panel=_BACKBONE, metavar="NAME", help="Whose weights a checkpoint file holds.")
]
PretrainedFlag = Annotated[
    bool, _option("--pretrained", panel=_BACKBONE, help="Load the default weights instead of random ones.")
]
WeightsOption = Annotated[
    str | None,
    _option("--weights", panel=_BACKBONE, metavar="FILE|TAG", help="Load a .safetensors or .pth file, or a hub tag."),
]
FeaturesFlag = Annotated[
    bool, _option("--features-only", panel=_BACKBONE, help="Return feature maps by level instead of logits.")
]
IndicesOption = Annotated[
    str | None,
    _option(
        "--output-indices",
        panel=_BACKBONE,
        metavar="I,J,...",
        default="all levels",
        help="Which levels: index i has stride 2**(i+1) pixels, so 2,3,4 is strides 8, 16, 32.",
    ),
]
StrideOption = Annotated[
    int | None,
    _option(
        "--output-stride",
        panel=_BACKBONE,
        metavar="8|16|32",
        default="32",
        help="Stride of the last level, in pixels.",
    ),
]
ClassesOption = Annotated[
    int | None,
    _option(
        "--num-classes",
        panel=_BACKBONE,
        default="those of the weights, else 1000",
        help="Outputs of the classifier; 0 for the pooled embedding.",
    ),
]
ChannelsOption = Annotated[
    int | None,
    _option("--in-channels", panel=_BACKBONE, default="those of the weights, else 3", help="Channels of the images."),
]
SizeOption = Annotated[
    str | None,
    _option(
        "--image-size",
        panel=_BACKBONE,
        metavar="S|HxW",
        default="the size of the weights",
        help="In pixels: 224, or height x width as 256x320.",
    ),
]
PatchOption = Annotated[
    int | None,
    _option("--patch-size", panel=_BACKBONE, default="the variant's", help="Another patch for a plain ViT, in pixels."),
]
HierarchicalFlag = Annotated[
    bool, _option("--hierarchical", panel=_BACKBONE, help="A pyramid of strides 4 to 32 from a plain ViT.")
]
RuntimeOption = Annotated[
    str,
    _option(
        "--runtime", panel=_ENGINE, metavar="|".join(engine_names()), help="The runtime that will open the engine."
    ),
]
PrecisionOption = Annotated[
    str,
    _option(
        "--precision",
        panel=_ENGINE,
        metavar="|".join(PRECISIONS),
        help="What the engine computes in; int8 needs images.",
    ),
]
BatchOption = Annotated[
    str,
    _option(
        "--batch-size",
        panel=_ENGINE,
        metavar="N|dynamic|MIN,OPT,MAX",
        help=f"Images a call: fixed, or a range; dynamic is {BatchRange().min},{BatchRange().opt},{BatchRange().max}.",
    ),
]
EmbedFlag = Annotated[
    bool,
    _option(
        "--embed-preprocessing",
        panel=_ENGINE,
        help="The engine takes decoded uint8 pixels, N x H x W x C, and does mean and std itself.",
    ),
]
TargetOption = Annotated[
    str | None,
    _option(
        "--target",
        panel=_ENGINE,
        default="the runtime's own",
        help="What the engine is built for, where the runtime has targets: x86-avx2, sm89, rtx-4090, fastest.",
    ),
]
PortableFlag = Annotated[
    bool,
    _option(
        "--portable",
        panel=_ENGINE,
        help="The device that opens the bundle finishes the engine, where the runtime has such a form.",
    ),
]
HardwareOption = Annotated[
    str,
    _option(
        "--hardware-compatibility",
        panel=_ENGINE,
        metavar="|".join(get_args(HardwareCompatibility)),
        help="Which GPUs open the engine beside the target's, where engines are tied to one.",
    ),
]
VersionFlag = Annotated[
    bool,
    _option(
        "--version-compatible",
        panel=_ENGINE,
        help="Newer versions of the runtime open the engine too, where engines are tied to one.",
    ),
]
TimingOption = Annotated[
    str | None,
    _option(
        "--timing-cache",
        panel=_ENGINE,
        metavar="FILE",
        default="none",
        help="Keep what builds measure in a file, for faster and equal builds, where they measure.",
    ),
]
FloatOption = Annotated[
    str | None,
    _option(
        "--float-dtype",
        panel=_ENGINE,
        metavar="fp32|fp16",
        default=Int8().float_dtype,
        help="What stays in float beside int8 computes in; fp16 where the runtime has it.",
    ),
]
CalibrationOption = Annotated[
    list[str] | None,
    _option(
        "--calibration",
        panel=_NUMBERS,
        metavar="PATH",
        help="Images for int8: a folder, a file, or one .npy/.npz array. Give it again for more.",
    ),
]
SkipFlag = Annotated[
    bool, _option("--skip-corrupt", panel=_NUMBERS, help="Leave unreadable images out with a warning.")
]
CalibratorOption = Annotated[
    str | None,
    _option(
        "--calibrator",
        panel=_NUMBERS,
        metavar="|".join(get_args(Calibrator)),
        default="the recipe's",
        help="How int8 chooses a range from the images.",
    ),
]
RecipeOption = Annotated[
    str | None,
    _option(
        "--recipe",
        panel=_NUMBERS,
        metavar="NAME|family|auto",
        default=str(Int8().recipe),
        help="int8: fills the settings that are not given; family: what was measured best for the backbone's family; "
        "auto: the best on calibration images held out.",
    ),
]
RecipeBudgetOption = Annotated[
    float | None,
    _option(
        "--recipe-budget",
        panel=_NUMBERS,
        metavar="SECONDS",
        default=f"{Int8().recipe_budget_s:g}",
        help="How long --recipe auto may try, in seconds.",
    ),
]
ReduceRangeFlag = Annotated[
    bool | None,
    _option(
        "--reduce-range/--full-range",
        panel=_NUMBERS,
        default="by the target",
        help="int8: coarser weights, which x86 processors without VNNI multiply exactly, or all 8 bits.",
    ),
]
SqnrOption = Annotated[
    float | None,
    _option(
        "--min-sqnr-db",
        panel=_NUMBERS,
        default=_BUDGETS,
        help="Budget of every level against torch fp32, in dB.",
    ),
]
AgreementOption = Annotated[
    float | None,
    _option(
        "--min-top1-agreement",
        panel=_NUMBERS,
        default="no gate",
        help="Budget of the logits: the share of images whose top-1 class must stay, 0 to 1.",
    ),
]
MixedFlag = Annotated[
    bool,
    _option(
        "--mixed-precision",
        panel=_NUMBERS,
        help="int8: search the layers to keep in float so that the engine is within its budget. Resumable.",
    ),
]
SpeedFlag = Annotated[
    bool,
    _option("--speed/--no-speed", panel=_NUMBERS, help="Time an int8 engine in turns with fp32 of its runtime."),
]
RequireSpeedupFlag = Annotated[
    bool, _option("--require-speedup", panel=_NUMBERS, help="Fail where an int8 engine is slower than fp32.")
]
OutputOption = Annotated[
    str | None,
    _option(
        "--output",
        "-o",
        panel=_BUNDLE,
        metavar="FOLDER",
        default="NAME-RUNTIME-PRECISION",
        help="The bundle to write.",
    ),
]
OverwriteFlag = Annotated[
    bool, _option("--overwrite", panel=_BUNDLE, help="Replace an existing bundle, once the new one is whole.")
]
DryRunFlag = Annotated[
    bool, _option("--dry-run", panel=_BUNDLE, help="Check every option and print what would be made; build nothing.")
]


@dataclass(frozen=True, kw_only=True)
class ExportChoice:
    """What the user asked for; ``shape`` are the options of `create_backbone` that shape the module."""

    name: str
    pretrained: bool | str
    options: ExportOptions
    calibration: tuple[str, ...]
    skip_corrupt: bool
    output: Path
    overwrite: bool
    shape: dict[str, Any] = field(default_factory=dict)


def choose_weights(name: str, *, backbone: str | None, pretrained: bool, weights: str | None) -> tuple[str, bool | str]:
    """The backbone's name, and what `create_backbone` takes as ``pretrained``.

    Raises:
        SpecError: a checkpoint without the backbone's name, or options that exclude each other.
    """
    if weights is not None and pretrained:
        raise SpecError("--pretrained and --weights were both given. Leave out --pretrained, or the file or tag.")
    is_checkpoint = name.endswith(WEIGHT_SUFFIXES) or Path(name).is_file()
    if not is_checkpoint:
        if backbone is not None:
            raise SpecError(
                f"--backbone {backbone} was given, and {name!r} is no checkpoint file ({', '.join(WEIGHT_SUFFIXES)}). "
                f"Leave out --backbone, or write: deploykit export {backbone} --weights FILE."
            )
        return name, weights if weights is not None else pretrained
    if backbone is None:
        raise SpecError(
            f"{name} is a checkpoint, and a checkpoint does not say which backbone it belongs to. "
            "Add --backbone NAME (`deploykit list` shows the names)."
        )
    if weights is not None or pretrained:
        raise SpecError(f"{name} is a checkpoint already. Leave out {'--weights' if weights else '--pretrained'}.")
    return backbone, name


def batch_of(text: str) -> Batch:
    """``"4"``, ``"dynamic"`` or ``"1,4,8"`` to a batch.

    Raises:
        SpecError: anything else, or sizes out of order.
    """
    if "," not in text:
        return parse_batch(text)
    sizes = integers_of(text, "--batch-size")
    if len(sizes) != 3:
        raise SpecError(f"--batch-size is {text!r}; expected N, dynamic, or the three numbers MIN,OPT,MAX.")
    return BatchRange(min=sizes[0], opt=sizes[1], max=sizes[2])


def image_size_of(text: str | None) -> tuple[int, int] | None:
    """``"224"`` or ``"256x320"`` to (height, width) in pixels.

    Raises:
        SpecError: anything else.
    """
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise SpecError(f"--image-size is {text!r}; expected one number of pixels (224), or height x width (256x320).")
    return parse_image_size((int(sides[0]), int(sides[-1])))


def integers_of(text: str, option: str) -> tuple[int, ...]:
    """``"2,3,4"`` to ints.

    Raises:
        SpecError: a part is not an int.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise SpecError(f"{option} is {text!r}; expected whole numbers with commas between, as in 2,3,4.") from error


def given(**options: Any) -> dict[str, Any]:
    """Keep the options that were given: those whose value is not None."""
    return {name: value for name, value in options.items() if value is not None}


def settings_of(**settings: Any) -> dict[str, Any]:
    """The precision's settings that were given.

    Raises:
        SpecError: a top-1 agreement outside 0 to 1.
    """
    agreement = settings.get("min_top1_agreement")
    if agreement is not None and not 0 <= agreement <= 1:
        raise SpecError(f"--min-top1-agreement is {agreement:g}; it is a share of the images, from 0 to 1.")
    return {name: value for name, value in settings.items() if value is not None}


def default_output(name: str, runtime: str, precision: str) -> Path:
    """``NAME-RUNTIME-PRECISION`` in the current folder."""
    return Path(f"{name.replace('/', '-').replace(os.sep, '-')}-{runtime}-{precision}")
