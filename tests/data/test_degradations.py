"""The degradations: reproducible, harmless at severity 0, and worse with every step above it."""

import math
from itertools import pairwise

import pytest
import skimage.data
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from perceive_adapter.data import DEGRADATIONS, FAMILIES, FAMILY_OF, KIND_OF, KINDS, degrade, mix
from perceive_adapter.data.degradations.weather import _depth_map
from perceive_adapter.errors import ConfigError, ImageError

NAMES = tuple(DEGRADATIONS)
SEVERITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
DRAW_NOTHING = ("gaussian_blur", "defocus_blur", "downsampling", "jpeg")
RANDOM = tuple(name for name in NAMES if name not in DRAW_NOTHING)
WORST = {
    "haze": 12,
    "rain": 15,
    "low_light": 6,
    "gaussian_blur": 22,
    "defocus_blur": 22.5,
    "motion_blur": 20.5,
    "downsampling": 23.5,
    "gaussian_noise": 16,
    "poisson_noise": 16,
    "correlated_noise": 16,
    "jpeg": 26,
}
"""PSNR in dB below which the highest severity takes the photograph."""


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


def point(side: int = 49, batch: int = 1) -> Tensor:
    image = gray(0.0, side, batch)
    image[:, :, side // 2, side // 2] = 1
    return image


def spread(image: Tensor) -> Tensor:
    """Covariance (B, 2, 2) of the light of images (B, C, H, W), in pixels, (x, y)."""
    light = image.double().mean(1)
    light = light / light.sum((1, 2), keepdim=True)
    side = light.shape[-1]
    y, x = (axis - side // 2 for axis in torch.meshgrid([torch.arange(side)] * 2, indexing="ij"))
    place = torch.stack([x, y]).double()
    mean = torch.einsum("bhw,ihw->bi", light, place)
    return torch.einsum("bhw,ihw,jhw->bij", light, place, place) - mean[:, :, None] * mean[:, None]


def test_registry_cannot_be_changed() -> None:
    assert set(WORST) == set(NAMES)
    with pytest.raises(TypeError):
        DEGRADATIONS["fog"] = DEGRADATIONS["haze"]  # type: ignore[index]


def test_every_degradation_has_a_family() -> None:
    assert tuple(FAMILY_OF) == NAMES
    assert set(FAMILY_OF.values()) == set(FAMILIES)
    assert len(set(FAMILIES)) == len(FAMILIES) == 6
    assert {name for name in NAMES if FAMILY_OF[name] == "blur"} == {
        "gaussian_blur",
        "defocus_blur",
        "motion_blur",
        "downsampling",
    }


def test_kinds_are_finer_than_families() -> None:
    assert tuple(KIND_OF) == NAMES
    assert len(set(KINDS)) == len(KINDS) == 8
    for kind in KINDS:
        assert len({FAMILY_OF[name] for name in NAMES if KIND_OF[name] == kind}) == 1


@pytest.mark.parametrize("name", NAMES)
class TestEveryDegradation:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_keeps_shape_dtype_and_range(
        self, photo: Tensor, name: str, dtype: torch.dtype
    ) -> None:
        image = photo.to(dtype)
        degraded = degrade(image, name, 0.8, seeded())
        assert degraded.shape == photo.shape
        assert degraded.dtype == dtype
        assert degraded.min() >= 0
        assert degraded.max() <= 1
        # The layout must not depend on the precision, or half of it would be another picture.
        torch.testing.assert_close(
            degraded.float(),
            degrade(image.float(), name, 0.8, seeded()),
            atol=max(1e-6, torch.finfo(dtype).eps),
            rtol=0,
        )

    @pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 2), (40, 17)])
    def test_any_size(self, name: str, size: tuple[int, int]) -> None:
        degraded = degrade(torch.rand(2, 3, *size), name, 1.0, seeded())
        assert degraded.shape == (2, 3, *size)
        assert degraded.isfinite().all()

    def test_the_seed_decides_and_the_global_generator_is_spared(
        self, photo: Tensor, name: str
    ) -> None:
        before = torch.get_rng_state()
        first = degrade(photo, name, 0.6, seeded(1))
        assert torch.equal(first, degrade(photo, name, 0.6, seeded(1)))
        assert torch.equal(first, degrade(photo, name, 0.6, seeded(2))) == (name in DRAW_NOTHING)
        assert torch.equal(torch.get_rng_state(), before)

    def test_generator_advances_where_anything_is_random(self, photo: Tensor, name: str) -> None:
        generator = seeded()
        first = degrade(photo, name, 0.6, generator)
        advanced = not torch.equal(generator.get_state(), seeded().get_state())
        assert advanced == (name in RANDOM)
        assert torch.equal(first, degrade(photo, name, 0.6, generator)) != advanced

    def test_without_a_generator_the_global_seed_decides(self, photo: Tensor, name: str) -> None:
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
        assert quality[-1] < WORST[name]
        steps = [better - worse for better, worse in pairwise(quality)]
        assert min(steps) > 0.4

    def test_severity_belongs_to_its_sample(self, photo: Tensor, name: str) -> None:
        pair = photo.expand(2, -1, -1, -1)
        mild, severe = degrade(pair, name, torch.tensor([0.0, 1.0]), seeded())
        assert psnr(mild, photo[0]) > 33
        assert psnr(severe, photo[0]) < WORST[name]


@pytest.mark.parametrize("name", RANDOM)
def test_samples_of_a_batch_differ(photo: Tensor, name: str) -> None:
    first, second = degrade(photo.expand(2, -1, -1, -1), name, 0.6, seeded())
    assert not torch.equal(first, second)


def test_one_name_per_sample(photo: Tensor) -> None:
    batch = degrade(photo.expand(len(NAMES), -1, -1, -1), NAMES, 0.6, seeded())
    generator = seeded()
    for degraded, name in zip(batch, NAMES, strict=True):
        assert torch.equal(degraded, degrade(photo, name, 0.6, generator)[0])


class TestMix:
    def test_is_one_after_the_other_in_the_order_of_the_registry(self, photo: Tensor) -> None:
        generator, one_by_one = seeded(), photo
        for name in NAMES:
            one_by_one = degrade(one_by_one, name, 0.3, generator)
        assert torch.equal(mix(photo, dict.fromkeys(NAMES, 0.3), seeded()), one_by_one)

    def test_order_of_the_mapping_does_not_matter(self, photo: Tensor) -> None:
        severities = dict(zip(NAMES, torch.linspace(0.1, 0.6, len(NAMES)).tolist(), strict=True))
        backwards = dict(reversed(severities.items()))
        assert list(backwards) != list(severities)
        assert torch.equal(mix(photo, severities, seeded()), mix(photo, backwards, seeded()))
        # It could matter: noise after a blur is not blurred.
        noise_last = mix(photo, {"gaussian_noise": 0.5, "gaussian_blur": 0.5}, seeded())
        generator = seeded()
        noise_first = degrade(photo, "gaussian_noise", 0.5, generator)
        noise_first = degrade(noise_first, "gaussian_blur", 0.5, generator)
        assert noise_last.diff(dim=-1).std() > 3 * noise_first.diff(dim=-1).std()

    def test_severity_of_each_sample(self, photo: Tensor) -> None:
        severities = {"jpeg": torch.tensor([0.1, 1.0]), "gaussian_blur": torch.tensor([0.0, 1.0])}
        mild, severe = mix(photo.expand(2, -1, -1, -1), severities)
        assert psnr(mild, photo[0]) > 30
        assert psnr(severe, photo[0]) < 22

    def test_nothing_to_do_is_no_change(self, photo: Tensor) -> None:
        assert torch.equal(mix(photo, {}), photo)

    def test_unknown_name_is_refused(self, photo: Tensor) -> None:
        with pytest.raises(ConfigError, match=r"no degradation 'fog'"):
            mix(photo, {"haze": 0.5, "fog": 0.5})


@pytest.mark.parametrize(("severity", "sigma"), [(0.0, 2), (0.25, 8), (1.0, 50)])
class TestNoise:
    @pytest.mark.parametrize("name", ["gaussian_noise", "poisson_noise", "correlated_noise"])
    def test_has_the_stated_sigma_at_mid_gray(
        self, name: str, severity: float, sigma: float
    ) -> None:
        clean = gray(0.45, batch=16)
        noise = degrade(clean, name, severity, seeded()) - clean
        # Each of the images, however its correlated noise is spread.
        deviations = noise.std(dim=(1, 2, 3)) * 255
        assert deviations.tolist() == pytest.approx([sigma] * 16, rel=0.08)
        assert deviations.mean().item() == pytest.approx(sigma, rel=0.02)
        assert noise.mean().item() * 255 == pytest.approx(0, abs=0.02 * sigma)

    def test_shot_noise_grows_with_the_root_of_the_light(
        self, severity: float, sigma: float
    ) -> None:
        dark, bright = (
            degrade(gray(value), "poisson_noise", severity, seeded()).sub(value).std()
            for value in (0.1, 0.4)
        )
        assert (bright / dark).item() == pytest.approx(2, rel=0.05)

    def test_only_correlated_noise_has_like_neighbours(self, severity: float, sigma: float) -> None:
        clean = gray(0.5, side=64, batch=16)
        likeness = {}
        for name in ("gaussian_noise", "poisson_noise", "correlated_noise"):
            noise = degrade(clean, name, severity, seeded()) - clean
            products = noise[..., 1:] * noise[..., :-1]
            likeness[name] = (products.mean((1, 2, 3)) / noise.square().mean((1, 2, 3))).mean()
        assert likeness["gaussian_noise"].abs() < 0.02
        assert likeness["poisson_noise"].abs() < 0.02
        assert likeness["correlated_noise"] > 0.3


def test_correlated_noise_is_as_strong_at_the_border() -> None:
    clean = gray(0.5, side=24, batch=400)
    noise = (degrade(clean, "correlated_noise", 0.5, seeded()) - clean) * 255
    inside = noise[..., 6:-6, 6:-6].std().item()
    corner, edge = noise[..., :2, :2].std().item(), noise[..., :1, :].std().item()
    assert (corner, edge) == pytest.approx((inside, inside), rel=0.03)
    one = degrade(clean[..., :1, :1], "correlated_noise", 0.5, seeded()) - clean[..., :1, :1]
    assert one.std().item() * 255 == pytest.approx(inside, rel=0.1)


def test_gaussian_blur_has_the_stated_width() -> None:
    blurred = degrade(point(batch=3), "gaussian_blur", torch.tensor([0.2, 0.5, 0.8]))
    covariance = spread(blurred)
    assert covariance[:, 0, 0].sqrt().tolist() == pytest.approx([1.04, 2.15, 3.26], rel=0.03)
    torch.testing.assert_close(covariance[:, 0, 0], covariance[:, 1, 1], rtol=1e-4, atol=1e-4)


def test_defocus_is_an_even_disc() -> None:
    blurred = degrade(point(), "defocus_blur", 1.0)[0, 0]
    # A point becomes a disc of radius 6 of even brightness.
    assert (blurred.sum() / blurred.max()).item() == pytest.approx(math.pi * 36, rel=0.02)
    assert blurred[24, 19:30].min() > 0.99 * blurred.max()
    assert blurred[24, :17].max() < 1e-5


def test_motion_blurs_along_a_path_of_the_stated_length_in_any_direction() -> None:
    blurred = degrade(point(batch=64), "motion_blur", 1.0, seeded())
    values, vectors = torch.linalg.eigh(spread(blurred))
    # A line of length L has the variance L^2 / 12; the path is as wide as a soft pixel, and bent.
    assert values[:, 1].sqrt().tolist() == pytest.approx([21 / 12**0.5] * 64, rel=0.05)
    assert values[:, 0].sqrt().max() < 2
    assert values[:, 0].sqrt().min() < 0.7
    angle = torch.atan2(vectors[:, 1, 1], vectors[:, 0, 1]) % math.pi
    assert angle.div(math.pi / 4).floor().unique().tolist() == [0, 1, 2, 3]


def test_blur_keeps_the_light_and_does_not_darken_the_border(photo: Tensor) -> None:
    for name in ("gaussian_blur", "defocus_blur", "motion_blur"):
        torch.testing.assert_close(degrade(gray(0.6, 20), name, 1.0, seeded()), gray(0.6, 20))
        blurred = degrade(point(), name, 1.0, seeded())
        assert blurred.sum().item() == pytest.approx(3, rel=1e-4)


@pytest.mark.parametrize("severity", [0.4, 1.0])
def test_downsampling_leaves_nothing_above_the_new_nyquist_frequency(severity: float) -> None:
    generator = seeded()
    image = (0.5 + 0.1 * torch.randn(4, 3, 96, 96, generator=generator)).clamp(0, 1)
    small = degrade(image, "downsampling", severity)
    power, before = (
        torch.fft.fft2(x - x.mean((2, 3), keepdim=True)).abs().square().mean((0, 1))
        for x in (small, image)
    )
    frequency = torch.fft.fftfreq(96).abs()
    highest = torch.maximum(frequency[:, None], frequency[None])
    nyquist = 0.5 / (1 + 5 * severity)
    above, below = highest > 1.3 * nyquist, (highest < 0.4 * nyquist) & (highest > 0)
    assert power[above].sum() < 0.02 * before[above].sum()
    assert power[below].sum() > 0.7 * before[below].sum()


def test_jpeg_is_worse_with_every_step_and_shows_its_blocks(photo: Tensor) -> None:
    severities = torch.linspace(0, 1, 9)
    coded = degrade(photo.expand(9, -1, -1, -1), "jpeg", severities)
    quality = [psnr(image, photo[0]) for image in coded]
    assert quality == sorted(quality, reverse=True)

    def blockiness(image: Tensor) -> float:
        steps = image.diff(dim=-1).abs().mean((0, 1))
        return (steps[7::8].mean() / steps.mean()).item()

    assert blockiness(photo[0]) < 1.1
    assert blockiness(coded[-1]) > 1.5


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
    assert airlight.min() > 0.6
    assert airlight.max() < 1
    # One airlight per image and channel, whatever the depth.
    assert airlight.amax((2, 3)).sub(airlight.amin((2, 3))).max() < 1e-3


@pytest.mark.parametrize("severity", [0.0, 0.3, 1.0])
def test_the_severity_of_haze_is_its_mean_optical_depth(severity: float) -> None:
    black, white = (
        degrade(gray(value, side=64, batch=16), "haze", severity, seeded()) for value in (0.0, 1.0)
    )
    thickness = -(white - black).log().mean((1, 2, 3))
    expected = torch.full((16,), 0.03 + 1.37 * severity)
    torch.testing.assert_close(thickness, expected, rtol=1e-4, atol=1e-5)


def test_haze_thickens_at_the_edges_of_things() -> None:
    halves = torch.cat([gray(0.2, side=64), gray(0.7, side=64)], dim=3)[..., :64, :]

    def steps(image: Tensor) -> Tensor:
        depths = _depth_map(image.expand(40, -1, -1, -1), seeded())
        return (depths[..., 68] - depths[..., 59]).abs().mean()

    assert steps(halves) > 1.5 * steps(torch.full_like(halves, 0.45))


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
        degrade(image, "gaussian_noise", 0.5)


@pytest.mark.parametrize(
    "severity", [-0.1, 1.1, float("nan"), torch.rand(3), torch.rand(2, 1), torch.tensor([0.5, 2.0])]
)
def test_refuses_a_bad_severity(severity: float | Tensor) -> None:
    with pytest.raises(ConfigError, match="severity"):
        degrade(torch.rand(2, 3, 8, 8), "gaussian_noise", severity)


def test_refuses_unknown_names_and_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'fog'; there are haze, rain, low_light, .*, jpeg"):
        degrade(torch.rand(1, 3, 8, 8), "fog", 0.5)
    with pytest.raises(ConfigError, match="1 names for 2 images"):
        degrade(torch.rand(2, 3, 8, 8), ["jpeg"], 0.5)
