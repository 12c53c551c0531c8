"""The choice of runs on other people's pools: scalebench (arXiv 2604.22753), cheap rows to buy and a dear region to predict.

Instances are those that a sum of powers can express: losses above zero, columns that are sizes (not the mixtures, nor
learning rate and batch size, nor `vocab`, whose losses are below zero). All strategies start from the same few cheap
rows and are judged by the same fit, as log-RMSE on the held-out rows. Numpy only; reading needs pyarrow.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from sovit import UserError
from sovit.law.forms import LAWS
from sovit.predict.belief import (
    DISCREPANCY,
    NOISE_DOF,
    NOISE_SD,
    _covariance,
    _distance_to,
    _map,
    _prior,
    _spreads,
    _whitener,
)
from sovit.predict.next_run import _gains

# family -> columns of the sum of powers, loss, cost of a row (the benchmark's own proxies)
FAMILIES: dict[str, tuple] = {
    "farseer": (("N", "D"), "loss", lambda t: 6 * t["N"] * t["D"]),
    "data_constrained": (
        ("params", "tokens", "unique_tokens"),
        "loss",
        lambda t: 6 * t["params"] * t["tokens"],
    ),
    "parallel": (("num_params", "parallel_size"), "loss", lambda t: t["num_params"]),
    "moe": (
        ("num_experts", "dense_parameter_count"),
        "loss_validation",
        lambda t: t["num_experts"] * t["dense_parameter_count"],
    ),
    "sparsity": (("P", "N_active"), "loss", lambda t: 6 * (t["N_dense"] * t["D1"] + t["N_active"] * t["D2"])),
}
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # of what the whole pool costs
STRATEGIES = ("next_run", "v_optimal", "d_optimal", "cost_random", "random")
NUM_START = 5
SEEDS = 3
CHECK_EVERY, CHECK_SHARE = 5, 0.1


@cache
def load(folder: Path) -> dict[str, dict]:
    """Instance -> {terms, pool, target}: each {u [K, n] logs, y [n]}, the pool with cost [n]. Raises UserError."""
    from pyarrow import parquet

    out: dict = {}
    for family, (terms, loss, cost) in FAMILIES.items():
        parts = {}
        for split in ("train", "test"):
            path = folder / f"{family}_scaling_law" / f"{split}-00000-of-00001.parquet"
            if not path.exists():
                raise UserError(f"{path} does not exist; give the folder benchmark/dataset of PlanarG/active-sl")
            parts[split] = {k: np.array(v) for k, v in parquet.read_table(path).to_pydict().items()}
        for group in sorted(set(parts["train"]["group"].tolist())):
            name = family if group == "all_data" else f"{family} {group}"
            entry: dict = dict(terms=terms)
            for part, table in zip(("pool", "target"), parts.values()):
                rows = {k: v[table["group"] == group] for k, v in table.items()}
                logs = np.log(np.stack([rows[t].astype(float) for t in terms]))
                entry[part] = dict(logs=logs, y=rows[loss].astype(float), cost=np.asarray(cost(rows), float))
            out[name] = entry
    return out


def episodes(tables: dict, quick: bool) -> list[tuple]:
    names = list(tables)[:2] if quick else list(tables)
    return [(n, s, seed, tables[n]) for seed in range(2 if quick else SEEDS) for n in names for s in STRATEGIES]


class _Judge:
    """The fit of some rows of a pool: where it stands, how sure it is, and how far off on the target."""

    def __init__(self, data: dict):
        self.data = data
        self.form = LAWS["additive"].build((), None, data["terms"])
        self.logs, self.y = data["pool"]["logs"], data["pool"]["y"]
        self.centre = self.logs.mean(1)
        self.goal = data["target"]["logs"].mean(1)
        self.edges = self.logs.min(1), self.logs.max(1)
        self.phi: np.ndarray | None = None

    def fit(self, rows: np.ndarray, discrepancy: float) -> None:
        u, log_y = self.logs[:, rows] - self.centre[:, None], np.log(self.y[rows])
        prior = _prior(self.form, float(np.exp(log_y.mean())))
        index, shape = np.arange(len(rows)), self.logs[:, rows]
        distance = _distance_to(shape, self.goal, self.edges)
        expected = [(NOISE_SD / 2**0.5, np.inf), (NOISE_SD / 2**0.5, NOISE_DOF), (discrepancy, np.inf)]
        if self.phi is None:
            starts = np.log(np.maximum(self.form.starts(u, self.y[rows]), 1e-6))
            self.sds: tuple = tuple(sd for sd, _ in expected)
        else:
            starts = self.phi[None]
        self.phi = _map(
            self.form, u, log_y, prior, _covariance(shape, index, distance, *self.sds), np.vstack([starts, prior[:1]])
        )
        self.value, jac = self.predict(self.logs)
        own = jac[:, rows]
        self.sds = _spreads(log_y - self.value[rows], own, prior[1], shape, index, distance, self.sds, expected, 2)
        white = own @ _whitener(_covariance(shape, index, distance, *self.sds)).T
        self.covariance = np.linalg.inv(white @ white.T + np.diag(prior[1] ** -2))
        noise = np.hypot(self.sds[0], self.sds[1])
        away = _distance_to(self.logs, self.goal, self.edges)
        self.white = (jac / np.sqrt(noise**2 + (self.sds[2] * away) ** 2)).T[:, None]  # [n, 1, P]

    def predict(self, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln loss [n] and d ln loss / d phi [P, n]."""
        assert self.phi is not None, "fit first"
        theta = np.exp(self.phi)
        value, jac = self.form.evaluate(theta[None], logs - self.centre[:, None])
        return value[0], jac[0] * theta[:, None]

    def rmse(self) -> float:
        value, _ = self.predict(self.data["target"]["logs"])
        return float(np.sqrt(((value - np.log(self.data["target"]["y"])) ** 2).mean()))

    def score(self, strategy: str) -> np.ndarray:
        """Gain per cost of every row of the pool [n]: mean variance on the target, or the volume of the parameters."""
        if strategy == "d_optimal":
            gain = np.log1p(np.einsum("np,pq,nq->n", self.white[:, 0], self.covariance, self.white[:, 0]))
        else:
            _, jac = self.predict(self.data["target"]["logs"])
            gain = _gains(self.white, self.covariance, jac @ jac.T / jac.shape[1])
        return gain / self.data["pool"]["cost"]


def episode(name: str, strategy: str, seed: int, data: dict) -> dict:
    """{truth, strategy, seed, curve}: curve of {level, compute (shares of the pool's cost), num_rows, rmse}."""
    cost = data["pool"]["cost"] / data["pool"]["cost"].sum()
    start = np.random.default_rng(seed)
    rows = start.choice(len(cost), NUM_START, replace=False, p=(1 / cost) / (1 / cost).sum()).tolist()
    rng = np.random.default_rng([seed, STRATEGIES.index(strategy)])
    chooser, num_made, fitted = _Judge(data), 0, 0
    discrepancy = DISCREPANCY if strategy == "next_run" else 0.0

    def pick() -> int | None:
        nonlocal num_made, fitted
        left = np.setdiff1d(np.arange(len(cost)), rows)
        if not len(left):
            return None
        if strategy.endswith("random"):
            weight = 1 / cost[left] if strategy == "cost_random" else np.ones(len(left))
            return int(rng.choice(left, p=weight / weight.sum()))
        if fitted == 0 or len(rows) - fitted >= max(1, len(rows) // 20):
            chooser.fit(np.array(rows), discrepancy)
            fitted = len(rows)
        num_made += 1
        if strategy == "next_run" and num_made % CHECK_EVERY == 0:
            near = left[cost[left] <= CHECK_SHARE * cost[rows].sum()]
            if len(near):
                away = np.sqrt(((chooser.logs[:, near] - chooser.goal[:, None]) ** 2).sum(0))
                return int(near[away.argmin()])
        return int(left[chooser.score(strategy)[left].argmax()])

    pending, curve = pick(), []
    for level in SHARES:
        while pending is not None and cost[rows].sum() + cost[pending] <= level + 1e-9:
            rows.append(pending)
            pending = pick()
        if cost[rows].sum() <= level + 1e-9:
            judge = _Judge(data)
            judge.fit(np.array(rows), DISCREPANCY)
            judge.fit(np.array(rows), DISCREPANCY)
            curve.append(dict(level=level, compute=float(cost[rows].sum()), num_rows=len(rows), rmse=judge.rmse()))
    return dict(truth=name, strategy=strategy, seed=seed, curve=curve)


def summary(lines: list[dict]) -> dict:
    """{truths: {instance: {strategies: {name: {levels, seeds, rmse: {median, low, high}}}}}}: levels all seeds reach."""
    out: dict = {}
    for name in dict.fromkeys(line["truth"] for line in lines):
        mine = [line for line in lines if line["truth"] == name]
        levels = sorted(set.intersection(*({p["level"] for p in line["curve"]} for line in mine)))
        table = {}
        for strategy in dict.fromkeys(line["strategy"] for line in mine):
            own = [line for line in mine if line["strategy"] == strategy]
            many = np.array([[p["rmse"] for p in line["curve"] if p["level"] in levels] for line in own])
            low, middle, high = np.quantile(many, [0.25, 0.5, 0.75], axis=0)
            rmse = dict(median=middle.tolist(), low=low.tolist(), high=high.tolist())
            table[strategy] = dict(levels=levels, seeds=[line["seed"] for line in own], rmse=rmse)
        out[name] = dict(strategies=table)
    return dict(unit="share of the pool's cost", truths=out)


def table(summary: dict) -> str:
    lines = []
    for name, entry in summary["truths"].items():
        lines.append(f"{name}: median log-RMSE on the target, %, by share of the pool's cost")
        for strategy, one in entry["strategies"].items():
            cells = (f"{level:g}: {100 * m:.2f}" for level, m in zip(one["levels"], one["rmse"]["median"]))
            lines.append(f"  {strategy:<12}{len(one['seeds']):>3} seeds  " + "  ".join(cells))
    return "\n".join(lines)
