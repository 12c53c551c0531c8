"""Does the shape that wins as a classifier win as the eye of a language model?

    python studies/vlm_transfer.py --workers 2

SmolLM2-135M-Instruct (`sovit assets fetch smollm2`), frozen, reads 16 image tokens, row by row, through a two-layer
MLP projector, which alone is trained, on four families of questions in English about the scenes of `stream:cpu`:
reading the marks, which is what the encoders were trained for; naming the colours of a row, the most frequent colour,
and counting, which they were not. Eight more families (relations, two hops ...) are asked at the end and never
trained. The same language model, projector, images, questions, tokens and learning rate for each encoder; only the
encoder differs, at equal pre-training FLOPs: the law's choice, the best ViT-B proportions (both from
results/stream_validation.jsonl), and a wrong shape on purpose (wide, one block, thin MLP: the law says +38 %). Two
controls: the law's choice before any training; and no eye at all, 16 learned tokens that can say how to answer but
see nothing. Three seeds, which the encoders' training, the projector's start and the order of the questions share.

Decided beforehand: the loss on `marks` decides. An encoder sees if it is below the blind model's in each seed; of two
encoders one is better if the 90 % interval of the paired ratio of their losses leaves out 1. All other families are told
beside it.
Conclusions hold for this language model and these questions: rankings made with language models under 2B parameters
are known not to carry to larger ones (Apollo, arXiv 2412.10360). On a larger machine:

    python studies/vlm_transfer.py --name vlm_transfer_2b --device cuda language_model=hf:HuggingFaceTB/SmolLM2-1.7B-Instruct

Cost: 24 trunks, 9 encoders of 2e12 FLOPs (6 of them are those of stream_validation) and 15 projectors; about 75 minutes of
two cores. Expected: a pilot of the law's choice (800 images, three families) had 2.51 nats a token on marks, and 2.90 with
another's image; the usual proportions a little more, in the order of the encoders' own losses.
"""

from sovit.spec.run import Recipe, Run, budgets_for, learning_rate
from sovit.spec.shape import Shape
from sovit.spec.vlm_run import Part, Stage, VlmRun
from sovit.sweep import study_main

SHAPES = {"law": (32, 3, 672), "usual": (96, 2, 384), "wrong": (128, 1, 128)}
BUDGET = 2e12
SEEDS = (10, 11, 12)
STAGES = (Stage(900, projector=Part("full", 0.01, warmup=0.05)),)
FAMILIES = ("marks", "colours_row", "most", "count")
SETTING: dict = dict(layout="rows", template="short", families=FAMILIES, batch_size=2, num_val=64, precision="bfloat16")


def encoder(arm: str, seed: int) -> Run:
    shape = Shape(*SHAPES[arm], head_dim=8, patch_size=4, image_size=16, pool="none")
    recipe = Recipe(peak_lr=learning_rate(shape))
    budgets = budgets_for(shape, [BUDGET], 16, recipe.batch_size)
    return Run(shape, recipe, budgets, init_seed=seed, data_seed=seed)


def eyes(seed: int) -> dict[str, str]:
    """Arm -> the name of its encoder."""
    trained = {arm: encoder(arm, seed).run_ids[0] for arm in SHAPES}
    return trained | {"random": f"random:{trained['law']}", "blind": "blind:16"}


def runs() -> list:
    found: list = [encoder(arm, seed) for seed in SEEDS for arm in SHAPES]
    for seed in SEEDS:
        seeds = dict(init_seed=seed, data_seed=100 + seed)  # scenes that the encoder did not see
        found += [VlmRun(name, STAGES, **SETTING, **seeds) for name in eyes(seed).values()]
    return found


if __name__ == "__main__":
    raise SystemExit(
        study_main.main(__doc__, "vlm_transfer", runs, next_command="python -m analysis.vlm_encoders.tables")
    )
