"""``deploykit evaluate``: what engines have right on labelled images, and what they lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploykit.backends.table import EVALUATOR
from deploykit.cli.exit_codes import DRIFT
from deploykit.cli.image_progress import image_progress
from deploykit.cli.output import (
    DeviceOption,
    JsonFlag,
    ThreadsOption,
    TrustOption,
    show,
    show_error,
    show_json,
    show_warning,
    table,
)
from deploykit.errors import SpecError

if TYPE_CHECKING:
    from deploykit.accuracy.evaluation import Evaluation
    from deploykit.manifest import Manifest

EXAMPLE = f"Example: deploykit evaluate resnet18-{EVALUATOR}-fp32 resnet18-{EVALUATOR}-int8 validation --max-drop 0.5"

SHOWN_CLASSES = 5


def evaluate(
    bundles: Annotated[
        list[str],
        typer.Argument(metavar="BUNDLE...", help="Folders that `deploykit export` wrote, compared with the first."),
    ],
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES", help="A folder with one subfolder a class, a .csv or .tsv file, or a .npz file."
        ),
    ],
    *,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="BUNDLE|NAME",
            help="What to compare with: a bundle, or a backbone, which runs in torch at fp32.",
            show_default="the first of several bundles",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", metavar="FILE", help="The weights of the backbone of --against.", show_default="the published"
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", metavar="FILE", help="The images' labels in the order of the classifier's outputs."),
    ] = None,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Leave the labels out: compare classes and neighbours alone.")
    ] = False,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop", metavar="POINTS", help="Exit code 1 where top-1 drops by more, in percentage points."
        ),
    ] = None,
    shown: Annotated[
        int, typer.Option("--classes", metavar="N", min=0, help="Classes to show of each bundle, the worst first.")
    ] = SHOWN_CLASSES,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Go on past images that cannot be read; each is named and counted.")
    ] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    trust: TrustOption = None,
    json: JsonFlag = False,
) -> None:
    """Count what engines have right, with 95% intervals, and test what they lost against another on the same images.

    Needs no torch, unless --against names a backbone. Without labels the classes and the nearest neighbours of both
    models are compared. A model without a classifier is judged by a vote of each image's neighbours.
    """
    from deploykit.accuracy.evaluation import evaluate_models

    _check_gate(bundles, against, max_drop)
    with image_progress("evaluate") as progress:
        found = evaluate_models(
            bundles,
            images,
            against=None if against is None else _reference(against, weights, bundles[0]),
            labels=labels,
            unlabelled=unlabelled,
            skip_corrupt=skip_corrupt,
            device=device,
            threads=threads,
            trust=trust,
            progress=progress,
        )
    failed = [each.model for each in found if _drops_too_far(each, max_drop)]
    if json:
        gate = None if max_drop is None else {"max_drop": max_drop, "passed": not failed, "failed": failed}
        show_json({"images": images, "evaluations": found, "gate": gate})
    else:
        _show(found, images, shown)
    if failed:
        show_error(f"top-1 dropped by more than {max_drop:g} points: {', '.join(failed)}.")
        raise typer.Exit(DRIFT)
    if not json:
        show(f"Next: deploykit verify {bundles[-1]}")


def _check_gate(bundles: list[str], against: str | None, max_drop: float | None) -> None:
    if max_drop is None:
        return
    if not math.isfinite(max_drop) or max_drop < 0:
        raise SpecError(f"--max-drop is {max_drop:g}; give percentage points, such as 0.5.")
    if against is None and len(bundles) < 2:
        raise SpecError("--max-drop has nothing to compare with. Give two bundles, or --against BUNDLE.")


def _reference(against: str, weights: str | None, bundle: str) -> Any:
    """Return the bundle to compare with; or the backbone in torch, with the shape of the first bundle."""
    from deploykit.bundle import read_manifest
    from deploykit.facade import create_backbone, named_bundle
    from deploykit.names import path_of

    if named_bundle(against) is not None:
        return against
    manifest = read_manifest(path_of(bundle))
    spec = manifest.backbone
    built = create_backbone(
        against,
        pretrained=weights or True,
        num_classes=spec.num_classes,
        in_channels=spec.in_channels,
        image_size=spec.image_size,
        features_only=spec.features_only,
        embed_preprocessing=manifest.input.embeds_preprocessing,
    )
    _warn_of_other_weights(built, manifest, bundle)
    return built


def _warn_of_other_weights(built: Any, manifest: Manifest, bundle: str) -> None:
    from deploykit.backbones.weights import weights_digest

    if weights_digest(getattr(built, "backbone", built)) != manifest.weights_digest:
        show_warning(f"the weights of --against are not those that {bundle} was exported with: the drop is of both.")


def _drops_too_far(found: Evaluation, max_drop: float | None) -> bool:
    if max_drop is None or found.drop is None:
        return False
    if found.drop.points is None:
        raise SpecError("--max-drop is of top-1, and these images have no labels. Leave it out, or give labelled ones.")
    return found.drop.points > max_drop + 1e-9


def _show(found: list[Evaluation], images: str, shown: int) -> None:
    figures = [heading for heading, cell in _FIGURES.items() if any(cell(each) for each in found)]
    rows = [[each.model, *(_FIGURES[name](each) for name in figures)] for each in found]
    skipped = f", {found[0].skipped} skipped" if found[0].skipped else ""
    title = f"{images}: {found[0].images} images{skipped}; shares in %, with 95% intervals"
    show(table(("model", *figures), rows, right=figures, title=title))
    for each in found:
        lines = [score for score in each.classes if score.lost > 0][:shown]
        if not lines or (each.drop is None and len(found) > 1):
            continue
        against = f"against {each.drop.reference}" if each.drop is not None else "wrong answers"
        rows = [
            [s.label, *(str(n) for n in (s.images, s.reference_right, s.right, s.lost) if n is not None)] for s in lines
        ]
        counted = ["images", *(["reference right"] if each.drop is not None else []), "right", "lost"]
        show(
            table(
                ("class", *counted), rows, right=counted, title=f"{each.model}: the classes that lost most, {against}"
            )
        )


def _share(value: float | None, interval: tuple[float, float] | None = None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f}" + ("" if interval is None else f" [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]")


def _points(found: Evaluation) -> str:
    if found.drop is None or found.drop.points is None or found.drop.interval is None:
        return ""
    low, high = found.drop.interval
    return f"{found.drop.points:+.2f} [{low:+.2f}, {high:+.2f}]"


def _test(found: Evaluation) -> str:
    if found.drop is None or found.drop.p_value is None:
        return ""
    return f"{found.drop.p_value:.2g}"


def _discordant(found: Evaluation) -> str:
    if found.drop is None or found.drop.lost is None:
        return ""
    return f"{found.drop.lost} / {found.drop.won}"


_FIGURES: dict[str, Callable[[Evaluation], str]] = {
    "top-1": lambda each: _share(each.top1, each.top1_interval) if each.by == "logits" else "",
    "top-5": lambda each: _share(each.top5, each.top5_interval),
    "neighbours' top-1": lambda each: _share(each.top1, each.top1_interval) if each.by != "logits" else "",
    "drop": _points,
    "lost / won": _discordant,
    "McNemar p": _test,
    "same class": lambda each: _share(each.drop.agreement) if each.drop else "",
    "same neighbours": lambda each: _share(each.drop.neighbours) if each.drop else "",
    "images/s": lambda each: f"{each.images_per_s:.0f}",
}
"""The columns of figures, each shown where a model has it."""
