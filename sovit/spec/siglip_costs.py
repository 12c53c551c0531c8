"""The text side of the sigmoid objective in numbers: how long a caption is, what its tower is made of, what both cost.

A run with `Recipe.objective="siglip"` trains its encoder on (image, caption) pairs (Zhai et al., arXiv 2303.15343). What
stands beside the encoder there, as a task head does in classification, is the linear map of its pooled features to
EMBED_DIM, the text tower, and the products of all pairs of a batch. These numbers are part of what `siglip` means: like
the defaults of a Recipe they never change.
"""

from __future__ import annotations

from sovit.spec.shape import encoder_flops

EMBED_DIM = 64  # of the space in which images and captions meet
WIDTH, DEPTH, MLP_DIM, HEAD_DIM = 32, 1, 64, 16  # of the text tower, a Transformer
NUM_WORDS = {"stream": 21, "icons": 24}  # source -> words of its longest caption; shorter ones are filled up


def text_flops(num_words: int) -> int:
    """FLOPs of the text tower's forward pass on one caption: blocks and projection; looking a word up costs none."""
    blocks = encoder_flops(WIDTH, DEPTH, MLP_DIM, num_words, 0, 0, "avg")  # no patches to embed
    return blocks + 2 * WIDTH * EMBED_DIM


def text_params(num_words: int, vocabulary: int) -> int:
    """Parameters of the text tower, temperature and bias of the loss included, which learn with it."""
    block = 4 * WIDTH + 4 * WIDTH**2 + 4 * WIDTH + 2 * WIDTH * MLP_DIM + MLP_DIM + WIDTH
    projection = WIDTH * EMBED_DIM + EMBED_DIM
    return (vocabulary + num_words) * WIDTH + DEPTH * block + 2 * WIDTH + projection + 2


def pair_flops(width: int, batch_size: int) -> int:
    """FLOPs for one image of a batch: its projection, and its products with all captions of the batch."""
    return 2 * width * EMBED_DIM + 2 * batch_size * EMBED_DIM
