"""Quality maps: every value is the score of its patch."""

import pytest
import skimage.data
import torch
from tiny_clip import VIT, images, trained

from perceive_adapter.data import degrade
from perceive_adapter.errors import ConfigError, ImageError
from perceive_adapter.perceiver import QualityPerceiver
from perceive_adapter.perceiver.trunk import TRUNK_NAME

TRUNK = {
    **VIT,
    "vision_cfg": {"timm_model_name": TRUNK_NAME, "timm_pool": "", "image_size": 64},
}


@pytest.fixture(scope="module")
def perceiver() -> QualityPerceiver:
    """One that takes any size."""
    return trained(TRUNK)


@pytest.mark.parametrize(
    ("size", "patch", "shape"),
    [
        ((64, 96), 32, (3, 5)),
        ((65, 47), 32, (4, 2)),
        ((32, 32), 32, (1, 1)),
        ((20, 70), 17, (2, 8)),
        ((10, 80), 32, (1, 4)),
        ((1, 1), 16, (1, 1)),
    ],
)
def test_every_value_is_the_score_of_its_patch(
    perceiver: QualityPerceiver, size: tuple[int, int], patch: int, shape: tuple[int, int]
) -> None:
    image = images(2, 3, *size)
    quality = perceiver.quality_map(image, patch)
    assert quality.shape == (2, *shape)
    assert quality.min() >= 0
    assert quality.max() <= 1
    for row in range(shape[0]):
        for column in range(shape[1]):
            top, left = (
                (side - min(side, patch)) * index // max(1, count - 1)
                for side, index, count in zip(size, (row, column), shape, strict=True)
            )
            score = perceiver(image[..., top : top + patch, left : left + patch]).score
            torch.testing.assert_close(quality[:, row, column], score, atol=1e-5, rtol=1e-5)


def test_patches_overlap_by_half_or_more(perceiver: QualityPerceiver) -> None:
    for side in range(16, 80):
        count = perceiver.quality_map(images(1, 3, 16, side), 16).shape[2]
        pitch = (side - 16) / max(1, count - 1)
        assert pitch <= 8
        assert count == 1 or (side - 16) / max(1, count - 2) > 8 or count == 2


def test_many_patches_are_scored_in_parts(
    perceiver: QualityPerceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = images(2, 3, 80, 64)
    whole = perceiver.quality_map(image, 32)
    monkeypatch.setattr("perceive_adapter.perceiver.maps._PIXELS_AT_ONCE", 3 * 2 * 32 * 32)
    torch.testing.assert_close(perceiver.quality_map(image, 32), whole, atol=1e-5, rtol=1e-5)


def test_own_patch_size() -> None:
    assert trained(TRUNK).quality_map(images(1, 3, 128, 64)).shape == (1, 3, 1)
    fixed = trained(VIT)  # takes 32 pixels
    assert fixed.quality_map(images(1, 3, 96, 64)).shape == (1, 5, 3)


def test_shows_where_the_damage_is(perceiver: QualityPerceiver) -> None:
    """Whichever way an untrained tower's scores go, they change where the image was damaged."""
    photo = torch.from_numpy(skimage.data.astronaut())[60:188, 150:278].permute(2, 0, 1)[None]
    clean = photo.float() / 255
    half = clean.clone()
    generator = torch.Generator().manual_seed(0)
    half[..., 64:] = degrade(clean[..., 64:], "gaussian_noise", 1.0, generator)
    change = (perceiver.quality_map(half, 32) - perceiver.quality_map(clean, 32)).abs()
    # Columns 0 to 2 end before the middle, column 3 straddles it.
    assert change[..., :3].max() < 1e-6
    assert change[..., 4:].min() > 1e-4


def test_gives_no_gradient_and_refuses_what_makes_no_map(perceiver: QualityPerceiver) -> None:
    assert not perceiver.quality_map(images(1, 3, 32, 32).requires_grad_(), 32).requires_grad
    with pytest.raises(ConfigError, match="patch=15: expected at least 16"):
        perceiver.quality_map(images(1, 3, 32, 32), 15)
    with pytest.raises(ImageError, match="shape"):
        perceiver.quality_map(images(1, 1, 32, 32))
