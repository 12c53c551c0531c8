"""Which eye does a small language model learn to read with best, when it learns to read and to see at once?

    python studies/vlm_small.py --workers 2

The companion of studies/vlm_transfer.py where what is asked of the language model is within its reach: two layers of
width 64, new and trained with the projector, answer all twelve families of questions about the scenes of `stream:cpu`
(reading marks, naming, attributes, counting, relations, two hops). The same encoders in the same seeds, and beside
them the two that studies/contrastive.py trained on captions at the same FLOPs, as most eyes of language models are
trained; the untrained one and no eye at all.

Decided beforehand: as in vlm_transfer. The loss on `marks` decides, which is what the labels taught; and beside it the mean
over all questions, which neither labels nor captions were. Of two encoders one is better if the 90 % interval of the
paired ratio of their losses leaves out 1.

Cost: 36 trunks, 15 encoders of 2e12 FLOPs (those of vlm_transfer and contrastive) and 21 small models of about 80 s; half an
hour of two cores where the encoders are there. Expected: a pilot of the law's choice (8,000 images) had 1.21 nats a token on
marks, next to the encoder's own 1.24, and 4.5 with another's image; plain facts of the scene nearly unseen by it.
"""

from sovit.spec.run import Recipe, Run, budgets_for, learning_rate, task_flops
from sovit.spec.shape import Shape
from sovit.spec.vlm_run import Part, Stage, VlmRun
from sovit.sweep import study_main

SHAPES = {"law": (32, 3, 672), "usual": (96, 2, 384), "wrong": (128, 1, 128)}
BUDGET = 2e12
SEEDS = (10, 11, 12)
BOTH = Part("full", 0.004)
STAGES = (Stage(9_600, projector=BOTH, language_model=BOTH),)
SETTING: dict = dict(language_model="random:2x64", layout="rows", template="short", batch_size=16, num_val=128)


def encoder(arm: str, seed: int, objective: str = "classification") -> Run:
    """Trained on labels as in studies/stream_star.py, or on captions as in studies/contrastive.py."""
    shape = Shape(*SHAPES[arm], head_dim=8, patch_size=4, image_size=16, pool="none")
    if objective == "siglip":
        recipe = Recipe(learning_rate(shape, 0.004), 64, warmup_examples=1600, objective=objective)
        budgets = budgets_for(shape, [BUDGET], 0, recipe.batch_size, task_flops(shape, recipe, "stream"))
    else:
        recipe = Recipe(peak_lr=learning_rate(shape))
        budgets = budgets_for(shape, [BUDGET], 16, recipe.batch_size)
    return Run(shape, recipe, budgets, init_seed=seed, data_seed=seed)


def encoders(seed: int) -> list[Run]:
    return [encoder(arm, seed) for arm in SHAPES] + [encoder(arm, seed, "siglip") for arm in ("law", "usual")]


def runs() -> list:
    found: list = [run for seed in SEEDS for run in encoders(seed)]
    for seed in SEEDS:
        seeds = dict(init_seed=seed, data_seed=100 + seed)  # scenes that the encoders did not see
        trained = [run.run_ids[0] for run in encoders(seed)]
        eyes = [*trained, f"random:{trained[0]}", "blind:16"]
        found += [VlmRun(name, STAGES, **SETTING, **seeds) for name in eyes]
    return found


if __name__ == "__main__":
    raise SystemExit(study_main.main(__doc__, "vlm_small", runs, next_command="python -m analysis.vlm_encoders.tables"))
