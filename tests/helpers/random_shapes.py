"""Shapes drawn at random, odd ones among them."""

from sovit.spec.shape import POOLS, Shape


def random_shape(rng):
    head_dim = rng.choice((1, 3, 8, 16, 55, 64, 72))
    patch = rng.choice((1, 2, 4, 7, 14, 16))
    return Shape(
        width=head_dim * rng.randint(1, 12),
        depth=rng.randint(1, 3),
        mlp_dim=rng.randint(1, 700),
        head_dim=head_dim,
        patch_size=patch,
        image_size=patch * rng.randint(1, 9),
        pool=rng.choice(POOLS),
        num_registers=rng.choice((0, 0, 1, 4)),
        qkv_bias=rng.random() < 0.7,
        layer_scale=rng.random() < 0.3,
    )
