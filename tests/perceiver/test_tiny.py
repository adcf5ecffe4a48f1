"""The bundled perceiver, on photographs that it never saw: scikit-image's."""

from io import BytesIO
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor

import perceive_adapter
from perceive_adapter import QualityPerceiver
from perceive_adapter.data import DEGRADATIONS, FAMILIES, FAMILY_OF, degrade, mix
from perceive_adapter.errors import ConfigError
from perceive_adapter.perceiver.audit import LEVELS, spearman

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
FOLDER = Path(perceive_adapter.__file__).parent / "assets" / "perceive-tiny"


@pytest.fixture(scope="module")
def tiny() -> QualityPerceiver:
    return QualityPerceiver.from_pretrained("perceive-tiny")


@pytest.fixture(scope="module")
def photos() -> list[Tensor]:
    """(1, 3, H, W), longest side 320."""
    loaded = []
    for name in PHOTOS:
        photo = Image.fromarray(getattr(skimage.data, name)())
        photo.thumbnail((320, 320), Image.Resampling.LANCZOS)
        loaded.append(torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 255)
    return loaded


def damaged(photo: Tensor, name: str, severity: float, seed: int = 0) -> Tensor:
    """The degraded image as a file of 8 bits holds it."""
    image = degrade(photo, name, severity, torch.Generator().manual_seed(seed))
    return image.mul(255).round() / 255


def test_it_is_small_and_says_what_it_is(tiny: QualityPerceiver) -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 10e6
    assert sorted(file.name for file in FOLDER.iterdir()) == [
        "README.md",
        "perceiver_config.json",
        "perceiver_model.safetensors",
    ]
    assert tiny.tiers == ("low", "medium", "high")
    assert tiny.degradations == FAMILIES
    assert tiny.trained
    card = (FOLDER / "README.md").read_text()
    assert "BSDS500" in card
    assert "| photographs audited |" in card


@torch.no_grad()
def test_it_tells_what_is_wrong(tiny: QualityPerceiver, photos: list[Tensor]) -> None:
    right = []
    for name in DEGRADATIONS:
        for photo in photos:
            for severity in (0.3, 0.6, 0.9):
                presence = tiny(damaged(photo, name, severity)).degradations[0]
                right.append(FAMILIES[int(presence.argmax())] == FAMILY_OF[name])
    assert fmean(right) >= 0.95


@torch.no_grad()
def test_it_tells_several_at_once_and_none(tiny: QualityPerceiver, photos: list[Tensor]) -> None:
    present = []
    for photo in photos:
        both = mix(photo, {"rain": 0.7, "jpeg": 0.6}, torch.Generator().manual_seed(0))
        presence = dict(zip(FAMILIES, tiny(both).degradations[0].tolist(), strict=True))
        assert set(sorted(presence, key=presence.__getitem__)[-2:]) == {"rain", "jpeg"}
        present.append(min(presence["rain"], presence["jpeg"]))
        assert tiny(photo).degradations.max() < 0.5
    assert fmean(present) > 0.5
    assert min(present) > 0.4


@pytest.mark.parametrize("name", DEGRADATIONS)
@torch.no_grad()
def test_severity_and_score_follow_the_damage(
    tiny: QualityPerceiver, photos: list[Tensor], name: str
) -> None:
    column = FAMILIES.index(FAMILY_OF[name])
    severity, score = [], []
    for photo in photos:
        images = torch.cat([damaged(photo, name, level) for level in LEVELS])
        perceived = tiny(images)
        severity.append(spearman(perceived.severity[:, column], LEVELS))
        score.append(-spearman(perceived.score, LEVELS))
    assert fmean(severity) >= 0.9
    assert fmean(score) >= 0.8


@torch.no_grad()
def test_noise_alone_scores_low(tiny: QualityPerceiver) -> None:
    generator = torch.Generator().manual_seed(0)
    for side in (32, 64, 256, 700):
        assert tiny(torch.rand(1, 3, side, side, generator=generator)).score < 0.2


class TestStability:
    """The score belongs to the photograph, not to how it is held, cut or stored."""

    @torch.no_grad()
    def test_the_same_image_gives_the_same_bits(
        self, tiny: QualityPerceiver, photos: list[Tensor]
    ) -> None:
        for photo in photos:
            image = damaged(photo, "rain", 0.5)
            file = BytesIO()
            pixels = image[0].permute(1, 2, 0).mul(255).round().byte().numpy()
            Image.fromarray(pixels).save(file, "PNG")
            stored = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255
            first, again, reread = tiny(image), tiny(image), tiny(stored)
            for name in ("score", "tiers", "degradations", "severity", "embedding"):
                assert torch.equal(getattr(first, name), getattr(again, name))
                assert torch.equal(getattr(first, name), getattr(reread, name))

    @pytest.mark.parametrize(
        ("axis", "largest", "mean"),
        [
            (3, 1e-4, 1e-5),  # in two columns, of which one is mirrored
            (2, 0.15, 0.015),  # the wide ones lie in one row, which is never turned
        ],
        ids=["left-right", "upside-down"],
    )
    @torch.no_grad()
    def test_flips(
        self, tiny: QualityPerceiver, photos: list[Tensor], axis: int, largest: float, mean: float
    ) -> None:
        changes = []
        for photo in photos:
            for image in (photo, *(damaged(photo, name, 0.6) for name in DEGRADATIONS)):
                changes.append(float(abs(tiny(image.flip(axis)).score - tiny(image).score)))
        assert max(changes) < largest
        assert fmean(changes) < mean

    @torch.no_grad()
    def test_crops_that_keep_half_the_area(
        self, tiny: QualityPerceiver, photos: list[Tensor]
    ) -> None:
        # Shot noise is fainter where the photograph is dark: there, it is another image.
        names = [name for name in DEGRADATIONS if name != "poisson_noise"]
        changes = []
        for photo in photos:
            for image in (photo, *(damaged(photo, name, 0.6) for name in names)):
                score = tiny(image).score
                height, width = (round(side * 0.5**0.5) for side in image.shape[2:])
                for top, left in ((0, 0), (image.shape[2] - height, image.shape[3] - width)):
                    crop = image[..., top : top + height, left : left + width]
                    changes.append(float(abs(tiny(crop).score - score)))
        assert max(changes) < 0.3
        assert fmean(changes) < 0.03

    @torch.no_grad()
    def test_sizes_that_the_stride_does_not_divide(
        self, tiny: QualityPerceiver, photos: list[Tensor]
    ) -> None:
        column = FAMILIES.index("blur")
        for photo in photos:
            blurred = damaged(photo, "gaussian_blur", 0.8)
            even = tiny(blurred[..., :160, :208])
            for height, width in ((163, 208), (160, 215), (170, 223), (167, 209)):
                odd = tiny(blurred[..., :height, :width])
                assert abs(odd.severity - even.severity)[0, column] < 0.05
                assert abs(odd.score - even.score) < 0.05

    @torch.no_grad()
    def test_where_a_crop_of_a_jpeg_begins(
        self, tiny: QualityPerceiver, photos: list[Tensor]
    ) -> None:
        column = FAMILIES.index("jpeg")
        for photo in photos:
            image = damaged(photo, "jpeg", 0.7)
            places = [(top, left) for top in range(0, 16, 3) for left in range(0, 16, 5)]
            crops = [image[..., top : top + 160, left : left + 160] for top, left in places]
            perceived = tiny(torch.cat(crops))
            assert perceived.degradations[:, column].min() > 0.5
            assert perceived.score.max() - perceived.score.min() < 0.2


@torch.no_grad()
def test_a_large_photograph_costs_no_more_than_sixteen_views(tiny: QualityPerceiver) -> None:
    pixels = []
    hook = tiny.towers.visual.register_forward_pre_hook(
        lambda _, inputs: pixels.append(inputs[0][:, 0].numel())
    )
    try:
        tiny(torch.rand(1, 3, 3000, 4000))
    finally:
        hook.remove()
    assert sum(pixels) <= 16 * 256**2


def test_it_serves_as_a_loss(tiny: QualityPerceiver, photos: list[Tensor]) -> None:
    image = damaged(photos[0], "gaussian_noise", 0.5)[..., :64, :64].requires_grad_()
    tiny(image).score.sum().backward()
    assert image.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in tiny.parameters())


@torch.no_grad()
def test_texts_of_its_vocabulary(tiny: QualityPerceiver, photos: list[Tensor]) -> None:
    texts = ["a clean photo", "a photo with severe rain", "a photo with severe noise"]
    features = tiny.towers.encode_texts(texts)
    images = [photos[0], damaged(photos[0], "rain", 0.9), damaged(photos[0], "gaussian_noise", 0.9)]
    for row, image in enumerate(images):
        assert int((tiny.embed(image) @ features.T).argmax()) == row
    with pytest.raises(ConfigError, match="elephant"):
        tiny.towers.encode_texts(["a photo of an elephant"])
