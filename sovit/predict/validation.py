"""The prediction tested: written down first, two shapes trained at equal FLOPs, and a verdict by a rule fixed before."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sovit import UserError
from sovit.files import write_atomic
from sovit.law.fitted_law import plain, read_law
from sovit.ledger.trained_on import TrainedOn
from sovit.predict.law_at_budget import Target, columns, target
from sovit.predict.recommend import best_shape
from sovit.spec.run import Run, budgets_for, task_flops
from sovit.spec.shape import DIMENSIONS, Shape

LEVEL = 0.90
MIN_SEEDS = 3
RULE = (
    "d = ln loss(recommended) - ln loss(usual) for each seed; verdict by the 90 % Student t interval of its mean:"
    " better if it lies below 0, worse if above 0, else not distinguishable"
)
IDENTITY = (*DIMENSIONS, "head_dim", "pool")  # of a shape in the rows


def make_prediction(law_path: Path, train_flops: float, seeds: list[int]) -> dict:
    """Say what the law expects of both arms at `train_flops`, its own shape and ViT-B proportions, with its intervals.

    Raises UserError for fewer than three seeds, and for a law that cannot rank shapes or count a task head.
    """
    if len(set(seeds)) < MIN_SEEDS:
        raise UserError(f"{len(set(seeds))} seeds cannot decide; give at least {MIN_SEEDS}")
    law = read_law(law_path)
    if law.data.trained_on is None:
        raise UserError(
            f"{law_path} does not say what data its rows trained on, so no run can go on from it; fit their ledger"
            " again with sovit fit"
        )
    best = best_shape(law, train_flops)
    at, usual = target(law, train_flops), best.proportional.shape
    return {
        **_identity_of(law_path, train_flops, seeds),
        "form": best.form,
        "decades": best.decades,
        "metric": law.data.metric,
        "num_classes": at.geometry.num_classes,
        "trained_on": plain(law.data.trained_on),
        "arms": {"recommended": _arm(at, best.shape), "usual": _arm(at, usual)},
        "predicted_difference": vars(best.difference),
    }


def _arm(at: Target, shape: Shape) -> dict:
    low, high = at.loss_interval(shape.to_dict())
    loss = float(at.loss(columns([shape]))[0])
    return {"shape": shape.to_dict(), "predicted": loss, "predicted_low": low, "predicted_high": high}


def write_prediction(law_path: Path, train_flops: float, seeds: list[int], path: Path) -> dict:
    """Make the prediction and write it down; the file, once written, is not changed.

    Raises UserError where `path` holds a prediction made from another law, budget or seeds, or is damaged.
    """
    if not path.exists():
        prediction = make_prediction(law_path, train_flops, seeds)
        write_atomic(path, json.dumps(prediction, indent=2) + "\n")
        return prediction
    try:
        prediction = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is damaged; delete it to make the prediction anew") from None
    identity = _identity_of(law_path, train_flops, seeds)
    if {k: prediction.get(k) for k in identity} != identity:
        raise UserError(
            f"{path} holds a prediction from another law, budget or seeds; name another file, or delete it to start anew"
        )
    return prediction


def _identity_of(law_path: Path, train_flops: float, seeds: list[int]) -> dict:
    try:
        digest = hashlib.sha256(Path(law_path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the law {law_path}: {error.strerror}; make one with sovit fit") from None
    return {"law_sha256": digest, "train_flops": train_flops, "seeds": seeds, "rule": RULE}


def runs_of(prediction: dict, study: str = "") -> list[Run]:
    """The trunks of both arms, one for each seed, each with the one budget of the prediction; of equal arms, one.

    Data and recipe are those of the law's rows. Raises UserError where the rows do not tell their recipe.
    """
    on = TrainedOn(**prediction["trained_on"])
    runs = []
    for seed in prediction["seeds"]:
        for arm in prediction["arms"].values():
            shape = Shape(**arm["shape"])
            recipe = on.recipe_of(shape)
            beside = task_flops(shape, recipe, on.data, prediction["num_classes"])
            budgets = budgets_for(shape, [prediction["train_flops"]], 0, recipe.batch_size, beside)
            runs.append(Run(shape, recipe, budgets, on.data, on.preset, seed, seed, study))
    return list(dict.fromkeys(runs))


def check_same_data(prediction: dict, content_key: str) -> None:
    """Raise UserError where the samples, whose digest is `content_key`, are not those that the law's rows trained on."""
    on = TrainedOn(**prediction["trained_on"])
    if on.data_keys and content_key not in on.data_keys:
        raise UserError(
            f"{on.data}:{on.preset} holds other samples than the law's rows trained on; bring those back, or fit a law anew"
        )


def verdict(prediction: dict, rows: list[dict]) -> dict:
    """Apply the rule to the rows of both arms. Raises UserError where a seed of an arm has no finite measurement."""
    arms, metric = {}, prediction.get("metric") or "val_loss"
    shapes = {name: Shape(**arm["shape"]) for name, arm in prediction["arms"].items()}
    grids = {f"/{shape.patch_size}@{shape.image_size}" for shape in shapes.values()}
    for name, shape in shapes.items():
        losses = []
        for seed in prediction["seeds"]:
            identity = {k: getattr(shape, k) for k in IDENTITY} | {"init_seed": seed}
            found = [row for row in rows if all(row.get(k) == v for k, v in identity.items())]
            if len(found) != 1 or found[0]["status"] != "ok" or found[0].get(metric) is None:
                raise UserError(
                    f"the {name} arm, {shape.label}, has no single {metric} for seed {seed}; run the study again"
                )
            losses.append(found[0][metric])
        arms[name] = {
            **prediction["arms"][name],
            "label": shape.label + f"/{shape.patch_size}@{shape.image_size}" * (len(grids) > 1),
            "losses": losses,
            "mean": float(np.mean(losses)),
            "sd": float(np.std(losses, ddof=1)),
        }
    ours, theirs = arms.values()
    difference = paired(np.log(ours["losses"]) - np.log(theirs["losses"]))
    found = difference.pop("verdict")
    return {
        "train_flops": prediction["train_flops"],
        "metric": metric,
        "rule": prediction["rule"],
        "seeds": prediction["seeds"],
        "arms": arms,
        "difference": difference,
        "predicted_difference": prediction["predicted_difference"],
        "same_shape": ours["shape"] == theirs["shape"],
        "prediction_error": {k: math.log(a["mean"] / a["predicted"]) for k, a in arms.items()},
        "verdict": found,
    }


def verdict_text(result: dict) -> str:
    """The verdict in words, and whether the prediction held."""
    d, arms, said = result["difference"], result["arms"], result["predicted_difference"]
    second = list(arms)[1]
    if result["same_shape"]:
        return f"The law recommends the other arm itself, {arms[second]['label']}: there is nothing to compare."
    lines = [
        f"{name:>11} {arm['label']:>11}: loss {arm['mean']:.4f} (s.d. {arm['sd']:.4f}, n = {d['n']}),"
        f" predicted {arm['predicted']:.4f}"
        for name, arm in arms.items()
    ]
    lines.append(
        f"recommended / {second}: {math.expm1(d['mean']):+.2%} (90 % interval {math.expm1(d['low']):+.2%} to"
        f" {math.expm1(d['high']):+.2%}). Verdict: {result['verdict']}."
    )
    predicted, known = f"Predicted: {math.expm1(said['estimate']):+.2%}", said["low"] is not None
    low, high = (said["low"], said["high"]) if known else (said["estimate"],) * 2
    predicted += f" ({math.expm1(low):+.2%} to {math.expm1(high):+.2%})" if known else ""
    missed = high < d["low"] or low > d["high"]
    apart, meets = "apart from the measured interval: the law missed", "which meets the measured interval"
    return "\n".join([*lines, f"{predicted}, {apart if missed else meets}."])


def paired(differences: Sequence[float] | np.ndarray) -> dict:
    """Mean of d = ln loss(ours) - ln loss(theirs) over seeds [S] with its 90 % Student t interval, and the verdict.

    `better` if the interval lies below 0, `worse` if above, else `not distinguishable`. Fewer than MIN_SEEDS seeds have
    no interval, and cannot be told apart. Raises UserError without a seed.
    """
    d = np.asarray(differences, float)
    n = len(d)
    if not n:
        raise UserError("no seed was run in both arms; run both with the same init_seed and data_seed")
    mean, sd = float(d.mean()), float(d.std(ddof=1)) if n > 1 else None
    low = high = None
    if sd is not None and n >= MIN_SEEDS:
        half = student_t(n - 1) * sd / math.sqrt(n)
        low, high = mean - half, mean + half
    return {"mean": mean, "sd": sd, "n": n, "low": low, "high": high, "level": LEVEL, "verdict": verdict_of(low, high)}


def verdict_of(low: float | None, high: float | None) -> str:
    """The verdict that an interval of d gives; None: there is none."""
    if low is None or high is None:
        return "not distinguishable"
    return "better" if high < 0 else "worse" if low > 0 else "not distinguishable"


def student_t(degrees: int) -> float:
    """The 95 % point of Student's t, that is, the half-width of a two-sided 90 % interval in standard errors."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + LEVEL) / 2))
