"""The audit: its figures are what calling the perceiver by hand gives."""

from itertools import pairwise

import pytest
import scipy.stats
import skimage.data
import torch
from tiny_clip import VIT, trained
from torch import Tensor, nn

from perceive_adapter.data import FAMILIES, FAMILY_OF
from perceive_adapter.data.samples import with_surroundings
from perceive_adapter.data.triplets import Milder, Restored, Scene
from perceive_adapter.errors import ConfigError
from perceive_adapter.perceiver import QualityPerceiver
from perceive_adapter.perceiver.audit import LEVELS, Audit, Findings, audit, spearman

NAMES = ("rain", "motion_blur", "gaussian_noise", "jpeg")


@pytest.fixture(scope="module")
def photos() -> list[Tensor]:
    """(3, H, W) uint8, small and of different sizes."""
    pixels = (skimage.data.chelsea()[100:148, 150:190], skimage.data.coffee()[100:133, 150:200])
    return [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in pixels]


@pytest.fixture(scope="module")
def perceiver() -> QualityPerceiver:
    return trained(VIT, degradations=FAMILIES)


def as_file(image: Tensor) -> Tensor:
    return (image * 255).round() / 255


@pytest.mark.parametrize("seed", range(4))
def test_spearman_is_scipys(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(5, (8,), generator=generator).float()  # with ties
    assert len(values.unique()) < 8
    expected = scipy.stats.spearmanr(values.numpy(), LEVELS).statistic
    assert spearman(values, LEVELS) == pytest.approx(expected, abs=1e-9)


def test_spearman_of_orders() -> None:
    rising = torch.tensor([0.1, 0.2, 0.7, 0.9])
    assert spearman(rising, (0, 1, 2, 3)) == pytest.approx(1)
    assert spearman(-rising, (0, 1, 2, 3)) == pytest.approx(-1)
    assert spearman(torch.ones(4), (0, 1, 2, 3)) == 0


def test_figures_are_those_of_calling_the_perceiver_by_hand(
    photos: list[Tensor], perceiver: QualityPerceiver
) -> None:
    figures = audit(perceiver, photos, degradations=NAMES, seed=3).figures()
    for kind, name in enumerate(NAMES):
        column = FAMILIES.index(FAMILY_OF[name])
        right, together, monotonic, ranks, types, severities = ([] for _ in range(6))
        for index, photo in enumerate(photos):
            clean = photo[None].float() / 255
            seed = (3 * 1009 + index) * 1009 + kind
            damaged = [as_file(Scene(clean, {name: s}, seed).degraded()) for s in LEVELS]
            told = [perceiver(image) for image in damaged]
            low = damaged[4 + seed % 4]
            milder = 0.4 * LEVELS[4 + seed % 4]
            half = as_file(Scene(clean, {name: milder}, seed).degraded())
            triplet = [perceiver(image) for image in (low, half, clean)]
            tiers = [one.tiers.argmax().item() == tier for tier, one in enumerate(triplet)]
            right += tiers
            together.append(all(tiers))
            monotonic.append(all(a.score < b.score for a, b in pairwise(triplet)))
            scores = [one.score.item() for one in told]
            ranks.append(scipy.stats.spearmanr(scores, LEVELS).statistic)
            types += [one.degradations.argmax().item() == column for one in told[3:]]
            severity = [one.severity[0, column].item() for one in told]
            severities.append(scipy.stats.spearmanr(severity, LEVELS).statistic)
        by_hand = {
            "tier accuracy": sum(right) / len(right),
            "triplets right": sum(together) / len(together),
            "monotonic": sum(monotonic) / len(monotonic),
            "score rank": -sum(ranks) / len(ranks),
            "type accuracy": sum(types) / len(types),
            "severity rank": sum(severities) / len(severities),
        }
        assert figures[name] == pytest.approx(by_hand, abs=0.05)  # a rank may turn by rounding
    for column in figures["mean"]:
        rows = [figures[name][column] for name in NAMES]
        assert figures["mean"][column] == pytest.approx(sum(rows) / len(rows))
        assert figures["worst"][column] == min(rows)


def test_is_reproducible_and_hangs_on_the_seed(
    photos: list[Tensor], perceiver: QualityPerceiver
) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        audit(perceiver, photos[:1], degradations=["rain"], seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_medium_sees_the_scene_and_its_fold(
    photos: list[Tensor], perceiver: QualityPerceiver
) -> None:
    """Restorers that paint all black or all white tell which of them was asked."""

    class Gray(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, image: Tensor) -> Tensor:
            return torch.full_like(image, self.value)

    medium = Restored([Gray(0.0), Gray(1.0)], remains=1.0)
    found = audit(perceiver, photos, medium=medium, degradations=["haze"]).findings["haze"]
    for index, (photo, scores) in enumerate(zip(photos, found.scores, strict=True)):
        flat = torch.full((1, *photo.shape), 1.0 - index)  # the other fold's
        assert scores[1] == pytest.approx(perceiver(flat).score.item(), abs=1e-5)


def test_without_heads_there_is_no_type(photos: list[Tensor]) -> None:
    figures = audit(trained(VIT), photos[:1], degradations=["haze"]).figures()
    assert set(figures["haze"]) == {"tier accuracy", "triplets right", "monotonic", "score rank"}


def test_figures_and_table_of_known_findings() -> None:
    good = Findings(
        tiers=[(True, True, True), (True, True, True)],
        scores=[(0.1, 0.5, 0.9), (0.2, 0.4, 0.8)],
        score_rank=[1.0, 0.5],
    )
    poor = Findings(
        tiers=[(True, False, True), (True, True, True)],
        scores=[(0.1, 0.5, 0.5), (0.2, 0.4, 0.8)],
        score_rank=[0.5, -0.5],
    )
    table = Audit({"haze": good, "low_light": poor}).table()
    assert table.splitlines() == [
        "| degradation | tier accuracy | triplets right | monotonic | score rank |",
        "|---|---|---|---|---|",
        "| haze | 1.000 | 1.000 | 1.000 | 0.750 |",
        "| low light | 0.833 | 0.500 | 0.500 | 0.000 |",
        "| mean | 0.917 | 0.750 | 0.750 | 0.375 |",
        "| worst | 0.833 | 0.500 | 0.500 | 0.000 |",
    ]


def test_refuses_what_it_cannot_judge(photos: list[Tensor], perceiver: QualityPerceiver) -> None:
    two = trained(VIT, tiers=("low", "high"))
    with pytest.raises(ConfigError, match="needs three tiers"):
        audit(two, photos)
    with pytest.raises(ConfigError, match="0 photographs"):
        audit(perceiver, [])
    with pytest.raises(ConfigError, match="at least one degradation"):
        audit(perceiver, photos, degradations=[])
    with pytest.raises(ConfigError, match=r"no degradations \['fog'\]; there are haze"):
        audit(perceiver, photos, degradations=["haze", "fog"])
    with pytest.raises(ConfigError, match=r"tells \('noise',\), which \['haze'\] do not"):
        audit(trained(VIT, degradations=("noise",)), photos, degradations=["haze"])


def test_milder_damage_is_the_medium_unless_another_is_given(
    photos: list[Tensor], perceiver: QualityPerceiver
) -> None:
    arguments = {"degradations": ["jpeg"]}
    own = audit(perceiver, photos[:1], **arguments)
    assert own == audit(perceiver, photos[:1], medium=Milder(0.4), **arguments)
    assert own != audit(perceiver, photos[:1], medium=Milder(0.9), **arguments)


def test_a_patch_shows_nothing_of_the_border(perceiver: QualityPerceiver) -> None:
    side = with_surroundings(48)
    pixels = skimage.data.chelsea()[100 : 100 + side, 150 : 150 + side].copy()
    photo = torch.from_numpy(pixels).permute(2, 0, 1)
    framed = photo.clone()
    framed[:, [0, -1]] = 0
    framed[:, :, [0, -1]] = 255
    names = ("gaussian_blur", "motion_blur", "gaussian_noise", "rain")
    for seed in range(4):
        first, second = (
            audit(perceiver, [one], degradations=names, patch=48, seed=seed).findings
            for one in (photo, framed)
        )
        for name in names:
            assert first[name].tiers == second[name].tiers
            assert first[name].scores[0] == pytest.approx(second[name].scores[0], abs=1e-4)
    with pytest.raises(ConfigError, match="patch=49 needs photographs of 88 pixels"):
        audit(perceiver, [photo], patch=49)
