"""Which shapes are worth their cost on this device? A law's losses against measured time, latency and memory.

    python analysis/pareto.py LAW.json results/hardware.jsonl [--train-flops X] [--out results/hardware]

Losses are the law's predictions, costs are what `sovit profile` measured. Four fronts: loss per training FLOP, per
training second (images = seconds / measured step time per image), per latency and per memory of a training step, the
last two at the budget X (default: the largest that was run). Writes pareto.json, pareto.png and pareto.svg into OUT.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sovit import OUTPUTS, UserError
from sovit.files import write_atomic
from sovit.law.fitted_law import read_law
from sovit.ledger.profiles import read_profiles
from sovit.predict.pareto import pareto


def table_text(found: dict) -> str:
    device = found["device"]
    lines = [
        f"{'shape':<24}{'loss at X':>10}{'at T':>9}{'us/image':>10}{'GFLOP/s':>9}{'latency':>11}{'MiB':>8}  on the front of"
    ]
    for row in sorted(found["shapes"], key=lambda r: r["loss_at_flops"]):
        latency = "-" if row["latency"] is None else f"{row['latency'] * 1e3:.2f} ms"
        memory = "-" if row["train_bytes"] is None else f"{row['train_bytes'] / 2**20:.1f}"
        lines.append(
            f"{row['label']:<24}{row['loss_at_flops']:>10.4f}{row['loss_at_seconds']:>9.4f}"
            f"{row['step_seconds_per_image'] * 1e6:>10.0f}{row['train_flops_per_second'] / 1e9:>9.1f}"
            f"{latency:>11}{memory:>8}  {', '.join(row['fronts']) or '-'}"
        )
    flops, seconds = found["flop_optimal"], found["time_optimal"]
    every = ", ".join(found["on_every_front"]) or "none"
    low, high = (rate / 1e9 for rate in found["rate_range"])
    lines += [
        "",
        f"X = {found['train_flops']:.3g} training FLOPs; T = {found['train_seconds']:.3g} s, what the best shape per FLOP"
        f" takes for X at batch {found['batch_size']} on {device['device_name']} ({device['threads']} thread(s),"
        f" {device['dtype']}, {'CPU' if device['clock'] == 'cpu' else 'wall'} time)",
        f"best per FLOP:   {flops['label']}, predicted {flops['loss_at_flops']:.4f}; in time it loses"
        f" {flops['excess_at_seconds']:.2%}",
        f"best per second: {seconds['label']}, predicted {seconds['loss_at_seconds']:.4f}; in FLOPs it loses"
        f" {seconds['excess_at_flops']:.2%}",
        f"on every front:  {every}",
        f"the shapes reach {low:.1f} to {high:.1f} GFLOP/s in training; noise between seeds {found['noise_sd']:.2%}",
        "losses are the law's predictions; nothing was trained for this",
    ]
    lines += [f"left out: {line}" for line in found["left_out"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("law", type=Path, metavar="LAW.json")
    parser.add_argument("profiles", type=Path, metavar="PROFILES.jsonl")
    parser.add_argument("--train-flops", type=float, metavar="X", help="default: the largest budget that was run")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "hardware", help=f"folder (default {OUTPUTS}/hardware)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    try:
        found = pareto(read_law(options.law), read_profiles(options.profiles), options.train_flops)
        write_atomic(options.out / "pareto.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
        from sovit.report import figures as plot

        plot.save(plot.pareto_fronts(found), options.out / "pareto")
    except UserError as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if options.json else table_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
