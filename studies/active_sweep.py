"""How little compute finds the stream's best shape, if every run is chosen for what it tells?

    python studies/active_sweep.py --workers 2          then  python analysis/fit_laws.py runs/results/active_stream.jsonl

Same data, recipe, learning-rate rule and budgets as studies/stream_star.py. A pilot of small trunks, then rounds: fit
(the form that fitted the star best), pick the runs that lower the expected regret at --target-flops most per FLOP
(`sovit.predict.next_run.choose`; as many as there are workers), write down what they should give, train them. Every
fifth pick is a check: the best run there can be, by the law, of a shape never run. The study stops when such a check
came true and the expected regret is under the noise between seeds, or when --max-flops are spent. `--dry-run` shows the
next picks and why; runs/results/active_stream_rounds.json keeps every round.

Cost: 7 trunks and what the picks add, 8e12 FLOPs at most, a third of the star's; about 15 minutes of two cores.
Expected: on a planted law of this form 0.3 % regret at 1e13. On the stream itself the form misses by 3 %, and the study
spends its budget without an answer to trust: 72 x 2 x 1504, where the star's law has 40 x 4 x 1072.
"""

from collections.abc import Sequence

from sovit.spec.design import to_runs
from sovit.spec.run import Run, recipe_by_rule
from sovit.spec.shape import Shape
from sovit.sweep import adaptive as grow

CENTRE = Shape(32, 2, 256, head_dim=8, patch_size=4, image_size=16, pool="none")
CORNERS = ((24, 1, 128), (24, 4, 512), (64, 1, 512), (64, 4, 128))
PILOT = (CENTRE, *(CENTRE.replace(width=w, depth=d, mlp_dim=m) for w, d, m in CORNERS))
PILOT_BUDGETS = (3.2e10, 1e11)
VALUES = {
    "width": (16, 24, 32, 40, 48, 64, 80, 96),
    "depth": (1, 2, 3, 4, 6),
    "mlp_dim": (64, 128, 192, 256, 384, 512, 768, 1024),
}
BUDGETS = (3.2e10, 1e11, 3.2e11, 1e12)
NUM_CLASSES = 16


def runs() -> list[Run]:
    """The pilot: the centre with three seeds, and a corner of each kind."""
    return to_runs(PILOT, PILOT_BUDGETS, NUM_CLASSES, recipe_by_rule, seeds={CENTRE: 3})


def question(target_flops: float = 1e13, max_flops: float = 8e12) -> grow.Question:
    return grow.Question(
        "active_stream", runs(), VALUES, BUDGETS, recipe_by_rule, NUM_CLASSES, target_flops, max_flops, form="bounded"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return grow.main(__doc__, question, "active_stream", argv)


if __name__ == "__main__":
    raise SystemExit(main())
