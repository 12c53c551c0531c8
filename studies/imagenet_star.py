"""How does the best ViT shape move with compute on ImageNet-1k? A star around ViT-S/16 at 224 pixels, with corners.

    python studies/imagenet_star.py --dry-run          shapes, FLOPs and GPU-hours; needs neither the images nor a GPU
    hf auth login                                      once, after accepting the terms of ILSVRC/imagenet-1k
    python studies/imagenet_star.py --device cuda      then  sovit fit runs/results/imagenet_star.jsonl

Images are downloaded (under HF_HOME) and decoded once, at 256 pixels: 262 GB under SOVIT_CACHE, on a disk that is read as
fast as the GPU trains (the smallest shape takes tens of thousands of images a second, 0.2 MB each). Your own copy, a folder
with train/ and val/, is 'preset=/data/imagenet?cache_size=256&crop=0.05'. The quotes are for the shell.

Recipe, after "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580; vit_s16_i1k.py of big_vision): batch 1024,
AdamW, weight decay 0.1 (their 1e-4 is not multiplied by the rate, 1e-3), gradients clipped at norm 1, mean pooling. One
peak rate, 1e-3, for all shapes, as they and arXiv 2106.10270 (vit_i1k.py: Ti/16 to L/16) and SoViT's sweep had one. The
rule tuned on the stream would put 0.6e-3 to 2.8e-3 here, so check the ends of the arms with recipe.peak_lr=5e-4 and
2e-3, under other --names, before you trust an exponent. Schedule as in SoViT (arXiv 2305.13035, Table 5), so that a trunk
serves all budgets: rsqrt with a timescale of 10k steps; warm-up 1k steps in place of their 10k, because the shortest run
has 3k. Inception crops of 5 % of the area or more and flips, and no more than that, again as in SoViT: most runs see an
image a few times. Where they see it 30 times or more (small shapes, largest budget) some overfitting is to be expected.

Cost: 20 trunks, 2.4e19 FLOPs, 17 hours of one H100 or 54 of one A100 if 40 % of the dense bf16 peak is reached, which
was not measured. Expected: not run so far. S/16 reaches 76.5 % in 90 epochs with the
stronger augmentation of 2205.01580; the centre sees 28 epochs here, so less. SoViT's smallest shape and exponents put
the best shape for 1e18 near 480 x 6 x 480, inside of the star.
"""

from sovit.spec.design import star, to_runs
from sovit.spec.run import Recipe, Run
from sovit.spec.shape import Shape
from sovit.sweep import study_main

PRESET = "ILSVRC/imagenet-1k?cache_size=256&crop=0.05"
CENTRE = Shape(384, 12, 1536, head_dim=64, patch_size=16, image_size=224, pool="avg")  # S/16
ARMS = {"width": (192, 256, 512, 768), "depth": (3, 6, 8, 16), "mlp_dim": (384, 768, 3072)}
BUDGETS = (1e17, 1.778e17, 3.162e17, 5.623e17, 1e18)
NUM_CLASSES = 1000
SEEDS = {CENTRE: 3, CENTRE.replace(mlp_dim=768): 3}
BATCH = 1024
MIN_STEPS = 3000  # three warm-ups: what is shorter says little about a shape

RECIPE = Recipe(
    peak_lr=1e-3,
    batch_size=BATCH,
    weight_decay=0.1,
    warmup_examples=1000 * BATCH,
    schedule="rsqrt",
    rsqrt_examples=10_000 * BATCH,
    precision="bfloat16",
)


def runs() -> list[Run]:
    shapes = star(CENTRE, ARMS)
    found = to_runs(shapes, BUDGETS, NUM_CLASSES, lambda shape: RECIPE, SEEDS, MIN_STEPS, data="hub", preset=PRESET)
    return sorted(found, key=lambda run: -run.total_examples)  # the longest first, so that workers end together


if __name__ == "__main__":
    raise SystemExit(study_main.main(__doc__, "imagenet_star", runs))
