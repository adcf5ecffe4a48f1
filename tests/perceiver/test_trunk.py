"""The image network of perceive-tiny: any size, folding, and being built by its name."""

import copy

import open_clip
import pytest
import timm
import torch
from tiny_clip import images
from torch import Tensor, nn

from perceive_adapter.errors import ConfigError
from perceive_adapter.perceiver.trunk import TRUNK_NAME, StatisticsTrunk, register_trunk


def small(*, normalised: bool = False) -> StatisticsTrunk:
    """A trunk of few channels, whose last stage has two convolutions as the real one has."""
    return StatisticsTrunk((8, 12, 16, 192), 24, normalised=normalised).eval()


def with_statistics(trunk: StatisticsTrunk) -> StatisticsTrunk:
    """Give the batch normalisations what training would: statistics and scales of their own."""
    trunk.train()
    for seed in range(3):
        trunk(images(4, 3, 40, 40, seed=seed))
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return trunk.eval()


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 7), (2, 2), (3, 5), (4, 4), (5, 4), (9, 33), (64, 48)]
)
@pytest.mark.parametrize("normalised", [False, True])
def test_takes_any_size(size: tuple[int, int], normalised: bool) -> None:
    trunk = small(normalised=normalised)
    features = trunk(images(2, 3, *size))
    assert features.shape == (2, trunk.num_features) == (2, 24)
    assert features.isfinite().all()
    last = trunk.forward_features(images(2, 3, *size))
    assert last.shape == (2, 192, *(-(-side // 16) for side in size))


def test_every_image_of_a_batch_is_read_by_itself() -> None:
    trunk, batch = small(), images(3, 3, 20, 30)
    torch.testing.assert_close(trunk(batch), torch.cat([trunk(image[None]) for image in batch]))


def read(trunk: StatisticsTrunk, image: Tensor) -> Tensor:
    """What the trunk reads of an image, before anything learnable mixes it."""
    pooled = []
    handle = trunk.norm.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    trunk(image)
    handle.remove()
    return pooled[0]


def test_reads_levels_means_and_deviations_of_the_pixels() -> None:
    image = images(2, 3, 24, 16)
    pooled = read(small(), image)
    coarse = image.unflatten(3, (4, 4)).unflatten(2, (6, 4)).mean((3, 5))
    torch.testing.assert_close(pooled[:, :3], coarse.amin((2, 3)))
    torch.testing.assert_close(pooled[:, 3:6], coarse.amax((2, 3)))
    torch.testing.assert_close(pooled[:, 6:9], image.mean((2, 3)))
    deviation = image.std((2, 3), correction=0)
    torch.testing.assert_close(pooled[:, 9:12], deviation, atol=1e-5, rtol=1e-5)


def test_statistics_of_a_constant_image_hardly_hang_on_its_size() -> None:
    trunk = small()
    color = torch.tensor([0.3, -0.8, 1.1]).view(1, 3, 1, 1)
    tile, twice, large = (read(trunk, color.expand(1, 3, side, side)) for side in (128, 256, 512))
    # Of the pixels not at all; of the stages by their borders, whose share falls with the size.
    torch.testing.assert_close(tile[:, :12], large[:, :12])
    assert (tile - large).abs().max() < 0.05
    assert (twice - large).norm() < 0.7 * (tile - large).norm()


def test_convolutions_learn() -> None:
    trunk = small(normalised=True).train()
    trunk(images(2, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trunk.parameters())


class TestFused:
    @pytest.mark.parametrize("size", [(1, 1), (17, 40), (64, 64)])
    def test_gives_the_same_features(self, size: tuple[int, int]) -> None:
        trunk = with_statistics(small(normalised=True))
        image = images(2, 3, *size)
        fused = trunk.fused()
        torch.testing.assert_close(fused(image), trunk(image), atol=1e-5, rtol=1e-5)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())

    def test_fits_a_plain_trunk(self) -> None:
        fused = with_statistics(small(normalised=True)).fused()
        plain = small()
        plain.load_state_dict(fused.state_dict())
        image = images(2, 3, 20, 20)
        assert torch.equal(plain(image), fused(image))

    def test_leaves_the_trunk_in_training(self) -> None:
        trunk = with_statistics(small(normalised=True)).train()
        before = copy.deepcopy(trunk.state_dict())
        state = torch.get_rng_state()
        fused = trunk.fused()
        assert all(module.training for module in trunk.modules())
        assert not any(module.training for module in fused.modules())
        assert all(torch.equal(before[name], value) for name, value in trunk.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        with torch.no_grad():
            next(fused.parameters()).zero_()
        assert all(torch.equal(before[name], value) for name, value in trunk.state_dict().items())

    def test_of_a_plain_trunk_is_a_copy(self) -> None:
        trunk, image = small(), images(1, 3, 20, 20)
        assert torch.equal(trunk.fused()(image), trunk(image))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_precision(dtype: torch.dtype) -> None:
    trunk, image = small(), images(2, 3, 32, 32)
    expected = trunk(image)
    features = trunk.to(dtype)(image.to(dtype))
    assert features.dtype == dtype
    torch.testing.assert_close(features.float(), expected, atol=0.03, rtol=0.03)


class TestByName:
    def test_timm_and_open_clip_build_it(self) -> None:
        register_trunk()
        register_trunk()
        assert isinstance(timm.create_model(TRUNK_NAME), StatisticsTrunk)
        clip = open_clip.CLIP(
            embed_dim=16,
            vision_cfg={"timm_model_name": TRUNK_NAME, "timm_pool": "", "image_size": 256},
            text_cfg={"vocab_size": 9, "context_length": 6, "width": 16, "heads": 2, "layers": 1},
        )
        assert isinstance(clip.visual.trunk, StatisticsTrunk)
        embedding = clip.encode_image(images(2, 3, 31, 20), normalize=True)
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))

    def test_there_are_no_weights_to_download(self) -> None:
        register_trunk()
        with pytest.raises(ConfigError, match=r"QualityPerceiver.from_pretrained"):
            timm.create_model(TRUNK_NAME, pretrained=True)
