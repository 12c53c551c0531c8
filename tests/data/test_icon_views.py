"""Views of icons: poses against scipy and numpy, contrast, and that they depend on nothing but (seed, index)."""

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform

from sovit.data.icons.views import COLOURS, CONTRAST, LUMA, NAMES, NOISE_SIZE, TEXTURE, Views, draw, render, tables

PLAIN = Views(colour=False)


def shapes(count: int, side: int) -> torch.Tensor:
    """Smooth random blobs [count, 1, side, side] uint8, dark at the edge, without any symmetry."""
    random = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 1, 5, 5, generator=random)
    blobs = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    steps = torch.linspace(-1, 1, side)
    window = (1 - steps**4)[:, None] * (1 - steps**4)
    return (255 * blobs * window).round().to(torch.uint8)


def posed(**pose) -> dict[str, torch.Tensor]:
    """Choices for one tile: white on black, straight in the middle at full size, but for what is given."""
    drawn = draw(PLAIN, 0, torch.zeros(1, dtype=torch.int64), 1)
    straight = {"rotation": 0.0, "size": 1.0, "stretch": 1.0, "x": 0.0, "y": 0.0, "mirrored": False} | pose
    return drawn | {k: torch.tensor([[v]]) for k, v in straight.items()}


def picture(mask: torch.Tensor, tile: int, **pose) -> np.ndarray:
    return render(mask[None], posed(**pose), tile, 0.0, tables(tile**2, "cpu"))[0, 0].numpy()


@pytest.mark.parametrize(
    ("pose", "expected"),
    [
        ({}, lambda a: a),
        ({"mirrored": True}, lambda a: a[:, ::-1]),
        ({"rotation": 90.0}, lambda a: np.rot90(a, -1)),  # clockwise
        ({"rotation": 90.0, "mirrored": True}, lambda a: np.rot90(a[:, ::-1], -1)),  # mirrored first
        ({"x": 3 / 16, "y": -2 / 16}, lambda a: np.pad(a, ((0, 2), (3, 0)))[2:, :16]),  # rightwards and upwards
    ],
)
def test_poses_are_what_they_are_called(pose, expected):
    mask = shapes(1, 16)[0]
    np.testing.assert_allclose(picture(mask, 16, **pose), expected(mask[0].numpy() / 255), atol=1e-5)


def test_a_pose_is_that_of_an_independent_library():
    mask = shapes(1, 32)[0]
    angle, size, stretch, x, y = 0.3, 0.8, 1.2, 0.05, -0.1
    ours = picture(mask, 32, rotation=np.degrees(angle), size=size, stretch=stretch, x=x, y=y)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])  # rows and columns, clockwise
    forward = turn @ np.diag([size / stretch**0.5, size * stretch**0.5])  # height, width
    middle = np.full(2, 15.5)
    inverse = np.linalg.inv(forward)
    offset = middle - inverse @ (middle + 32 * np.array([y, x]))
    theirs = affine_transform(mask[0].numpy() / 255, inverse, offset, order=1, mode="grid-constant")
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_finer_masks_average_to_the_same_picture():
    mask = shapes(1, 32)[0]
    pooled = torch.nn.functional.avg_pool2d(mask.float(), 2)[0].numpy() / 255
    np.testing.assert_allclose(picture(mask, 16), pooled, atol=1e-5)


def test_cells_stand_in_raster_order():
    masks = shapes(4, 8).view(1, 4, 8, 8)
    drawn = {k: v.expand(1, 4, *v.shape[2:]) if v.ndim > 1 else v for k, v in posed().items()}
    image = render(masks, drawn, 8, 0.0, tables(256, "cpu"))[0, 0]
    for c, (row, column) in enumerate(((0, 0), (0, 8), (8, 0), (8, 8))):
        assert torch.allclose(image[row : row + 8, column : column + 8], masks[0, c] / 255, atol=1e-6)


def test_ink_stands_out_from_its_background_everywhere():
    """Half of a mask is ink: each tile's two halves must differ in luma by CONTRAST at their closest pixels."""
    masks = torch.zeros(2000, 1, 8, 8, dtype=torch.uint8)
    masks[:, :, :, 4:] = 255
    drawn = draw(Views(), 5, torch.arange(2000), 1)
    straight = {k: v.expand(2000, 1) for k, v in posed().items() if k in ("rotation", "size", "stretch", "x", "y")}
    drawn |= straight | {"mirrored": torch.zeros(2000, 1, dtype=torch.bool)}
    images = render(masks, drawn, 8, 0.0, tables(192, "cpu"))  # [B, 3, 8, 8]
    assert images.min() >= -TEXTURE and images.max() <= 1 + TEXTURE
    luma = torch.einsum("bchw,c->bhw", images, torch.tensor(LUMA))
    ink, background = luma[:, :, 5:].flatten(1), luma[:, :, :3].flatten(1)
    closest = (ink[:, :, None] - background[:, None]).abs().amin((1, 2))
    assert closest.min() >= CONTRAST - 1e-4
    assert closest.min() < CONTRAST + 0.1  # the promise is used, not kept from afar
    for name in ("ink", "background"):  # all colours come up, and look like their names
        seen = torch.bincount(drawn[name].flatten(), minlength=len(NAMES))
        assert (seen > 0).all()
        rgb = torch.tensor(list(COLOURS.values()))
        nearest = torch.cdist(drawn[f"{name}_rgb"].float().flatten(0, 1), rgb).argmin(1)
        assert torch.equal(nearest, drawn[name].flatten())
    textured = (background.amax(1) - background.amin(1)) > 1e-3
    assert 0.5 < textured.float().mean() < 0.8  # two of three


def test_choices_stay_in_their_ranges_and_fill_them():
    views = Views(rotation=12, scale=(0.6, 1.1), stretch=0.2, outside=0.04, gentle=0.0)
    drawn = draw(views, 1, torch.arange(4000), 4)
    spans = {"rotation": (-12, 12), "size": (0.6, 1.1), "stretch": (1 / 1.2, 1.2), "icon": (0, 1), "mirrored": (0, 1)}
    for name, (low, high) in spans.items():
        values = drawn[name]
        assert values.shape == (4000, 4) and low <= values.min() and values.max() <= high
        assert values.min() < low + 0.02 * (high - low) and values.max() > high - 0.02 * (high - low), name
    leaves = drawn["x"].abs() + drawn["size"] / 2 - 0.5  # of the icon's square, at one side of the tile
    assert 0.03 < leaves.max() <= max(0.04, (1.1 - 1) / 2) + 1e-9
    pairs = torch.stack([drawn[n].flatten() for n in (*spans, "x", "y", "ink", "background")]).double()
    independent = torch.corrcoef(pairs)[:-2, :-2].fill_diagonal_(0)
    assert independent.abs().max() < 0.04  # 5 standard errors


def test_gentle_views_are_mostly_near_to_straight():
    for gentle, share in ((1.0, 0.1), (2.0, 0.1**0.5)):  # of the views that go to a tenth of the limits at most
        drawn = draw(Views(gentle=gentle), 2, torch.arange(8000), 1)
        bounds = torch.stack(
            [
                drawn["rotation"].abs() / 20,
                drawn["stretch"].log().abs() / np.log(1.15),
                drawn["size"].log() / np.log(1.05),
                drawn["size"].log() / np.log(0.7),
            ]
        ).amax(0)  # the share that was gone to is at least this
        assert share - 0.02 < (bounds <= 0.1).float().mean() < 2 * share + 0.1
        assert bounds.max() > 0.9


def test_choices_are_frozen():
    """They are integer arithmetic and doubles: the same on every machine, or committed results speak of other data."""
    drawn = draw(Views(), 0, torch.tensor([0, 10**12]), 1)
    found = {k: [round(v, 9) for v in drawn[k].flatten().tolist()] for k in ("icon", "rotation", "size", "x")}
    found |= {k: drawn[k].flatten().tolist() for k in ("ink", "background", "noise_at")}
    assert found == FROZEN


FROZEN = {
    "icon": [0.983574891, 0.405388153],
    "rotation": [1.725691575, -14.94778946],
    "size": [0.842527824, 0.823338473],
    "x": [-0.041820929, 0.122405673],
    "ink": [5, 6],
    "background": [7, 1],
    "noise_at": [709782, 334474],
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same():
    masks = shapes(256, 32).view(64, 4, 32, 32)
    index = torch.arange(64)
    for views in (Views(), PLAIN):
        images = []
        for device in ("cpu", "cuda"):
            drawn = draw(views, 7, index.to(device), 4)
            drawn["mirrored"] = drawn["mirrored"] < 0.5
            images.append(render(masks.to(device), drawn, 16, 0.1, tables(3 * 32**2, device)).cpu())
        assert torch.allclose(*images, atol=1e-4)


def test_tables_are_noise_and_clouds():
    shared = tables(100, "cpu")
    assert len(shared.noise) == NOISE_SIZE + 100
    assert abs(shared.noise.mean()) < 0.005 and abs(shared.noise.std() - 1) < 0.005
    texture = shared.texture[0, 0]
    assert texture.abs().max() <= 1 and texture.std() > 0.3
    near = (texture[:, 1:] - texture[:, :-1]).abs().mean()
    far = (texture[:, 40:] - texture[:, :-40]).abs().mean()
    assert near < 0.5 * far  # clouds, not sand
