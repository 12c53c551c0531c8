"""Resizing of positions and kernels: what each resize promises, against matrices, numpy and timm's own resizing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import resample_patch_embed

from sovit import UserError
from sovit.encoder.model import build
from sovit.encoder.resize import METHODS, resize_patches, resize_positions, resize_state
from sovit.spec.shape import Shape

SHAPE = Shape(16, 2, 32, head_dim=8, patch_size=4, image_size=16)
side, method = st.integers(1, 9), st.sampled_from(sorted(METHODS))
dtype = st.sampled_from([torch.float32, torch.float64])


def draw(*size, dtype=torch.float64, seed=0):
    return torch.randn(*size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def line_matrix(old, new, method):
    """[new, old]: how Pillow resizes a line of `old` pixels, from the formula of its filter (cubic with a = -1/2)."""
    scale = max(1, old / new)
    centres = (np.arange(new) + 0.5) * old / new
    x = np.abs(np.arange(old) + 0.5 - centres[:, None]) / scale
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.maximum(0, 1 - x) if method == "linear" else np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def image_matrix(old, new, method):
    """[new pixels, old pixels] of images, raster order; sizes are (rows, columns)."""
    return np.kron(line_matrix(old[0], new[0], method), line_matrix(old[1], new[1], method))


def resize_images(images, size, method):
    """Images [..., H, W] -> [..., *size]."""
    matrix = torch.from_numpy(image_matrix(images.shape[-2:], size, method)).to(images.dtype)
    return (images.flatten(-2) @ matrix.T).unflatten(-1, size)


def test_images_are_resized_as_torch_does_it():
    images = draw(2, 3, 7, 6)
    for name, mode in METHODS.items():
        for size in ((7, 12), (3, 4), (10, 5)):
            theirs = F.interpolate(images, size, mode=mode, antialias=True, align_corners=False)
            torch.testing.assert_close(resize_images(images, size, name), theirs)


# kernels ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(side, st.integers(0, 5), method, dtype)
def test_a_bigger_patch_and_its_kernel_together_leave_tokens_unchanged(old, more, method, dtype):
    kernel, patches = draw(3, 2, old, old, dtype=dtype), draw(5, 2, old, old, dtype=dtype, seed=1)
    new = old + more
    before = torch.einsum("ncpq,dcpq->nd", patches, kernel)
    larger = resize_images(patches, (new, new), method)
    after = torch.einsum("ncpq,dcpq->nd", larger, resize_patches(kernel, new, method))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(after, before, atol=tolerance * max(1, before.abs().max().item()), rtol=0)


@settings(max_examples=40, deadline=None)
@given(side, side, method)
def test_any_kernel_is_the_least_squares_one_of_numpy(old, new, method):
    """argmin |B^T w' - w|, the shortest where there are several: what the pseudo-inverse promises."""
    kernel = draw(2, 1, old, old)
    ours = resize_patches(kernel, new, method).reshape(2, -1).numpy()
    transposed = image_matrix((old, old), (new, new), method).T  # [old pixels, new pixels]
    expected = np.linalg.lstsq(transposed, kernel.reshape(2, -1).numpy().T, rcond=None)[0].T
    np.testing.assert_allclose(ours, expected, atol=1e-9 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(("old", "new"), [(4, 8), (8, 4), (14, 16), (16, 14), (3, 7)])
@pytest.mark.parametrize("method", METHODS)
def test_kernels_are_those_of_timm(old, new, method):
    kernel = draw(5, 3, old, old, dtype=torch.float32)
    theirs = resample_patch_embed(kernel, [new, new], METHODS[method])
    torch.testing.assert_close(resize_patches(kernel, new, method), theirs, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(side, side, side, method)
def test_a_chain_is_never_better_than_one_resize(old, middle, new, method):
    """For kernels of patches of `old` pixels read at `new`: the error of tokens over white noise, |B^T w' - w|."""
    kernel = draw(4, 1, old, old)
    transposed = torch.from_numpy(image_matrix((old, old), (new, new), method).T)

    def error(resized):
        return (transposed @ resized.reshape(4, -1).T - kernel.reshape(4, -1).T).norm().item()

    chained = resize_patches(resize_patches(kernel, middle, method), new, method)
    assert error(resize_patches(kernel, new, method)) <= error(chained) + 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_both_ways_there_and_back_lose_and_staying_does_not(method):
    kernel = draw(20, 3, 8, 8)
    assert resize_patches(kernel, 8, method) is kernel
    for old, middle in ((4, 8), (8, 4)):
        start = kernel[..., :old, :old]
        back = resize_patches(resize_patches(start, middle, method), old, method)
        assert (back - start).norm() > 0.1 * start.norm(), f"{old} -> {middle} -> {old}"
    there_and_back = torch.stack([resize_patches(resize_patches(k[None], 4, method), 8, method) for k in kernel])
    assert np.linalg.matrix_rank(there_and_back.reshape(60, 64).numpy()) == 16  # 48 of 64 directions are gone


@pytest.mark.parametrize("new", [8, 3])
def test_gradients_of_a_resized_kernel(new):
    kernel = draw(2, 1, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: resize_patches(k, new), kernel)


def test_a_matrix_kept_from_a_validation_serves_training():
    kernel = draw(2, 1, 5, 5, dtype=torch.float32)
    with torch.inference_mode():
        resize_patches(kernel, 11)
    resize_patches(kernel.requires_grad_(), 11).sum().backward()
    assert kernel.grad is not None


def test_half_precision_is_computed_in_float32():
    dtype = torch.bfloat16
    kernel, pos = draw(3, 3, 8, 8).to(dtype), draw(1, 17, 3).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize_patches(kernel, 6), resize_patches(kernel.float(), 6).to(dtype))
        resized = resize_positions(pos, 4, 6, 1)
    assert torch.equal(resized, resize_positions(pos.float(), 4, 6, 1).to(dtype))


# positions -------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(side, side, st.integers(0, 3), st.integers(2, 4), method)
def test_positions_are_resized_as_an_image_and_prefix_tokens_are_not(old, new, prefix, width, method):
    pos = draw(1, prefix + old**2, width, dtype=torch.float32)
    resized = resize_positions(pos, old, new, prefix, method)
    assert torch.equal(resized[:, :prefix], pos[:, :prefix])
    expected = image_matrix((old, old), (new, new), method) @ pos[0, prefix:].double().numpy()
    np.testing.assert_allclose(resized[0, prefix:].numpy(), expected, atol=1e-5)
    assert resize_positions(pos, old, old, prefix, method) is pos


def test_linear_positions_in_closed_form():
    """Triangle weights, as jax.image.resize(..., "linear") of FlexiViT: 2 -> 4 and, antialiased, 4 -> 2."""
    up = resize_positions(torch.tensor([1.0, 1, 3, 3])[None, :, None], 2, 4, 0, "linear")
    torch.testing.assert_close(up.reshape(4, 4)[:, 0], torch.tensor([1, 1.5, 2.5, 3]))
    down = resize_positions(torch.tensor([1.0, 3, 4, 8]).repeat(4)[None, :, None], 4, 2, 0, "linear")
    ends = [(3 * 1 + 3 * 3 + 1 * 4) / 7, (1 * 3 + 3 * 4 + 3 * 8) / 7]
    torch.testing.assert_close(down.reshape(2, 2)[0], torch.tensor(ends))


# a whole model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [(32, 4), (12, 4), (16, 8), (32, 8), (20, 5), (16, 2), (16, 4)])
@pytest.mark.parametrize(
    "changes", [{}, dict(pool="token"), dict(pool="token", num_registers=3), dict(pool="map", num_registers=2)], ids=str
)
def test_a_model_is_resized_as_timm_does_it_and_reads_images_of_the_new_size(changes, new):
    old = SHAPE.replace(**changes)
    new = old.replace(image_size=new[0], patch_size=new[1])
    theirs = build(old, 5, seed=0).eval()
    ours = build(new, 5, seed=1).eval()
    ours.load_state_dict(resize_state(theirs.state_dict(), old, new))
    theirs.set_input_size(img_size=new.image_size, patch_size=new.patch_size)
    images = draw(2, 3, new.image_size, new.image_size, dtype=torch.float32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_only_positions_and_kernel_change_and_staying_changes_nothing():
    state = build(SHAPE, 3, seed=0).state_dict()
    resized = resize_state(state, SHAPE, SHAPE.replace(image_size=32, patch_size=2))
    assert {n for n in state if resized[n] is not state[n]} == {"pos_embed", "patch_embed.proj.weight"}
    same = resize_state(state, SHAPE, SHAPE)
    assert same.keys() == state.keys() and all(same[n] is state[n] for n in state)


def test_what_cannot_be_resized_is_said_in_one_line():
    state = build(SHAPE).state_dict()
    for call, message in (
        (lambda: resize_state(state, SHAPE, SHAPE.replace(depth=3)), "depth=2 cannot become 3"),
        (lambda: resize_state(state, SHAPE.replace(patch_size=8), SHAPE), "not of patch_size=8"),
        (lambda: resize_state(state, SHAPE.replace(image_size=32), SHAPE), "are not of patch_size=4, image_size=32"),
        (lambda: SHAPE.replace(image_size=18), "image_size=18 is not a multiple of patch_size=4"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
