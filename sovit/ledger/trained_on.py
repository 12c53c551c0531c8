"""What the rows of a ledger were trained on and how: what a run needs that continues from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sovit import UserError
from sovit.spec.config import changed
from sovit.spec.run import Recipe, Run, learning_rate
from sovit.spec.shape import Shape

REMEDY = "say it in a study of your own (sovit.predict.validation.runs_of)"


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """The data and the recipe that all rows share.

    preset: of the source; a folder, for images. data_keys: digests of the samples, one for each way of showing them.
    recipe: fields of `Recipe` that differ from their default, peak_lr among them where it is one for all; None where the
    rows do not tell them. base_lr: where it is not, the rate at width 32 and depth 2, by the rule `learning_rate`.
    """

    data: str
    preset: str
    data_keys: list[str]
    recipe: dict[str, Any] | None
    base_lr: float | None

    def recipe_of(self, shape: Shape) -> Recipe:
        """The recipe for a new shape. Raises UserError where the rows do not determine it."""
        if self.recipe is None:
            raise UserError(f"the law's rows do not tell their whole recipe, or differ in it; {REMEDY}")
        if "peak_lr" in self.recipe:
            return Recipe(**self.recipe)
        if self.base_lr is None:
            raise UserError(f"the learning rates of the law's rows follow no known rule; {REMEDY}")
        return Recipe(peak_lr=learning_rate(shape, self.base_lr), **self.recipe)


def trained_on(rows: Sequence[Mapping[str, Any]]) -> TrainedOn | None:
    """What rows [n] of one source share; None where a row names no source, or not that of the others."""
    places = {(row.get("data"), row.get("preset")) for row in rows}
    data, preset = places.pop() if len(places) == 1 else (None, None)
    if not data or preset is None:
        return None
    keys = sorted({row["data_key"] for row in rows if row.get("data_key")})
    runs = [_run_of(row) for row in {row.get("trunk_id"): row for row in rows}.values()]
    known = [run for run in runs if run is not None]
    one_rate = len({run.recipe.peak_lr for run in known}) == 1
    left_out = () if one_rate else ("peak_lr",)
    recipes = [{k: v for k, v in changed(run.recipe).items() if k not in left_out} for run in known]
    told = len(known) == len(runs) and all(recipe == recipes[0] for recipe in recipes)
    return TrainedOn(
        data=str(data),
        preset=str(preset),
        data_keys=keys,
        recipe=recipes[0] if told else None,
        base_lr=_base_lr(known) if told and not one_rate else None,
    )


def _run_of(row: Mapping[str, Any]) -> Run | None:
    """The trunk of a row; None where its columns do not give its trunk_id again, so that a field is not told."""

    def fields_of(kind: Any) -> dict[str, Any]:
        return {f.name: row[f.name] for f in fields(kind) if row.get(f.name) is not None}

    seeds = dict(init_seed=row.get("init_seed", 0), data_seed=row.get("data_seed", 0))
    try:
        shape, recipe = Shape(**fields_of(Shape)), Recipe(**fields_of(Recipe))
        run = Run(shape, recipe, (row["num_examples"],), row["data"], row["preset"], **seeds)
    except (UserError, TypeError):
        return None
    return run if run.trunk_id == row.get("trunk_id") else None


def _base_lr(runs: Sequence[Run]) -> float | None:
    about = runs[0].recipe.peak_lr / learning_rate(runs[0].shape, 1.0)  # to its 4 digits
    tried = [float(f"{about:.{digits}g}") for digits in (1, 2, 3, 4)]
    return next((b for b in tried if all(r.recipe.peak_lr == learning_rate(r.shape, b) for r in runs)), None)
