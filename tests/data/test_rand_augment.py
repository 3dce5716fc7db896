"""RandAugment: every operation is Pillow's, every draw belongs to its row."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from fastvlp.data import rand_augment as ra
from fastvlp.data.augment import AugmentConfig, augment
from fastvlp.errors import UserError

N = 48
PILLOW = {
    "autocontrast": lambda im, m, s: ImageOps.autocontrast(im),
    "equalize": lambda im, m, s: ImageOps.equalize(im),
    "rotate": lambda im, m, s: im.rotate(s * 30 * m),
    "posterize": lambda im, m, s: ImageOps.posterize(im, max(1, int(4 * m))),
    "solarize": lambda im, m, s: ImageOps.solarize(im, 256 * m),
    "colour": lambda im, m, s: ImageEnhance.Color(im).enhance(0.1 + 1.8 * m),
    "contrast": lambda im, m, s: ImageEnhance.Contrast(im).enhance(0.1 + 1.8 * m),
    "brightness": lambda im, m, s: ImageEnhance.Brightness(im).enhance(0.1 + 1.8 * m),
    "sharpness": lambda im, m, s: ImageEnhance.Sharpness(im).enhance(0.1 + 1.8 * m),
    "shear_x": lambda im, m, s: im.transform(im.size, Image.Transform.AFFINE, (1, s * 0.3 * m, 0, 0, 1, 0)),
    "shear_y": lambda im, m, s: im.transform(im.size, Image.Transform.AFFINE, (1, 0, 0, s * 0.3 * m, 1, 0)),
    "translate_x": lambda im, m, s: im.transform(im.size, Image.Transform.AFFINE, (1, 0, s * m * N * 100 / 331, 0, 1, 0)),
    "translate_y": lambda im, m, s: im.transform(im.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, s * m * N * 100 / 331)),
}  # fmt: skip


def picture(seed: int) -> np.ndarray:
    """A smooth picture with some noise, of a limited range of values."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(30, 200, (6, 6, 3), dtype=np.uint8)).resize((N, N), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(small).astype(int) + draw.integers(-5, 6, (N, N, 3)), 0, 255).astype(np.uint8)


def as_batch(*pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("level", [0.0, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("name", PILLOW)
def test_each_operation_is_pillows(name, level):
    pictures, signs = [picture(1), picture(2)], [1.0, -1.0]
    ours = getattr(ra, name)(as_batch(*pictures), level, torch.tensor(signs)).permute(0, 2, 3, 1).numpy()
    for own, pixels, sign in zip(ours, pictures, signs):
        theirs = np.asarray(PILLOW[name](Image.fromarray(pixels), level, sign)).astype(int)
        # Pillow computes places of pixels in fixed point, which may choose a neighbour.
        assert (np.abs(own - theirs).max(-1) > 1).mean() < 0.02


def test_every_operation_has_its_reference_but_the_one_that_pillow_lacks():
    assert {f.__name__ for f in ra.OPERATIONS} == {*PILLOW, "solarize_add"}


def test_solarize_add_adds_before_it_inverts_the_upper_half():
    x = torch.tensor([0.0, 100, 127, 200]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert ra.solarize_add(x, 0.3, torch.ones(1))[0, 0, 0].tolist() == [33, 255 - 133, 255 - 160, 255 - 233]


def test_equalize_leaves_an_image_of_one_colour_alone():
    x = torch.full((1, 3, 8, 8), 77.0)
    assert torch.equal(ra.equalize(x, 0.5, torch.ones(1)), x)
    assert torch.equal(ra.autocontrast(x, 0.5, torch.ones(1)), x)


def test_a_row_does_not_see_its_neighbours_and_draws_all_operations():
    image = as_batch(*[picture(i) for i in range(64)])
    seed = torch.arange(64)
    whole = ra.rand_augment(image, seed, 2, 9)
    assert torch.equal(whole[5:9], ra.rand_augment(image[5:9], seed[5:9], 2, 9))
    changed = (whole != image).flatten(1).any(1)
    assert changed.float().mean() > 0.9
    assert not torch.equal(whole, ra.rand_augment(image, seed, 2, 9, view=1))


def test_it_comes_first_and_keeps_the_type():
    image = as_batch(picture(3), picture(4)).to(torch.uint8)
    seed = torch.tensor([11, 12])
    config = AugmentConfig(operations=2, magnitude=9)
    assert torch.equal(augment(image, seed, config)[0], ra.rand_augment(image.float(), seed, 2, 9).to(torch.uint8))
    flipped = augment(image, seed, AugmentConfig(operations=2, flip=1.0))[0]
    assert torch.equal(flipped, augment(image, seed, config)[0].flip(-1))


def test_images_with_boxes_and_bad_settings_are_refused():
    image, seed = as_batch(picture(3)).to(torch.uint8), torch.tensor([1])
    with pytest.raises(UserError, match=r"`augment.operations`.*boxes"):
        augment(image, seed, AugmentConfig(operations=1), torch.rand(1, 2, 4))
    for bad in ({"operations": -1}, {"operations": 1, "magnitude": 31}):
        with pytest.raises(UserError, match="augment"):
            AugmentConfig(**bad)
