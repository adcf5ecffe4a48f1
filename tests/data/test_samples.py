"""Crops of photographs and what is done to them: counts, labels, and odd photographs."""

import re
from collections import Counter

import pytest
import skimage.data
import torch
from torch import Tensor

from perceive_adapter.data import DEGRADATIONS, FAMILIES, KIND_OF, KINDS, degrade, mix
from perceive_adapter.data.contents import photos_digest
from perceive_adapter.data.samples import (
    CropSampler,
    as_file,
    as_stored,
    cut,
    degrade_each,
    draw_severities,
    mirrored_to,
    with_surroundings,
)
from perceive_adapter.errors import ConfigError, ImageError


@pytest.fixture(scope="module")
def photos() -> list[Tensor]:
    """Two photographs (3, H, W), uint8."""
    pixels = (skimage.data.astronaut()[::2, ::2], skimage.data.chelsea()[40:240, 100:340])
    return [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in pixels]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestCropSampler:
    def test_crops_are_what_the_seed_decides(self, photos: list[Tensor]) -> None:
        sampler = CropSampler(photos)
        crops = sampler.draw(6, 48, seeded())
        assert crops.shape == (6, 3, 48, 48)
        assert crops.dtype == torch.float32
        assert 0 <= crops.min() < 0.2
        assert 0.8 < crops.max() <= 1
        assert torch.equal(crops, CropSampler(photos).draw(6, 48, seeded()))
        assert not torch.equal(crops, sampler.draw(6, 48, seeded(1)))
        assert len({tuple(crop.flatten().tolist()) for crop in crops}) == 6

    def test_spares_the_global_generator_and_the_photographs(self, photos: list[Tensor]) -> None:
        state, before = torch.get_rng_state(), [photo.clone() for photo in photos]
        CropSampler(photos).draw(8, 300, seeded())
        assert torch.equal(torch.get_rng_state(), state)
        assert all(map(torch.equal, photos, before))

    @pytest.mark.parametrize("size", [(1, 1), (1, 90), (33, 20), (40, 40)])
    def test_small_photograph_is_continued_by_its_mirror_images(
        self, size: tuple[int, int]
    ) -> None:
        y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
        photo = torch.stack([60 + 2 * y, 60 + 2 * x, 255 - y - x]).byte()
        crops = CropSampler([photo]).draw(4, 64, seeded())
        assert crops.shape == (4, 3, 64, 64)
        # No seams: neighbours differ as little as they do inside the photograph, or not at all.
        assert crops.diff(dim=-1).abs().max() < 5 / 255
        assert crops.diff(dim=-2).abs().max() < 5 / 255

    def test_large_photograph_is_shrunk_and_kept_at_several_scales(self) -> None:
        stripes = torch.arange(900).div(8, rounding_mode="floor").remainder(2).mul(255).byte()
        photo = stripes.expand(3, 500, -1)
        sizes = [tuple(level.shape[1:]) for level in CropSampler([photo], 600).pyramids[0]]
        assert sizes == [(333, 600), (236, 424), (167, 300)]

    def test_prefers_crops_with_structure(self) -> None:
        sky = torch.full((3, 150, 150), 128, dtype=torch.uint8)
        # Stripes that are as bright as the sky on average, so that only structure tells.
        stripes = (torch.arange(150) % 4 < 2).mul(255).byte().expand(3, 150, -1)
        crops = CropSampler([sky, stripes]).draw(64, 32, seeded())
        flat = crops.std(dim=(1, 2, 3)) < 0.03
        assert 0 < flat.sum() < 20
        assert CropSampler([sky]).draw(2, 32, seeded()).std(dim=(2, 3)).max() < 1e-3

    def test_light_and_colour_change_a_little(self, photos: list[Tensor]) -> None:
        crops = CropSampler([photos[0][:, :64, :64]]).draw(200, 64, seeded())
        brightness = crops.mean(dim=(1, 2, 3))
        assert brightness.max() > 1.2 * brightness.min()
        gray = (crops - crops.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3)) < 1e-6
        assert gray.float().mean().item() == pytest.approx(0.1, abs=0.06)

    def test_a_share_of_the_crops_becomes_dark_scenes(self, photos: list[Tensor]) -> None:
        usual = CropSampler(photos).draw(200, 32, seeded())
        crops = CropSampler(photos, dark=0.25).draw(200, 32, seeded())
        ratio = crops.mean(dim=(1, 2, 3)) / usual.mean(dim=(1, 2, 3))
        dark = ratio < 0.999
        assert dark.float().mean().item() == pytest.approx(0.25, abs=0.08)
        assert 2**-2 <= ratio[dark].min() < ratio[dark].max() <= 2**-0.5
        assert torch.equal(crops[~dark], usual[~dark])

    def test_what_is_drawn_decides_the_digest(self, photos: list[Tensor]) -> None:
        digests = {photos_digest(CropSampler(photos, dark=dark)) for dark in (0.0, 0.01, 0.04)}
        assert len(digests) == 3

    @pytest.mark.parametrize(
        "photo",
        [
            torch.rand(3, 8, 8),
            torch.zeros(3, 8, 8, dtype=torch.int64),
            torch.zeros(8, 8, 3, dtype=torch.uint8),
            torch.zeros(1, 8, 8, dtype=torch.uint8),
            torch.zeros(8, 8, dtype=torch.uint8),
            torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
            torch.zeros(3, 0, 8, dtype=torch.uint8),
            torch.tensor(3, dtype=torch.uint8),
        ],
        ids=lambda photo: f"{tuple(photo.shape)} {photo.dtype}",
    )
    def test_other_shapes_and_dtypes_are_refused(self, photos: list[Tensor], photo: Tensor) -> None:
        said = f"photos[1] has shape {tuple(photo.shape)} and dtype {photo.dtype}; expected (3, H,"
        with pytest.raises(ImageError, match=re.escape(said)):
            CropSampler([photos[0], photo])

    def test_arrays_are_refused(self, photos: list[Tensor]) -> None:
        with pytest.raises(ImageError, match=r"photos\[0\] is a ndarray; expected a tensor"):
            CropSampler([photos[0].numpy()])  # type: ignore[list-item]

    def test_no_photographs_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="no photographs"):
            CropSampler([])


class TestDrawSeverities:
    def test_counts_and_range(self) -> None:
        drawn = draw_severities(81, seeded(), low=0.3, high=0.7)
        assert Counter(map(len, drawn)) == {0: 9, 1: 54, 2: 9, 3: 9}
        values = [value for severities in drawn for value in severities.values()]
        assert 0.3 <= min(values) < 0.35
        assert 0.65 < max(values) <= 0.7
        assert draw_severities(81, seeded(), low=0.3, high=0.7) == drawn
        assert draw_severities(81, seeded(1), low=0.3, high=0.7) != drawn

    def test_what_comes_on_top_is_milder(self) -> None:
        several = [list(s.values()) for s in draw_severities(4500, seeded()) if len(s) > 1]
        first = [values[0] for values in several]
        others = [value for values in several for value in values[1:]]
        assert sum(first) / len(first) == pytest.approx(0.05 + 0.95 / 2, abs=0.04)
        assert sum(others) / len(others) == pytest.approx(0.05 + 0.95 / 3, abs=0.04)

    def test_kinds_take_turns(self) -> None:
        drawn = draw_severities(72, seeded())
        first = [KIND_OF[next(iter(severities))] for severities in drawn if severities]
        # 64 of 72 images are damaged, each kind's first 8 times.
        assert Counter(first) == dict.fromkeys(KINDS, 8)

    def test_every_kind_is_as_frequent_and_every_degradation_within_it(self) -> None:
        names = [
            name for batch in range(200) for s in draw_severities(72, seeded(batch)) for name in s
        ]
        kinds = Counter(KIND_OF[name] for name in names)
        assert len(names) == 200 * 88
        for kind in KINDS:
            assert kinds[kind] == pytest.approx(2200, rel=0.06)
        sizes = Counter(KIND_OF.values())
        counts = Counter(names)
        for name in DEGRADATIONS:
            kind = KIND_OF[name]
            assert counts[name] == pytest.approx(kinds[kind] / sizes[kind], rel=0.12)

    def test_no_two_of_one_kind(self) -> None:
        for severities in draw_severities(400, seeded()):
            assert len({KIND_OF[name] for name in severities}) == len(severities)


class TestDegradeEach:
    def test_labels_say_what_was_done(self) -> None:
        clean = torch.rand(4, 3, 24, 24, generator=seeded())
        drawn = [{}, {"motion_blur": 0.4}, {"jpeg": 0.9, "haze": 0.2}, {"poisson_noise": 0.7}]
        samples = degrade_each(clean, drawn, seeded())
        labels = [
            {KINDS[column]: round(value, 4) for column, value in enumerate(row) if value}
            for row in samples.severity.tolist()
        ]
        assert labels == [{}, {"motion_blur": 0.4}, {"haze": 0.2, "jpeg": 0.9}, {"noise": 0.7}]
        changed = (samples.degraded != clean).flatten(1).any(dim=1)
        assert changed.tolist() == [False, True, True, True]
        assert torch.equal(samples.clean, clean)

    def test_some_of_the_noise_of_too_little_light_is_taken_back(self) -> None:
        clean = torch.full((90, 3, 24, 24), 0.5)
        samples = degrade_each(clean, 90 * [{"low_light": 0.8}], seeded())
        noise = samples.degraded.std(dim=(1, 2, 3))
        expected = degrade(clean[:1], "low_light", 0.8, seeded()).std()
        assert (noise < 1e-4).float().mean().item() == pytest.approx(1 / 3, abs=0.1)
        assert expected / 2 < noise.max() < 1.1 * expected
        dark = 0.5 ** (1 + 0.6 * 0.8) * 2 ** (-3.3 * 0.8)
        assert samples.degraded.mean(dim=(1, 2, 3)).tolist() == pytest.approx(90 * [dark], rel=0.02)

    def test_a_family_is_as_severe_as_its_worst_kind(self) -> None:
        clean = torch.rand(2, 3, 24, 24, generator=seeded())
        drawn = [{"motion_blur": 0.4, "downsampling": 0.6}, {"downsampling": 0.3, "jpeg": 0.2}]
        severity = degrade_each(clean, drawn, seeded()).family_severity
        labels = [
            {FAMILIES[column]: round(value, 4) for column, value in enumerate(row) if value}
            for row in severity.tolist()
        ]
        assert labels == [{"blur": 0.6}, {"blur": 0.3, "jpeg": 0.2}]

    def test_damages_in_the_order_of_a_photograph(self) -> None:
        clean = torch.rand(1, 3, 24, 24, generator=seeded())
        severities = {"jpeg": 0.9, "rain": 0.6, "defocus_blur": 0.3}
        samples = degrade_each(clean, [severities], seeded(3))
        assert torch.equal(samples.degraded, mix(clean, severities, seeded(3)))

    def test_leaves_the_clean_images_alone(self) -> None:
        clean = torch.rand(8, 3, 16, 16, generator=seeded())
        before = clean.clone()
        degrade_each(clean, draw_severities(8, seeded()), seeded())
        assert torch.equal(clean, before)


class TestAsStored:
    def test_one_in_four_is_a_fine_jpeg_and_all_hold_eight_bits(self, photos: list[Tensor]) -> None:
        crops = CropSampler(photos).draw(200, 32, seeded())
        rounded = as_file(crops)
        stored = as_stored(crops, seeded())
        torch.testing.assert_close(stored, as_file(stored))
        change = (stored - rounded).flatten(1).square().mean(dim=1).sqrt() * 255
        assert 30 <= (change > 0).sum() <= 70
        assert change[change > 0].median() < 4
        assert torch.equal(as_stored(crops, seeded()), stored)

    def test_the_image_itself_stays(self, photos: list[Tensor]) -> None:
        crops = CropSampler(photos).draw(16, 32, seeded())
        before = crops.clone()
        as_stored(crops, seeded())
        assert torch.equal(crops, before)
        assert as_stored(crops[:0], seeded()).shape == (0, 3, 32, 32)


class TestCut:
    def test_one_place_for_all_images_of_a_sample(self) -> None:
        whole = with_surroundings(32)
        rows = torch.arange(whole).view(-1, 1).expand(whole, whole)
        places = torch.stack([rows, rows.T, rows + rows.T]).expand(200, 3, -1, -1).float()
        first, second = cut((places, places + 1), 32, seeded())
        assert first.shape == second.shape == (200, 3, 32, 32)
        assert torch.equal(first + 1, second)
        corners = first[:, :2, 0, 0]
        # JPEG's blocks of chroma are 16 pixels wide: a crop may begin at any of them.
        for axis in (0, 1):
            assert {int(corner) % 16 for corner in corners[:, axis]} == set(range(16))
        # What a blur of the widest kernel mixes with replicated borders is cut off.
        assert corners.min() >= 12
        assert first[:, :2].amax() <= whole - 13

    def test_flips_some_samples_either_way(self) -> None:
        whole = with_surroundings(8)
        rows = torch.arange(whole).view(-1, 1).expand(whole, whole)
        (crops,) = cut((torch.stack([rows, rows.T]).expand(200, 2, -1, -1).float(),), 8, seeded())
        down, right = crops[:, 0, 1, 0] - crops[:, 0, 0, 0], crops[:, 1, 0, 1] - crops[:, 1, 0, 0]
        for step in (down, right):
            assert set(step.tolist()) == {1.0, -1.0}
            assert abs(step.mean()) < 0.3
        assert abs((down * right).mean()) < 0.3

    def test_a_crop_of_a_damaged_photograph_has_no_border(self) -> None:
        whole = with_surroundings(32)
        large = torch.rand(1, 3, 200, 200, generator=seeded())
        middle = large[..., 70 : 70 + whole, 70 : 70 + whole]
        blurred = mix(large, {"gaussian_blur": 1.0})[..., 70 : 70 + whole, 70 : 70 + whole]
        (expected,) = cut((blurred,), 32, seeded())
        (actual,) = cut((mix(middle, {"gaussian_blur": 1.0}),), 32, seeded())
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(1, 90), (90, 1), (5, 7), (64, 64)])
def test_small_photographs_are_mirrored_along_the_sides_that_are_short(
    height: int, width: int
) -> None:
    photo = torch.arange(height * width).view(1, height, width)
    mirrored = mirrored_to(photo, 64)
    assert torch.equal(mirrored[:, :height, :width], photo)
    for found, side in zip(mirrored.shape[1:], (height, width), strict=True):
        assert found == side if side >= 64 else 64 <= found < 128
