"""The degradations: reproducible, harmless at severity 0, and worse with every step above it."""

from itertools import pairwise

import pytest
import skimage.data
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from perceive_adapter.data import DEGRADATIONS, degrade
from perceive_adapter.errors import ConfigError, ImageError

NAMES = tuple(DEGRADATIONS)
SEVERITIES = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """(1, 3, 128, 128)."""
    pixels = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)[None]
    return pixels[:, :, 60:188, 150:278].float() / 255


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def psnr(image: Tensor, target: Tensor) -> float:
    return peak_signal_noise_ratio(image, target, data_range=1.0).item()


def gray(value: float, side: int = 128, batch: int = 1) -> Tensor:
    return torch.full((batch, 3, side, side), value)


def test_registry_names_the_four_degradations_and_cannot_be_changed() -> None:
    assert NAMES == ("noise", "rain", "haze", "low_light")
    with pytest.raises(TypeError):
        DEGRADATIONS["fog"] = DEGRADATIONS["haze"]  # type: ignore[index]


@pytest.mark.parametrize("name", NAMES)
class TestEveryDegradation:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_keeps_shape_dtype_and_range(
        self, photo: Tensor, name: str, dtype: torch.dtype
    ) -> None:
        degraded = degrade(photo.to(dtype), name, 0.8, seeded())
        assert degraded.shape == photo.shape
        assert degraded.dtype == dtype
        assert degraded.min() >= 0
        assert degraded.max() <= 1
        # The layout must not depend on the precision, or half of it would be another picture.
        torch.testing.assert_close(
            degraded.float(),
            degrade(photo, name, 0.8, seeded()),
            atol=max(1e-6, torch.finfo(dtype).eps),
            rtol=0,
        )

    @pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 2), (40, 17)])
    def test_any_size(self, name: str, size: tuple[int, int]) -> None:
        degraded = degrade(torch.rand(2, 3, *size), name, 1.0, seeded())
        assert degraded.shape == (2, 3, *size)
        assert degraded.isfinite().all()

    def test_the_seed_decides(self, photo: Tensor, name: str) -> None:
        first = degrade(photo, name, 0.6, seeded(1))
        assert torch.equal(first, degrade(photo, name, 0.6, seeded(1)))
        assert not torch.equal(first, degrade(photo, name, 0.6, seeded(2)))

    def test_generator_advances_and_spares_the_global_one(self, photo: Tensor, name: str) -> None:
        before = torch.get_rng_state()
        generator = seeded()
        first = degrade(photo, name, 0.6, generator)
        assert not torch.equal(first, degrade(photo, name, 0.6, generator))
        assert torch.equal(torch.get_rng_state(), before)

    def test_without_a_generator_the_global_seed_decides(self, photo: Tensor, name: str) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            first = degrade(photo, name, 0.6)
            torch.manual_seed(5)
            assert torch.equal(first, degrade(photo, name, 0.6))

    def test_leaves_the_input_alone(self, photo: Tensor, name: str) -> None:
        clean = photo.clone().requires_grad_()
        assert not degrade(clean, name, 1.0, seeded()).requires_grad
        assert torch.equal(clean, photo)

    def test_harmless_at_zero_and_worse_with_severity(self, photo: Tensor, name: str) -> None:
        quality = [psnr(degrade(photo, name, severity, seeded()), photo) for severity in SEVERITIES]
        assert quality[0] > 33
        assert quality[-1] < 17
        steps = [better - worse for better, worse in pairwise(quality)]
        assert min(steps) > 0.4

    def test_severity_belongs_to_its_sample(self, photo: Tensor, name: str) -> None:
        pair = photo.expand(2, -1, -1, -1)
        mild, severe = degrade(pair, name, torch.tensor([0.0, 1.0]), seeded())
        assert psnr(mild, photo[0]) > 33
        assert psnr(severe, photo[0]) < 17

    def test_samples_of_a_batch_differ(self, photo: Tensor, name: str) -> None:
        first, second = degrade(photo.expand(2, -1, -1, -1), name, 0.6, seeded())
        assert not torch.equal(first, second)


def test_one_name_per_sample(photo: Tensor) -> None:
    batch = degrade(photo.expand(4, -1, -1, -1), NAMES, 0.6, seeded())
    generator = seeded()
    for degraded, name in zip(batch, NAMES, strict=True):
        assert torch.equal(degraded, degrade(photo, name, 0.6, generator)[0])


@pytest.mark.parametrize(("severity", "sigma"), [(0.0, 5), (0.5, 27.5), (1.0, 50)])
def test_noise_has_the_stated_sigma(severity: float, sigma: float) -> None:
    noisy = degrade(gray(0.5), "noise", severity, seeded())
    assert (noisy - 0.5).std().item() * 255 == pytest.approx(sigma, rel=0.02)


def test_rain_only_brightens_and_falls_steeply(photo: Tensor) -> None:
    assert (degrade(photo, "rain", 0.7, seeded()) >= photo - 1e-6).all()
    streaks = degrade(gray(0.2), "rain", 0.7, seeded())
    horizontal = streaks.diff(dim=-1).abs().mean()
    vertical = streaks.diff(dim=-2).abs().mean()
    assert horizontal > 1.5 * vertical


def test_rain_is_sparse_when_light_and_dense_when_heavy() -> None:
    light, heavy = (
        (degrade(gray(0.2), "rain", severity, seeded()) > 0.25).float().mean()
        for severity in (0.1, 1.0)
    )
    assert 0 < light < 0.05
    assert heavy > 0.25


def test_rain_falls_as_densely_at_the_border() -> None:
    rainy = degrade(gray(0.0, side=64, batch=256), "rain", 0.5, seeded())
    border = torch.cat([rainy[:, :, :4], rainy[:, :, -4:]]).mean()
    assert border.item() == pytest.approx(rainy[:, :, 24:40].mean().item(), rel=0.2)


def test_haze_draws_everything_towards_a_smooth_airlight() -> None:
    black, white = (degrade(gray(value), "haze", 1.0, seeded()) for value in (0.0, 1.0))
    transmission = white - black
    assert transmission.min() > 0
    assert transmission.max() < 1
    assert transmission.diff(dim=-1).abs().max() < 0.05
    assert transmission.diff(dim=-2).abs().max() < 0.05
    airlight = black / (1 - transmission)
    assert airlight.min() > 0.7
    assert airlight.max() < 1
    # One airlight per image and channel, whatever the depth.
    assert airlight.amax((2, 3)).sub(airlight.amin((2, 3))).max() < 1e-3


def test_haze_is_thickest_above() -> None:
    many = degrade(gray(0.0, side=32, batch=64), "haze", 0.5, seeded())
    top, bottom = many[:, :, :8].mean(), many[:, :, -8:].mean()
    assert top > bottom + 0.02


def test_low_light_loses_stops_and_crushes_shadows() -> None:
    bright, dim = (degrade(gray(value), "low_light", 1.0, seeded()).mean() for value in (1.0, 0.25))
    assert bright.item() == pytest.approx(2**-3.3, rel=0.02)
    assert dim < 0.15 * bright


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (torch.rand(3, 8, 8), "shape"),
        (torch.rand(1, 1, 8, 8), "shape"),
        (torch.rand(0, 3, 8, 8), "shape"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 8, 8), 255.0), "255"),
        (torch.full((1, 3, 8, 8), -0.1), "-0.1"),
        (torch.full((1, 3, 8, 8), torch.nan), "nan"),
    ],
)
def test_refuses_what_is_not_an_rgb_batch(image: Tensor, complaint: str) -> None:
    with pytest.raises(ImageError, match=complaint):
        degrade(image, "noise", 0.5)


@pytest.mark.parametrize(
    "severity", [-0.1, 1.1, float("nan"), torch.rand(3), torch.rand(2, 1), torch.tensor([0.5, 2.0])]
)
def test_refuses_a_bad_severity(severity: float | Tensor) -> None:
    with pytest.raises(ConfigError, match="severity"):
        degrade(torch.rand(2, 3, 8, 8), "noise", severity)


def test_refuses_unknown_names_and_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'fog'.*noise, rain, haze, low_light"):
        degrade(torch.rand(1, 3, 8, 8), "fog", 0.5)
    with pytest.raises(ConfigError, match="1 names for 2 images"):
        degrade(torch.rand(2, 3, 8, 8), ["noise"], 0.5)
