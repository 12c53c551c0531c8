"""Optuna's samplers on shapes: TPE and GP as opponents of a design.

`black_box` searches shapes at one training budget, as a user of Optuna without a law would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import optuna

SAMPLERS = {
    "random": optuna.samplers.RandomSampler,
    "tpe": optuna.samplers.TPESampler,
    "gp": optuna.samplers.GPSampler,
}


# opponents -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Searched:
    """shapes, losses: what was tried, in order. best: the shape of the lowest loss seen; believed: the tried shape of
    the lowest posterior mean (gp; elsewhere the same as best), which noise misleads less."""

    shapes: list[dict[str, int]]
    losses: list[float]
    best: dict[str, int]
    believed: dict[str, int]


def black_box(
    kind: str,
    loss: Callable[[dict[str, int]], float],
    ranges: Mapping[str, tuple[int, int]],
    num_trials: int,
    seed: int = 0,
    first: Sequence[Mapping[str, int]] = (),
) -> Searched:
    """Minimise a noisy loss over whole shapes by one of SAMPLERS, with Optuna's defaults.

    ranges: dimension -> least and largest value, searched on a log scale; first: shapes that are tried first.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = SAMPLERS[kind](seed=seed)
    study = optuna.create_study(sampler=sampler)
    for shape in first[:num_trials]:
        study.enqueue_trial(dict(shape))

    def objective(trial: optuna.Trial) -> float:
        return loss({name: trial.suggest_int(name, low, high, log=True) for name, (low, high) in ranges.items()})

    study.optimize(objective, n_trials=num_trials)
    done = study.get_trials(deepcopy=False)
    shapes, losses = [dict(t.params) for t in done], [float(t.values[0]) for t in done]
    best = believed = shapes[losses.index(min(losses))]
    if isinstance(sampler, optuna.samplers.GPSampler) and len(done) > 1:
        study.ask({name: optuna.distributions.IntDistribution(*ends, log=True) for name, ends in ranges.items()})
        if sampler._gprs_cache_list:  # the Gaussian process of that ask, fitted to all trials; None during start-up
            process = sampler._gprs_cache_list[0]
            believed = shapes[int(process.posterior(process._X_train)[0].argmax())]  # it maximises -loss
    return Searched(shapes, losses, best, believed)
