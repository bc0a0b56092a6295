"""The options of ``deploykit export``: how each is described, and from its text to its value."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args

from deploykit.backends.table import engine_names
from deploykit.cli.backbone_options import BackboneChoice, integers_of, option
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
)
from deploykit.target import SUFFIX

DEFAULTS = ExportOptions(runtime="")
"""The command's defaults are those of the options' class."""

_BUDGETS = ", ".join(
    f"{name} {next(entry.default for entry in fields(kind) if entry.name == 'min_sqnr_db'):g}"
    for name, kind in PRECISIONS.items()
)
_ENGINE, _NUMBERS, _BUNDLE = "Engine", "Calibration and budget", "Output"

RuntimeOption = Annotated[
    str | None,
    option(
        "--runtime",
        panel=_ENGINE,
        metavar="|".join(engine_names()),
        default="the target's",
        help="The runtime that will open the engine; needed where no target decides it.",
    ),
]
RuntimeChoiceOption = Annotated[
    str,
    option("--runtime", panel=_ENGINE, metavar="|".join(engine_names()), help="The runtime of the engine."),
]
PrecisionOption = Annotated[
    str | None,
    option(
        "--precision",
        panel=_ENGINE,
        metavar="|".join(PRECISIONS),
        default=f"{DEFAULTS.precision.name}, or the target's",
        help="What the engine computes in; int8 needs images.",
    ),
]
BatchOption = Annotated[
    str | None,
    option(
        "--batch-size",
        panel=_ENGINE,
        metavar="N|dynamic|MIN,OPT,MAX",
        default=f"{DEFAULTS.batch}, or the target's",
        help=f"Images a call: fixed, or a range; dynamic is {BatchRange().min},{BatchRange().opt},{BatchRange().max}.",
    ),
]
EmbedFlag = Annotated[
    bool | None,
    option(
        "--embed-preprocessing/--no-embed-preprocessing",
        panel=_ENGINE,
        default="off, or the target's",
        help="The engine takes decoded uint8 pixels, N x H x W x C, and does mean and std itself.",
    ),
]
TargetOption = Annotated[
    list[str] | None,
    option(
        "--target",
        panel=_ENGINE,
        metavar="NAME|FILE.toml",
        default="this machine, or the runtime's own",
        help="The device to export for, which decides all that is not given: `deploykit targets`. Give it again "
        "for more. With --runtime also one of the runtime's own: x86-avx2, sm89, fastest.",
    ),
]
OwnTargetOption = Annotated[
    str | None,
    option(
        "--target",
        panel=_ENGINE,
        default="the runtime's own",
        help="What the engine is built for, where the runtime has targets: x86-avx2, sm89, rtx-4090, fastest.",
    ),
]
PortableFlag = Annotated[
    bool | None,
    option(
        "--portable/--no-portable",
        panel=_ENGINE,
        default="off, or the target's",
        help="The device that opens the bundle finishes the engine, where the runtime has such a form.",
    ),
]
HardwareOption = Annotated[
    str,
    option(
        "--hardware-compatibility",
        panel=_ENGINE,
        metavar="|".join(get_args(HardwareCompatibility)),
        help="Which GPUs open the engine beside the target's, where engines are tied to one.",
    ),
]
VersionFlag = Annotated[
    bool,
    option(
        "--version-compatible",
        panel=_ENGINE,
        help="Newer versions of the runtime open the engine too, where engines are tied to one.",
    ),
]
TimingOption = Annotated[
    str | None,
    option(
        "--timing-cache",
        panel=_ENGINE,
        metavar="FILE",
        default="none",
        help="Keep what builds measure in a file, for faster and equal builds, where they measure.",
    ),
]
FloatOption = Annotated[
    str | None,
    option(
        "--float-dtype",
        panel=_ENGINE,
        metavar="fp32|fp16",
        default=Int8().float_dtype,
        help="What stays in float beside int8 computes in; fp16 where the runtime has it.",
    ),
]
CalibrationOption = Annotated[
    list[str] | None,
    option(
        "--calibration",
        panel=_NUMBERS,
        metavar="PATH",
        help="Images for int8: a folder, a file, or one .npy/.npz array. Give it again for more.",
    ),
]
SkipFlag = Annotated[bool, option("--skip-corrupt", panel=_NUMBERS, help="Leave unreadable images out with a warning.")]
CalibratorOption = Annotated[
    str | None,
    option(
        "--calibrator",
        panel=_NUMBERS,
        metavar="|".join(get_args(Calibrator)),
        default="the recipe's",
        help="How int8 chooses a range from the images.",
    ),
]
RecipeOption = Annotated[
    str | None,
    option(
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
    option(
        "--recipe-budget",
        panel=_NUMBERS,
        metavar="SECONDS",
        default=f"{Int8().recipe_budget_s:g}",
        help="How long --recipe auto may try, in seconds.",
    ),
]
DistillStepsOption = Annotated[
    int | None,
    option(
        "--distill-steps",
        panel=_NUMBERS,
        metavar="N",
        default=str(Int8().distill_steps),
        help="How many batches --recipe distilled learns from at most.",
    ),
]
DistillMinutesOption = Annotated[
    float | None,
    option(
        "--distill-minutes",
        panel=_NUMBERS,
        metavar="MINUTES",
        default=f"{Int8().distill_minutes:g}",
        help="When --recipe distilled stops at the latest, in minutes.",
    ),
]
DistillForFlag = Annotated[
    bool,
    option(
        "--distill-for-all",
        panel=_NUMBERS,
        help="--recipe distilled: tune once, for what all runtimes round, and not for exactly this one.",
    ),
]
ReduceRangeFlag = Annotated[
    bool | None,
    option(
        "--reduce-range/--full-range",
        panel=_NUMBERS,
        default="by the target",
        help="int8: coarser weights, which x86 processors without VNNI multiply exactly, or all 8 bits.",
    ),
]
SqnrOption = Annotated[
    float | None,
    option(
        "--min-sqnr-db",
        panel=_NUMBERS,
        default=_BUDGETS,
        help="Budget of every level against torch fp32, in dB.",
    ),
]
AgreementOption = Annotated[
    float | None,
    option(
        "--min-top1-agreement",
        panel=_NUMBERS,
        default="no gate",
        help="Budget of the logits: the share of images whose top-1 class must stay, 0 to 1.",
    ),
]
MixedFlag = Annotated[
    bool,
    option(
        "--mixed-precision",
        panel=_NUMBERS,
        help="int8: search the layers to keep in float so that the engine is within its budget. Resumable.",
    ),
]
SpeedFlag = Annotated[
    bool,
    option("--speed/--no-speed", panel=_NUMBERS, help="Time an int8 engine in turns with fp32 of its runtime."),
]
RequireSpeedupFlag = Annotated[
    bool, option("--require-speedup", panel=_NUMBERS, help="Fail where an int8 engine is slower than fp32.")
]
OutputOption = Annotated[
    str | None,
    option(
        "--output",
        "-o",
        panel=_BUNDLE,
        metavar="FOLDER",
        default="NAME-RUNTIME-PRECISION, or NAME-TARGET-PRECISION",
        help="The bundle to write; with several targets the folder above theirs.",
    ),
]
OverwriteFlag = Annotated[
    bool, option("--overwrite", panel=_BUNDLE, help="Replace an existing bundle, once the new one is whole.")
]
LayoutOption = Annotated[
    str | None,
    option(
        "--layout",
        panel=_BUNDLE,
        metavar="LAYOUT",
        default="none",
        help="Add the bundle to a model server's repository too: triton, triton-python, ovms or kserve.",
    ),
]
RepositoryOption = Annotated[
    str | None,
    option(
        "--repository",
        panel=_BUNDLE,
        metavar="FOLDER",
        default="models",
        help="The repository that --layout adds to.",
    ),
]
DryRunFlag = Annotated[
    bool,
    option("--dry-run", panel=_BUNDLE, help="Check every option and print what would be made; build nothing."),
]


@dataclass(frozen=True, kw_only=True)
class ExportChoice:
    """What the user asked for; several ``options`` are for several targets, with a folder each in ``output``."""

    backbone: BackboneChoice
    options: tuple[ExportOptions, ...]
    calibration: tuple[str, ...]
    skip_corrupt: bool
    output: Path
    overwrite: bool
    layout: str | None = None
    repository: Path | None = None


def batch_of(text: str) -> Batch:
    """Return ``"4"``, ``"dynamic"`` or ``"1,4,8"`` to a batch.

    Raises:
        SpecError: anything else, or sizes out of order.
    """
    if "," not in text:
        return parse_batch(text)
    sizes = integers_of(text, "--batch-size")
    if len(sizes) != 3:
        raise SpecError(f"--batch-size is {text!r}; expected N, dynamic, or the three numbers MIN,OPT,MAX.")
    return BatchRange(min=sizes[0], opt=sizes[1], max=sizes[2])


def lowered(name: str | None) -> str | None:
    """Return a name as tables spell it, INT8 as int8; the path of a file as it is."""
    return name if name is None or name.endswith(SUFFIX) else name.strip().lower()


def settings_of(**settings: Any) -> dict[str, Any]:
    """Return the precision's settings that were given.

    Raises:
        SpecError: a top-1 agreement outside 0 to 1.
    """
    agreement = settings.get("min_top1_agreement")
    if agreement is not None and not 0 <= agreement <= 1:
        raise SpecError(f"--min-top1-agreement is {agreement:g}; it is a share of the images, from 0 to 1.")
    return {name: value for name, value in settings.items() if value is not None}


def default_output(name: str, options: Sequence[ExportOptions]) -> Path:
    """Return ``NAME-RUNTIME-PRECISION``, ``NAME-TARGET-PRECISION`` or ``NAME-targets`` in the current folder."""
    plain = name.replace("/", "-").replace(os.sep, "-")
    if len(options) > 1:
        return Path(f"{plain}-targets")
    (only,) = options
    place = only.made_for.name if only.made_for is not None else only.runtime
    return Path(f"{plain}-{place}-{only.precision.name}")
