"""Recipes of INT8: settings that go together, by name, and the choice among them by trying them.

``benchmarks/recipes.py`` prints what each gives on the networks of the quantization benchmark.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import msgspec

from deploykit.errors import CalibrationError, SpecError, nearest
from deploykit.optional import require
from deploykit.spec import FAMILY_RECIPE, BiasCorrection, Calibrator, Int8, Rounding, WeightScales

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of `Int8` that decide how numbers are rounded, and nothing of what they must reach."""

    equalization: float | None = 0.5
    calibrator: Calibrator = "mse"
    bias_correction: BiasCorrection | None = "fast"
    rounding: Rounding = "nearest"
    weight_scales: WeightScales = "max"

    def applied_to(self, settings: Int8) -> Int8:
        """Fill the settings that were not given; explicit ones override the recipe.

        Raises:
            SpecError: NNCF's recipe with a calibrator that NNCF has not.
        """
        if self.calibrator == "nncf":
            settings = with_nncf_estimator(settings)
        return replace(settings.filled(asdict(self)), recipe=None)


RECIPES: dict[str, Recipe] = {
    "fast": Recipe(),
    "adaptive": Recipe(rounding="adaptive"),
    "wide-adaptive": Recipe(calibrator="minmax", rounding="adaptive"),
    "activations": Recipe(equalization=0.75),
    "activations-first": Recipe(equalization=0.75, rounding="adaptive"),
    "full": Recipe(rounding="adaptive", bias_correction="full"),
    "clipped": Recipe(rounding="adaptive", weight_scales="mse"),
    "wide": Recipe(calibrator="minmax"),
    "weights-first": Recipe(equalization=0.25),
    "plain": Recipe(equalization=None, bias_correction=None, calibrator="minmax"),
    "distilled": Recipe(equalization=0.75, rounding="distilled"),
    "nncf": Recipe(equalization=None, calibrator="nncf"),
}
"""By name, in the order in which ``auto`` tries them; ``plain`` is what a quantizer does that has none of this."""
NOT_TRIED = frozenset({"nncf"})
"""What ``auto`` leaves out: it needs a package of its own."""
AUTO_RECIPE = "auto"
"""The name that stands for the best of the table by trying."""
FAMILY_RECIPES: dict[str, str] = {
    "vit": "wide-adaptive",
    "swin": "wide-adaptive",
    "convnext": "adaptive",
    "regnet": "adaptive",
    "mobilevit": "wide",
    "mobilenet": "activations",
}
"""The default of families in which it keeps more than the first of the table, which plans the fastest."""


def with_nncf_estimator(settings: Int8) -> Int8:
    """Return settings whose calibrator, where one was given, is NNCF's estimator of that kind.

    Raises:
        SpecError: NNCF has none.
    """
    if not isinstance(settings.calibrator, str) or settings.by_nncf:
        return settings
    known = [name.removeprefix("nncf-") for name in get_args(Calibrator) if name.startswith("nncf-")]
    if settings.calibrator not in known:
        raise SpecError(
            f"calibrator is {settings.calibrator!r}, and NNCF has no such range estimator; with recipe='nncf' it is "
            f"one of {', '.join(own for own in known if own in get_args(Calibrator))}, or "
            f"{', '.join(f'nncf-{own}' for own in known)}. Leave it out for NNCF's default."
        )
    return replace(settings, calibrator=cast("Calibrator", f"nncf-{settings.calibrator}"))


def with_recipe(settings: Int8, family: str) -> Int8:
    """Fill the settings with those of the recipe that they name; they stay as they are for ``auto``.

    Raises:
        SpecError: no such recipe.
    """
    if settings.recipe == AUTO_RECIPE:
        return settings
    if settings.recipe is None:
        return settings.filled()
    name = default_recipe(family) if settings.recipe == FAMILY_RECIPE else str(settings.recipe)
    if name not in RECIPES:
        raise SpecError(f"unknown recipe {name!r}. {nearest(name, (*RECIPES, FAMILY_RECIPE, AUTO_RECIPE))}")
    return RECIPES[name].applied_to(settings)


def recipe_of(settings: Int8) -> str | None:
    """Return the name of the recipe that gives these settings; None: none does."""
    given = {name: getattr(settings, name) for name in asdict(Recipe())}
    return next((name for name, recipe in RECIPES.items() if asdict(recipe) == given), None)


def default_recipe(family: str) -> str:
    """Return the name of a family's recipe; of a family that is not known here, the first of the table."""
    return FAMILY_RECIPES.get(family, next(iter(RECIPES)))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A recipe and what an engine with it gave on images that it was not calibrated with.

    ``sqnr_db`` is that of its worst level, in dB against torch FP32; ``seconds`` is what the trial took.
    """

    name: str
    recipe: Recipe
    sqnr_db: float
    top1_agreement: float | None = None
    seconds: float

    @property
    def summary(self) -> str:
        """One line for a progress report."""
        return f"recipe {self.name}: {self.sqnr_db:.1f} dB, {self.seconds:.0f} s"


@dataclass(frozen=True, kw_only=True)
class RecipeReport:
    """What was tried, in order, and which was taken; ``untried`` are those that the budget had no time for.

    ``calibrated`` and ``held_out`` are how many images each trial was calibrated with and measured on.
    """

    budget_s: float
    calibrated: int
    held_out: int
    trials: tuple[Trial, ...]
    untried: tuple[str, ...]
    chosen: str

    @property
    def recipe(self) -> Recipe:
        """The recipe that was taken."""
        return next(trial.recipe for trial in self.trials if trial.name == self.chosen)

    def render(self) -> Table:
        """Return a table for a terminal, one row a recipe."""
        require("rich")
        from rich.table import Table

        title = f"Recipes, calibrated with {self.calibrated} images and measured on {self.held_out} others"
        table = Table(title=title, caption=self._caption())
        for heading in ("", "recipe", "worst level dB", "top-1", "seconds"):
            table.add_column(heading, justify="left" if heading in ("", "recipe") else "right")
        for trial in self.trials:
            agreement = "" if trial.top1_agreement is None else f"{trial.top1_agreement:.1%}"
            mark = ">" if trial.name == self.chosen else ""
            table.add_row(mark, trial.name, f"{trial.sqnr_db:.1f}", agreement, f"{trial.seconds:.0f}")
        return table

    def _caption(self) -> str:
        untried = f"; no time for {', '.join(self.untried)}" if self.untried else ""
        return f"budget {self.budget_s:g} s; > taken{untried}"

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    @classmethod
    def load(cls, path: Path) -> RecipeReport:
        """Read what `save` wrote.

        Raises:
            CalibrationError: not a report of recipes.
        """
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise CalibrationError(f"{path} is not a report of recipes ({error}). Export the bundle again.") from error
