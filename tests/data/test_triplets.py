"""Triplets: the same seed makes the same scene, and a medium lies between degraded and clean."""

import pytest
import skimage.data
import torch
from torch import Tensor, nn

from perceive_adapter.data import DEGRADATIONS, mix
from perceive_adapter.data.triplets import Blend, Medium, Milder, Mixed, Restored, Scene
from perceive_adapter.errors import ConfigError

NAMES = tuple(DEGRADATIONS)


def photo(pixels: object) -> Tensor:
    return torch.as_tensor(pixels)[100:196, 150:246].permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def photos() -> list[Tensor]:
    """(1, 3, 96, 96) each."""
    return [photo(skimage.data.chelsea()), photo(skimage.data.coffee())]


def damage(image: Tensor, clean: Tensor) -> float:
    return (image - clean).square().mean().item()


class Smooth(nn.Module):
    """Halves what is left of the noise, and counts how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.blur = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.calls = 0

    def forward(self, image: Tensor) -> Tensor:
        assert not self.training
        self.calls += 1
        return self.blur(image)


class TestScene:
    def test_the_same_seed_does_the_same_again(self, photos: list[Tensor]) -> None:
        severities = {"rain": 0.6, "gaussian_noise": 0.4}
        degraded = Scene(photos[0], severities, seed=5).degraded()
        assert torch.equal(degraded, Scene(photos[0], severities, seed=5).degraded())
        assert not torch.equal(degraded, Scene(photos[0], severities, seed=6).degraded())
        generator = torch.Generator().manual_seed(5)
        assert torch.equal(degraded, mix(photos[0], severities, generator))

    def test_share_scales_every_severity(self, photos: list[Tensor]) -> None:
        scene = Scene(photos[0], {"rain": 0.6, "jpeg": 0.8}, seed=5)
        milder = Scene(photos[0], {"rain": 0.3, "jpeg": 0.4}, seed=5)
        assert torch.equal(scene.degraded(0.5), milder.degraded())

    def test_a_milder_scene_has_the_same_layout(self, photos: list[Tensor]) -> None:
        scene = Scene(photos[0], {"gaussian_noise": 0.4}, seed=5)
        noise, milder = scene.degraded() - photos[0], scene.degraded(0.3) - photos[0]
        both = torch.stack([noise.flatten(), milder.flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.97


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("severity", [0.4, 1.0])
@pytest.mark.parametrize("medium", [Blend(), Blend(0.6), Milder(), Milder(0.6)], ids=str)
def test_medium_lies_between_degraded_and_clean(
    photos: list[Tensor], medium: Medium, severity: float, name: str
) -> None:
    for seed, clean in enumerate(photos):
        scene = Scene(clean, {name: severity}, seed)
        degraded = scene.degraded()
        half = medium(scene, degraded)
        assert half.shape == clean.shape
        assert half.min() >= 0
        assert half.max() <= 1
        assert 0.02 < damage(half, clean) / damage(degraded, clean) < 0.8


def test_blend_keeps_the_stated_share(photos: list[Tensor]) -> None:
    scene = Scene(photos[0], {"haze": 0.7, "jpeg": 0.5}, seed=1)
    degraded = scene.degraded()
    left = (Blend(0.25)(scene, degraded) - scene.clean).abs().mean()
    assert (left / (degraded - scene.clean).abs().mean()).item() == pytest.approx(0.25, rel=1e-4)


def test_mixed_mediums_take_turns_by_the_seed(photos: list[Tensor]) -> None:
    sources = (Blend(), Milder(0.2), Blend(0.9))
    for seed in range(6):
        scene = Scene(photos[0], {"gaussian_noise": 0.7}, seed)
        degraded = scene.degraded()
        expected = sources[seed % 3](scene, degraded)
        assert torch.equal(Mixed(sources)(scene, degraded), expected)
    with pytest.raises(ConfigError, match="no mediums"):
        Mixed([])


class TestRestored:
    @pytest.mark.parametrize("fold", [0, 1])
    def test_uses_the_restorer_that_never_saw_the_photograph(
        self, photos: list[Tensor], fold: int
    ) -> None:
        restorers = [Smooth(), Smooth()]
        medium = Restored(restorers)
        scene = Scene(photos[0], {"gaussian_noise": 0.8}, seed=1, fold=fold)
        half = medium(scene, scene.degraded())
        assert [restorer.calls for restorer in restorers] == [fold, 1 - fold]
        assert damage(half, scene.clean) < 0.5 * damage(scene.degraded(), scene.clean)

    def test_keeps_the_stated_share_of_what_the_restorer_left(self, photos: list[Tensor]) -> None:
        scene = Scene(photos[1], {"gaussian_noise": 0.8}, seed=1)
        degraded = scene.degraded()
        whole, half = (Restored([Smooth(), Smooth()], share)(scene, degraded) for share in (1, 0.5))
        assert torch.equal(whole, scene.clean + (Smooth().eval()(degraded) - scene.clean))
        torch.testing.assert_close(half - scene.clean, (whole - scene.clean) / 2)

    def test_stays_in_range_without_a_gradient(self, photos: list[Tensor]) -> None:
        loud = nn.Conv2d(3, 3, 1)
        nn.init.constant_(loud.weight, 5.0)
        scene = Scene(photos[0], {"haze": 0.5}, seed=1)
        half = Restored([loud, loud])(scene, scene.degraded())
        assert not half.requires_grad
        assert half.min() >= 0
        assert half.max() <= 1

    def test_needs_two_restorers(self) -> None:
        with pytest.raises(ConfigError, match="got 1 restorers"):
            Restored([Smooth()])


@pytest.mark.parametrize("share", [-0.2, 0.0, 1.0, 1.5, float("nan")])
def test_bad_shares_are_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=f"remains={share}"):
        Blend(share)
    with pytest.raises(ConfigError, match=f"share={share}"):
        Milder(share)
    if share != 1:  # all that a restorer left may be kept
        with pytest.raises(ConfigError, match=f"remains={share}"):
            Restored([Smooth(), Smooth()], share)
