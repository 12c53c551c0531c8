"""How far does each law see? Fitted below a compute cut, scored above it, for every cut, on studies and published sweeps.

    python -m analysis.published.extrapolation results/stream_star.jsonl results/icons_star.jsonl results/stream_isoflop.jsonl
        [--public FOLDER] [--out results/extrapolation.json]

The headline at a cut is the form that `sovit fit` would have chosen from the rows below it, by its own test inside them:
no row that is scored has a say. Its baselines are the N-D law (`chinchilla`), constant proportions (`compute_only`) and the
nearest run. Whether it is better is said with a 90 % interval of the ratio of RMSEs, from resampling the trunks that are
scored (what a fit itself would vary by is not in it). Figures stand in the folder named like OUT. No row of a published
sweep is written, only scores. FOLDER is described in `analysis.published.sweeps`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.published import sweeps as public
from sovit import OUTPUTS, UserError
from sovit.files import write_atomic
from sovit.law import fit as law
from sovit.law import read
from sovit.law.forms import LAWS
from sovit.ledger.measurements import measurements
from sovit.report.build import FORMS, FORMS_WITHOUT_LINE, choose_headline

METRICS = ("val_loss", "val_error")
TRIED = ("joint", "joint_n", "bounded", "power_mean", "shifted", "sovit")
CHOSEN = ("headline", "of_all")  # no forms but choices: among those `sovit fit` tries, among all of TRIED
BASELINES = ("chinchilla", "compute_only", "nearest")
CURVE_FORMS = ("shifted", "bounded")  # of a learning curve, beside the power law in its images, `compute_only`
HALF_DECADE = 0.5 * np.log(10)
LEVEL_GAP = 0.2  # runs on budgets lie closer than this in ln compute within one, and wider apart between two
MIN_FITTED, MIN_SCORED, MIN_TRUNKS = 16, 4, 3
NUM_DRAWS, LEVEL = 2000, 0.90


@dataclass(frozen=True)
class Data:
    """columns (with `compute`), y and clusters [n]. dims: of the law where the rows tell no shape; None = what varies."""

    name: str
    metric: str
    columns: dict
    y: np.ndarray
    clusters: np.ndarray
    zero_line: float | None = None
    measurement_sd: np.ndarray | None = None
    dims: tuple[str, ...] | None = None

    @property
    def forms(self) -> tuple[str, ...]:
        """Those of TRIED that mean something here: without shapes no star and no interaction of theirs."""
        return tuple(form for form in TRIED if self.dims is None or form not in ("joint_n", "sovit"))

    def fit(self, form: str, rows=None, **options) -> read.Fit:
        """The law `form` of the rows given (all of them for None). Raises UserError where it cannot be fitted."""
        rows = np.arange(len(self.y)) if rows is None else rows
        if form == "bounded":
            options["zero_line"] = self.zero_line
        if LAWS[form].uses_dims:
            options["dims"] = self.dims
        sd = None if self.measurement_sd is None else self.measurement_sd[rows]
        columns = {name: column[rows] for name, column in self.columns.items()}
        return law.fit(form, columns, self.y[rows], clusters=self.clusters[rows], measurement_sd=sd, **options)


def of_ledger(path: Path) -> list[Data]:
    """Each metric of METRICS that the rows have."""
    out = []
    for metric in METRICS:
        try:
            data = measurements([path], metric)
        except UserError:
            if metric == METRICS[0]:
                raise
            continue
        columns = {n: c for n, c in data.columns.items() if n != "trunk_id"}
        if "compute" not in columns:
            raise UserError(f"{path}: the rows say neither compute nor a shape to count it from; nothing orders them")
        trunk = data.columns.get("trunk_id", np.arange(len(data.y)).astype(str))
        out.append(Data(path.stem, metric, columns, data.y, trunk, data.zero_line, data.measurement_sd))
    return out


def of_public(folder: Path) -> list[Data]:
    """The published sweeps that an order by compute makes sense for; compute = 2 N x tokens."""
    out = []
    for file in public.GEMSTONES:
        sweep = public.gemstones(folder, file)
        columns = {name: sweep.columns[name] for name in ("width", "depth", "num_params")}
        out.append(_language(f"gemstones {file}", columns, sweep.columns["tokens"], sweep))
    for family, own in (("farseer", ()), ("data_constrained", ("unique_tokens",))):
        for sweep in public.scalebench(folder, family).values():
            size, tokens = (sweep.columns[name] for name in public.POWER_SUMS[family][0][:2])
            columns = dict(num_params=size) | {name: sweep.columns[name] for name in own}
            out.append(_language(family, columns, tokens, sweep, ("num_params", *own)))
    return out


def _language(name: str, columns: dict, tokens: np.ndarray, sweep: public.Sweep, dims=None) -> Data:
    columns = columns | dict(num_examples=tokens, compute=2 * columns["num_params"] * tokens)
    return Data(name, "loss", columns, sweep.y, sweep.clusters, dims=dims)


def cuts_of(compute: np.ndarray) -> list[float]:
    """Computes to cut at: between budgets where runs stand on budgets, else every half decade down from the dearest."""
    logs = np.sort(np.log(compute))
    ends = np.flatnonzero(np.diff(logs) > LEVEL_GAP) + 1
    spans = [np.ptp(level) for level in np.split(logs, ends)]
    if len(spans) > 1 and max(spans) < LEVEL_GAP:
        between = (logs[ends] + logs[ends - 1]) / 2
    else:
        between = np.arange(logs[-1] - HALF_DECADE, logs[0], -HALF_DECADE)[::-1]
    fitted = np.searchsorted(logs, between)
    enough = (fitted >= MIN_FITTED) & (len(logs) - fitted >= MIN_SCORED)
    return np.exp(between[enough]).tolist()


def tried(data: Data) -> tuple[str, ...]:
    """The forms among which `sovit fit` chooses."""
    return FORMS_WITHOUT_LINE if data.zero_line is None else FORMS


def fits_below(data: Data, below: np.ndarray) -> tuple[dict[str, read.Fit], dict[str, str]]:
    """Every form that the rows below a cut allow, fitted to them and to nothing else; why each other one is not."""
    fits, refused = {}, {}
    for form in dict.fromkeys((*tried(data), *data.forms)):
        try:
            fits[form] = data.fit(form, below)
        except (UserError, np.linalg.LinAlgError) as error:
            refused[form] = str(error)
    return fits, refused


def choose(fits: Mapping[str, read.Fit], forms: Sequence[str]) -> str | None:
    """The one of `forms` that `sovit fit` would choose; None where none of those fitted describes shapes."""
    able = {form: fits[form] for form in forms if form in fits}
    return choose_headline(able, None)[0] if any(LAWS[form].uses_dims for form in able) else None


def predictions(data: Data, fits: Mapping[str, read.Fit], cut: float) -> dict[str, np.ndarray]:
    """Form -> predicted losses of the rows from the cut up [n], nan where it says nothing; baselines included.

    The baselines are those of `law.fit`'s own extrapolation test; `chinchilla` is one of them.
    """
    above = np.flatnonzero(data.columns["compute"] >= cut)
    columns = {name: column[above] for name, column in data.columns.items()}
    found = {form: fits[form].predict(columns) for form in data.forms if form in fits}
    for name, scored in data.fit("joint", cut=cut).extrapolation["forms"].items():
        if name in BASELINES and scored["n"]:
            found[name] = np.full(len(above), np.nan)
            found[name][np.searchsorted(above, scored["rows"])] = scored["predicted"]
    return found


def curves(folder: Path, say=lambda line: None) -> dict:
    """The vision learning curves, one fit a curve and cut, as one data set: every curve, cut and half decade counts once.

    A curve is one run of one model, whose compute is in proportion to the images. Forms are compared with the power law
    by resampling models, six of them.
    """
    cells = []
    found = public.vision(folder)
    for (model, task), sweep in found.items():
        images = sweep.columns["num_examples"]
        for cut in cuts_of(images):
            above = np.flatnonzero(images >= cut)
            predicted = {}
            for form in CURVE_FORMS:
                options = dict(terms=("num_examples",), cut=cut, loss="log_squares", whiten=False)
                if form == "bounded":
                    options["zero_line"] = sweep.zero_line
                fitted = law.fit(
                    form, sweep.columns | dict(compute=images), sweep.y, clusters=sweep.clusters, **options
                )
                scored = fitted.extrapolation["forms"]
                predicted |= {name: np.array(s["predicted"]) for name, s in scored.items()}
            decades = np.log10(images[above] / images[images < cut].max())
            bins = np.round(decades * 2).astype(int)
            for b in np.unique(bins):
                cell = {form: np.log(p / sweep.y[above])[bins == b] for form, p in predicted.items()}
                cells.append(
                    (model, decades[bins == b].mean(), {form: (r @ r / len(r), r.mean()) for form, r in cell.items()})
                )
        say(f"curve of {model} on {task}")
    models, decades = np.array([c[0] for c in cells]), np.array([c[1] for c in cells])
    mean = {form: np.array([c[2][form] for c in cells]) for form in cells[0][2]}  # [cells, (square, residual)]
    bins = np.round(decades * 2).astype(int)

    def pooled(rows):
        return {
            form: dict(rmse=float(np.sqrt(m[rows, 0].mean())), bias=float(m[rows, 1].mean()), n=int(rows.sum()))
            for form, m in mean.items()
        }

    forms = pooled(np.ones(len(bins), bool))
    for b in np.unique(bins):
        for form, scored in pooled(bins == b).items():
            forms[form].setdefault("by_distance", []).append(dict(decades=float(decades[bins == b].mean())) | scored)
    root = {form: np.sqrt(m[:, 0]) for form, m in mean.items()}
    comparisons = {form: {b: compare(root[form], root[b], models) for b in BASELINES[1:]} for form in CURVE_FORMS}
    best = min(forms, key=lambda form: forms[form]["rmse"])
    return dict(
        name="vision curves",
        metric="few-shot error",
        n=len(cells),
        num_trunks=len(found),
        cuts=[],
        pooled=dict(num_cuts=None, forms=forms, winner=best, against=comparisons),
    )


def score(residual: np.ndarray) -> dict:
    """RMSE, signed bias and number of residuals ln(predicted / measured), nan left out."""
    known = residual[np.isfinite(residual)]
    return dict(rmse=float(np.sqrt((known**2).mean())), bias=float(known.mean()), n=len(known))


def compare(ours: np.ndarray, theirs: np.ndarray, trunks: np.ndarray, seed: int = 0) -> dict:
    """Ratio of our RMSE to theirs over the rows that both predict, with an interval from resampling whole trunks.

    ours, theirs [n]: residuals; trunks [n]. The verdict is `better` or `worse` where the interval leaves 1 out.
    """
    both = np.isfinite(ours) & np.isfinite(theirs)
    index = np.unique(trunks[both], return_inverse=True)[1]
    sums = np.stack([np.bincount(index, residual[both] ** 2) for residual in (ours, theirs)])  # [2, G]
    num = sums.shape[1]
    ratio = float(np.sqrt(sums[0].sum() / sums[1].sum()))
    if num < MIN_TRUNKS:
        return dict(ratio=ratio, low=None, high=None, num_trunks=num, verdict="too few trunks")
    weights = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), NUM_DRAWS)
    drawn = np.sqrt((weights @ sums[0]) / (weights @ sums[1]))
    low, high = (float(q) for q in np.quantile(drawn, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2]))
    verdict = "better" if high < 1 else "worse" if low > 1 else "not distinguishable"
    return dict(ratio=ratio, low=low, high=high, num_trunks=num, verdict=verdict)


def distance_bins(decades: np.ndarray) -> np.ndarray:
    """Bin of each distance: a budget where rows stand on budgets, else a half decade."""
    order = np.argsort(decades, kind="stable")
    budget = np.empty(len(decades), int)
    budget[order] = np.r_[0, np.cumsum(np.diff(decades[order]) > LEVEL_GAP / np.log(10))]
    spans = [np.ptp(decades[budget == b]) for b in np.unique(budget)]
    return budget if max(spans) < LEVEL_GAP / np.log(10) else np.round(decades * 2).astype(int)


def by_distance(residual: np.ndarray, decades: np.ndarray) -> list[dict]:
    """Scores of the rows within each bin beyond the dearest row fitted; `decades` their mean distance."""
    bins = distance_bins(decades)
    return [
        dict(decades=float(decades[bins == b].mean())) | score(residual[bins == b])
        for b in np.unique(bins[np.isfinite(residual)])
    ]


def study(data: Data, say=lambda line: None) -> dict:
    """Every cut of one data set, and all of them pooled: a form is pooled where it is scored at every cut."""
    compute = data.columns["compute"]
    out: dict = dict(name=data.name, metric=data.metric, n=len(data.y), num_trunks=len(set(data.clusters.tolist())))
    cuts, every = [], []
    for cut in cuts_of(compute):
        below, above = np.flatnonzero(compute < cut), np.flatnonzero(compute >= cut)
        fits, refused = fits_below(data, below)
        headline, wide = choose(fits, tried(data)), choose(fits, data.forms)
        residuals = {form: np.log(p / data.y[above]) for form, p in predictions(data, fits, cut).items()}
        chosen = {"headline": headline, "of_all": wide}
        residuals = {name: residuals[form] for name, form in chosen.items() if form in residuals} | residuals
        decades = np.log10(compute[above] / compute[below].max())
        row = dict(
            cut=cut, n_fit=len(below), n=len(above), decades=float(decades.max()), headline=headline, of_all=wide
        )
        row["forms"] = {f: score(r) | dict(by_distance=by_distance(r, decades)) for f, r in residuals.items()}
        row["refused"] = refused
        row["against"] = against(residuals, data.clusters[above])
        row["winner"] = winner(row["forms"], len(above))
        cuts.append(row)
        every.append((residuals, data.clusters[above], decades))
        say(f"{data.name} {data.metric}: cut at {cut:.2e}, {len(below)} rows fitted, {len(above)} scored")
    out["cuts"] = cuts
    usable = [part for part in every if "headline" in part[0]] or every
    if not usable:
        return out | dict(note=f"no compute cut leaves {MIN_FITTED} rows below and {MIN_SCORED} above")
    common = [form for form in usable[0][0] if all(form in residuals for residuals, _, _ in usable)]
    pooled = {form: np.concatenate([residuals[form] for residuals, _, _ in usable]) for form in common}
    trunks, decades = (np.concatenate([part[i] for part in usable]) for i in (1, 2))
    forms = {form: score(r) | dict(by_distance=by_distance(r, decades)) for form, r in pooled.items()}
    comparisons = against(pooled, trunks)
    return out | dict(
        pooled=dict(
            num_cuts=len(usable),
            forms=forms,
            winner=winner(forms, len(trunks)),
            against=comparisons,
            beats_all_baselines={
                choice: all(c["verdict"] == "better" for c in found.values()) for choice, found in comparisons.items()
            },
        )
    )


def against(residuals: Mapping, trunks: np.ndarray) -> dict:
    """Each choice -> each baseline -> how they compare."""
    return {
        choice: {b: compare(residuals[choice], residuals[b], trunks) for b in BASELINES if b in residuals}
        for choice in CHOSEN
        if choice in residuals
    }


def winner(forms: Mapping, num_rows: int) -> str | None:
    """The form with the lowest RMSE among those that predict every row."""
    able = {form: s["rmse"] for form, s in forms.items() if s["n"] == num_rows and form not in CHOSEN}
    return min(able, key=lambda form: able[form]) if able else None


def text(found: Sequence[Mapping]) -> str:
    """Every cut, and at the end one line a data set."""
    lines = []
    for data in found:
        lines.append(f"{data['name']} {data['metric']}: {data['n']} rows, {data['num_trunks']} trunks")
        for row in data["cuts"]:
            lines.append(
                f"  below {row['cut']:.2e}: {row['n_fit']} rows, above: {row['n']}, up to {row['decades']:.2f} decades;"
                f" headline {row['headline']}, lowest {row['winner']}"
            )
            lines.append(f"    {_scores(row['forms'])}")
        if "pooled" not in data:
            lines.append(f"  {data['note']}")
            continue
        pooled = data["pooled"]
        lines.append(f"  all cuts: {_scores(pooled['forms'])}")
        for choice, baselines in pooled["against"].items():
            for name, c in baselines.items():
                ends = "" if c["low"] is None else f" ({c['low']:.2f}-{c['high']:.2f})"
                lines.append(f"    {choice} / {name}: RMSE x {c['ratio']:.2f}{ends}, {c['verdict']}")
    shown = ("headline", "of_all", *BASELINES)
    lines.append(f"\n{'RMSE, all cuts':<30}" + "".join(f"{form:>14}" for form in shown) + "  lowest form")
    for data in found:
        if "pooled" in data:
            forms = data["pooled"]["forms"]
            cells = [f"{100 * forms[form]['rmse']:.2f} %" if form in forms else "-" for form in shown]
            best = data["pooled"]["winner"]
            name = f"{data['name']} {data['metric']}"
            lines.append(
                f"{name:<30}" + "".join(f"{cell:>14}" for cell in cells) + f"  {best} {100 * forms[best]['rmse']:.2f} %"
            )
    return "\n".join(lines)


def _scores(forms: Mapping) -> str:
    return "  ".join(f"{form} {100 * s['rmse']:.2f} % ({100 * s['bias']:+.2f})" for form, s in forms.items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledgers", nargs="+", type=Path, metavar="LEDGER")
    parser.add_argument("--public", type=Path, metavar="FOLDER", help="published sweeps, see analysis.published.sweeps")
    parser.add_argument("--json", action="store_true", help="print what is written instead of tables")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "extrapolation.json")
    options = parser.parse_args(argv)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        sets = [data for path in options.ledgers for data in of_ledger(path)]
        sets += of_public(options.public) if options.public else []
        found = [study(data, say) for data in sets]
        found += [curves(options.public, say)] if options.public else []
        written = json.dumps(found, indent=1, allow_nan=False)
        written = re.sub(r"\{[^{}\[\]]*\}", lambda flat: " ".join(flat[0].split()), written) + "\n"  # a score a line
        write_atomic(options.out, written)
        from analysis.published import figures as published_figures
        from sovit.report import figures as plot

        plot.save(published_figures.extrapolation_distance(found), options.out.with_suffix("") / "by_distance")
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    print(written if options.json else text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
