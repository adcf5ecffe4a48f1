"""restore(): any kind of image in, the same kind out; one perception, any size, tiles or whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from PIL import Image
from torch import Tensor, nn
from wrapping import moved, relative, wrapped
from zoo import CASES

from perceive_adapter import (
    AdapterConfig,
    BackboneError,
    ConfigError,
    ImageError,
    PerceiveModel,
    Perception,
    PerceptionError,
    wrap,
)

PIXELS = np.random.default_rng(0).random((21, 34, 4))


def folded(model: PerceiveModel, image: Tensor) -> Any:
    """What the model itself gives with its branches folded, as restore() runs it."""
    with model.fold(model.perceive(image)):
        return model(image.clone())


@pytest.fixture(scope="module")
def model() -> PerceiveModel:
    return wrapped("u_shape")


# The bare backbone


def test_nothing_is_perceived_for_the_bare_backbone() -> None:
    """An adapter that waits for what it is told restores with nothing, too, where it is off."""
    model = wrapped("u_shape", config=AdapterConfig(sources={"degradations": 5}))
    image = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(PerceptionError):
        model.restore(image)
    with model.disabled():
        assert torch.equal(model.restore(image), model(image))
        assert relative(model.restore(image, tile=32, overlap=8), model(image)) < 0.1


# Kinds


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_pil_images(mode: str, model: PerceiveModel) -> None:
    image = Image.fromarray((PIXELS * 255).astype(np.uint8)).convert(mode)
    restored = model.restore(image)
    assert (restored.mode, restored.size) == (mode, image.size)
    if mode in ("LA", "RGBA"):
        assert restored.getchannel("A").tobytes() == image.getchannel("A").tobytes()
    assert restored.tobytes() != image.tobytes()


def test_pil_images_keep_their_colour_space(model: PerceiveModel) -> None:
    image = Image.fromarray((PIXELS[..., :3] * 255).astype(np.uint8))
    image.info["icc_profile"] = b"of the camera"
    for same in (image, image.convert("P")):
        assert model.restore(same).info["icc_profile"] == b"of the camera"
    assert "icc_profile" not in model.restore(Image.fromarray(np.array(image))).info


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_what_diverged_gives_no_image(kind: Any) -> None:
    model = wrapped("u_shape")
    with torch.no_grad():
        next(model.injector.parameters()).fill_(torch.nan)
    with pytest.raises(BackboneError, match=r"NaN or infinite.*torch\.float32"):
        model.restore(PIXELS[..., :3].astype(kind))
    with model.disabled():
        model.restore(PIXELS[..., :3].astype(np.float32))


def test_palettes_become_colours(model: PerceiveModel) -> None:
    image = Image.fromarray((PIXELS[..., :3] * 255).astype(np.uint8)).convert("P")
    assert model.restore(image).mode == "RGB"
    image.info["transparency"] = 0
    assert model.restore(image).mode == "RGBA"


@pytest.mark.parametrize("make", [str, Path])
def test_paths_give_pil_images(make: Any, model: PerceiveModel, tmp_path: Path) -> None:
    image = Image.fromarray((PIXELS[..., :3] * 255).astype(np.uint8))
    image.save(tmp_path / "image.png")
    restored = model.restore(make(tmp_path / "image.png"))
    assert np.array_equal(np.array(restored), np.array(model.restore(image)))


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
def test_arrays(dtype: Any, channels: int | None, model: PerceiveModel) -> None:
    image = PIXELS[..., 0] if channels is None else PIXELS[..., :channels]
    image = (image * 255).astype(dtype) if dtype is np.uint8 else image.astype(dtype)
    before = image.copy()
    restored = model.restore(image)
    assert (type(restored), restored.dtype, restored.shape) == (np.ndarray, dtype, image.shape)
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("shape", [(21, 34), (1, 21, 34), (3, 21, 34), (4, 9, 8), (2, 2, 8, 9)])
def test_tensors(dtype: torch.dtype, shape: tuple[int, ...], model: PerceiveModel) -> None:
    image = (torch.rand(shape) * (255 if dtype == torch.uint8 else 1)).to(dtype)
    restored = model.restore(image)
    assert (restored.dtype, restored.shape) == (dtype, image.shape)
    assert not restored.requires_grad
    assert restored.double().sub(image.double()).abs().max() > 0


@pytest.mark.parametrize("model_dtype", [torch.bfloat16, torch.float64])
def test_the_model_may_have_another_precision(model_dtype: torch.dtype) -> None:
    image = torch.rand(1, 3, 32, 32)
    expected = wrapped("u_shape").restore(image)
    restored = wrapped("u_shape").to(model_dtype).restore(image)
    assert restored.dtype == torch.float32
    assert relative(restored, expected) < (0.1 if model_dtype == torch.bfloat16 else 1e-5)


def test_double_precision_stays_double() -> None:
    model, image = wrapped("u_shape").double(), torch.rand(1, 3, 64, 64).double()
    assert relative(model.restore(image), folded(model, image)) < 1e-12


def test_one_kind_of_image_is_the_other(model: PerceiveModel) -> None:
    tensor = torch.rand(3, 21, 34)
    array = tensor.permute(1, 2, 0).numpy()
    expected = model.restore(tensor)
    assert np.array_equal(model.restore(array), expected.permute(1, 2, 0).numpy())
    assert torch.equal(model.restore(tensor[None])[0], expected)
    rounded = model.restore((tensor * 255).round().to(torch.uint8))
    near = model.restore((tensor * 255).round() / 255).mul(255).round().clamp(0, 255)
    assert torch.equal(rounded, near.to(torch.uint8))


def test_a_batch_is_perceived_image_by_image(model: PerceiveModel) -> None:
    batch = torch.rand(2, 3, 32, 32) * torch.tensor([1.0, 0.2]).view(2, 1, 1, 1)
    each = torch.cat([model.restore(image[None]) for image in batch])
    assert torch.equal(model.restore(batch), each)


def test_what_is_perceived_may_be_given(model: PerceiveModel) -> None:
    batch, others = torch.rand(2, 2, 3, 32, 32)
    seen = model.perceive(others)
    each = torch.cat([model.restore(one[None], perception=seen[i]) for i, one in enumerate(batch)])
    assert torch.equal(model.restore(batch, perception=seen), each)
    assert not torch.equal(model.restore(batch), each)
    shared = model.restore(batch, perception=seen[0])
    assert torch.equal(shared[0], each[0])
    with pytest.raises(PerceptionError, match="is of 2 images and the batch has 1"):
        model.restore(batch[:1], perception=seen)


def test_an_adapter_that_is_steered_by_an_oracle_restores_with_it() -> None:
    config = AdapterConfig(sources={"degradations": 2})
    steered = wrap(CASES["u_shape"].net(), config=config)
    moved(steered.injector)
    image, told = torch.rand(1, 3, 32, 32), Perception(degradations=torch.tensor([[1.0, 0.0]]))
    expected = steered(image, perception=told)
    assert relative(steered.restore(image, perception=told), expected) < 1e-5
    with pytest.raises(PerceptionError, match=r"give it: perception=Perception\(...\)"):
        steered.restore(image)


# Sizes


@pytest.mark.parametrize(
    "case",
    ["u_shape", "isotropic", "tuple", "list", "dict", "dataclass", "keyword", "swinir", "nafnet"],
)
def test_an_image_of_fitting_size_is_what_the_model_gives(case: str) -> None:
    toy = CASES[case]
    model, image = wrapped(toy), toy.images(size=64)
    with model.fold(model.perceive(image)):
        expected = toy.run(model, image)
    assert torch.equal(model.restore(image), expected)


def test_a_large_image_is_what_a_plain_call_gives(model: PerceiveModel) -> None:
    image = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(model.restore(image), model(image))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 2), (63, 65), (70, 13)])
@pytest.mark.parametrize("case", ["u_shape", "isotropic", "multiple", "tokens", "swinir"])
def test_any_size(case: str, size: tuple[int, int]) -> None:
    restored = wrapped(case).restore(torch.rand(1, 3, *size))
    assert restored.shape == (1, 3, *size)
    assert restored.isfinite().all()


class AtLeast(zoo.UShape):
    def forward(self, image: Tensor) -> Tensor:
        if min(image.shape[-2:]) < 16:
            raise ValueError("too small")
        return super().forward(image)


def test_images_smaller_than_the_network_takes_are_mirrored() -> None:
    assert wrap(AtLeast()).restore(torch.rand(3, 5, 90)).shape == (3, 5, 90)


def test_padding_reflects_and_is_cropped() -> None:
    model, image = wrapped("multiple"), torch.rand(1, 3, 61, 64)
    assert model.size_multiple == 8
    padded = torch.cat([image, image[..., 57:60, :].flip(-2)], dim=-2)
    seen = model.perceive(image)
    with model.fold(seen):
        expected = model(padded)[..., :61, :]
    assert torch.equal(model.restore(image), expected)


@pytest.mark.parametrize(("case", "multiple"), [("isotropic", 1), ("u_shape", 4), ("tokens", 4)])
def test_the_size_multiple_is_found_by_trying(case: str, multiple: int) -> None:
    assert wrapped(case).size_multiple == multiple


# Channels and ranges


def _on_a_gpu() -> None:
    raise torch.OutOfMemoryError("made up")


def _in_python() -> None:
    raise MemoryError


def _on_a_cpu() -> None:
    torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("fail", [_on_a_gpu, _in_python, _on_a_cpu])
def test_a_size_that_does_not_fit_into_memory_is_not_taken_for_a_wrong_one(fail: Any) -> None:
    model = wrapped("u_shape")
    model.backbone.register_forward_pre_hook(lambda *_: fail())
    with pytest.raises((MemoryError, RuntimeError), match=r"^$|made up|allocate"):
        _ = model.size_multiple


def test_an_upscaler_enlarges_colours_and_alpha() -> None:
    model = wrapped("upscaler")
    image = torch.rand(4, 21, 34)
    image[3] = 0.25
    restored = model.restore(image)
    assert restored.shape == (4, 42, 68)
    torch.testing.assert_close(restored[3], torch.full((42, 68), 0.25))
    assert torch.equal(restored[:3], folded(model, image[None, :3])[0])
    pil = Image.fromarray((PIXELS * 255).astype(np.uint8))
    assert model.restore(pil).size == (68, 42)


def test_gray_on_a_colour_network_is_the_mean_of_its_colours(model: PerceiveModel) -> None:
    gray = torch.rand(1, 1, 32, 32)
    expected = folded(model, gray.expand(-1, 3, -1, -1)).mean(dim=1, keepdim=True)
    torch.testing.assert_close(model.restore(gray), expected)


def test_colours_on_a_gray_network_are_restored_each() -> None:
    model, image = wrapped("gray"), torch.rand(2, 3, 32, 32)
    expected = []
    for one in image:
        with torch.no_grad(), model.fold(model.perceive(one.mean(0)[None, None])):
            expected.append(torch.cat([model(plane[None, None])[0] for plane in one]))
    torch.testing.assert_close(model.restore(image), torch.stack(expected))


def test_a_gray_network_perceives_a_colour_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = wrapped("gray", perceiver="perceive-tiny"), []
    perceive = model.perceiver.forward
    monkeypatch.setattr(model.perceiver, "forward", lambda x: seen.append(x) or perceive(x))
    image = torch.rand(3, 32, 32)
    model.restore(image)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], image.mean(0).expand(1, 3, -1, -1))


def test_errors_of_the_network_itself_are_its_own() -> None:
    class Broken(nn.Sequential):
        broken = False

        def forward(self, image: Any) -> Any:
            return super().forward(image + None if self.broken else image)

    model = wrap(Broken(zoo.conv(3, 8), zoo.conv(8, 3)), perceiver=False)
    model.restore(torch.rand(3, 32, 32))
    model.backbone.broken = True
    with pytest.raises(TypeError, match="unsupported operand"):
        model.restore(torch.rand(3, 32, 32))


def test_an_image_that_has_neither_place_nor_name() -> None:
    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(zoo.conv(3, 8), zoo.conv(8, 3))

        def forward(self, *args: Tensor) -> Tensor:
            restored: Tensor = self.body(args[1])
            return restored

    image = torch.rand(1, 3, 32, 32)
    model = wrap(Second(), image_arg=1, example=(image, image), perceiver=False)
    model(image, image)
    with pytest.raises(ConfigError, match="image is argument 1, whose name its signature does not"):
        model.restore(image)


def test_other_numbers_of_channels_are_for_the_model_itself() -> None:
    with pytest.raises(ImageError, match="takes 5 channels"):
        wrapped("five_channels").restore(torch.rand(3, 32, 32))


@pytest.mark.parametrize(
    "value_range", [(-1, 1), (0, 255), ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])], ids=str
)
def test_images_are_mapped_to_the_backbones_range_and_back(value_range: Any) -> None:
    model, image = wrapped("isotropic", value_range=value_range), torch.rand(1, 3, 32, 32)
    inside = model.value_range.from_unit(image)
    expected = model.value_range.to_unit(folded(model, inside))
    torch.testing.assert_close(model.restore(image), expected)
    bare = wrapped("isotropic", value_range=value_range, trained=False)
    with torch.no_grad():
        restored = model.value_range.to_unit(CASES["isotropic"].net()(inside))
    torch.testing.assert_close(bare.restore(image), restored)


# Tiles


def local() -> PerceiveModel:
    """Strided down and shuffled up; each output pixel sees about 20 input pixels around it."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.GELU(),
        zoo.Block(8),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.PixelShuffle(2),
    )
    model = wrap(net)
    moved(model.injector)
    return model


@pytest.mark.parametrize(
    ("tile", "overlap", "batch_size"),
    [(64, 24, 1), (64, 24, 3), (48, 22, 4), (97, 31, 2), (65, 32, 1), (1000, 32, 1), (53, 25, 7)],
)
@pytest.mark.parametrize("size", [(101, 143), (64, 200)])
def test_tiles_of_a_local_network_give_the_whole(
    size: tuple[int, int], tile: int, overlap: int, batch_size: int
) -> None:
    model, image = local(), torch.rand(1, 3, *size)
    whole = model.restore(image)
    assert (
        model.restore(image, tile=tile, overlap=overlap, batch_size=batch_size) - whole
    ).abs().max() < 1e-5


def test_too_little_overlap_shows_seams() -> None:
    model, image = local(), torch.rand(1, 3, 101, 143)
    seams = (model.restore(image, tile=48, overlap=0) - model.restore(image)).abs().max()
    assert 1e-4 < seams < 1


class OneSize(nn.Module):
    """Takes images of 64 px only, as networks with learned positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = zoo.conv(3, 16), zoo.conv(16, 3)
        self.position = nn.Parameter(0.1 * torch.rand(16, 64, 64))

    def forward(self, image: Tensor) -> Tensor:
        return image + self.tail(self.head(image) + self.position)


@pytest.mark.parametrize(("tile", "overlap"), [(64, 16), (48, 16), (64, 31)])
def test_tiles_of_a_network_that_takes_one_size_cover_the_image(tile: int, overlap: int) -> None:
    model = wrap(OneSize(), perceiver=False)
    image = torch.rand(1, 3, 128, 150)
    restored = model.restore(image, tile=tile, overlap=overlap)
    assert (restored - image).abs().max() < 1  # and a number everywhere


def test_a_tile_of_one_step_of_the_networks_grid_is_made_larger() -> None:
    net = nn.Sequential(
        *[nn.Conv2d(width, 8, 2, stride=2) for width in (3, 8, 8, 8, 8, 8)],
        *[nn.ConvTranspose2d(8, width, 2, stride=2) for width in (8, 8, 8, 8, 8, 3)],
    )  # a grid of 64 px, and nothing that looks over its borders
    model, image = wrap(net, perceiver=False), torch.rand(1, 3, 192, 256)
    tiled = model.restore(image, tile=48, overlap=16)
    assert (tiled - model.restore(image)).abs().max() < 1e-5


def test_tiles_of_an_upscaler() -> None:
    model, image = wrapped("upscaler"), torch.rand(1, 4, 75, 90)
    whole = model.restore(image)
    tiled = model.restore(image, tile=56, overlap=26, batch_size=2)
    assert whole.shape == (1, 4, 150, 180)
    assert (tiled - whole).abs().max() < 1e-5


class Resizing(zoo.Isotropic):
    """Gives images of another size, rounded where that is no integer."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, image: Tensor) -> Tensor:
        sides = [round(side * self.scale) for side in image.shape[-2:]]
        return F.interpolate(super().forward(image), size=sides)


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.25, 4 / 3, 1.5])
def test_tiles_of_a_network_with_a_fractional_scale(scale: float) -> None:
    torch.manual_seed(0)
    model, image = wrap(Resizing(scale), perceiver=False), torch.rand(1, 3, 120, 144)
    assert model.sites.scale == scale
    whole = model.restore(image)
    assert (model.restore(image, tile=61, overlap=24) - whole).abs().max() < 1e-5
    odd = model.restore(image[..., 1:, 1:], tile=41, overlap=1)
    assert odd.shape[-2:] == (round(119 * scale), round(143 * scale))


@pytest.mark.parametrize("tile", [None, 32])
def test_an_image_is_perceived_once_and_as_a_whole(
    tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen, perceive = wrapped("multiple"), [], PerceiveModel.perceive

    def counted(self: PerceiveModel, image: Tensor) -> Any:
        seen.append(tuple(image.shape))
        return perceive(self, image)

    monkeypatch.setattr(PerceiveModel, "perceive", counted)
    model.restore(torch.rand(1, 3, 70, 90), tile=tile, overlap=8)
    assert seen == [(1, 3, 70, 90)]


def test_tiles_run_in_batches(model: PerceiveModel) -> None:
    batches: list[int] = []
    assert model.size_multiple == 4  # found by runs of its own
    handle = model.backbone.intro.register_forward_pre_hook(lambda m, a: batches.append(len(a[0])))
    try:
        model.restore(torch.rand(1, 3, 96, 96), tile=48, overlap=16, batch_size=4)
    finally:
        handle.remove()
    assert max(batches) == 4
    assert sum(batches) == 9


def test_tiles_of_a_model_compiled_in_place() -> None:
    model, image = wrapped("isotropic"), torch.rand(1, 3, 70, 70)
    image[..., :35] *= 0.1
    expected = model.restore(image, tile=32, overlap=8)
    model.compile(backend="eager")
    assert relative(model.restore(image, tile=32, overlap=8), expected) < 1e-5


# What is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tile": 0, "overlap": 0}, "tile=0"),
        ({"tile": 64, "overlap": 32}, "larger than twice the overlap"),
        ({"tile": -4, "overlap": -9}, "overlap=-9"),
        ({"overlap": -1}, "overlap >= 0"),
        ({"batch_size": 0}, "batch_size >= 1"),
    ],
)
def test_bad_tiles_are_refused(options: dict[str, int], said: str, model: PerceiveModel) -> None:
    with pytest.raises(ConfigError, match=said):
        model.restore(torch.rand(3, 100, 100), **options)


@pytest.mark.parametrize("tile", [64.5, "64"])
def test_tiles_that_are_no_integers_are_refused(tile: Any, model: PerceiveModel) -> None:
    with pytest.raises(ConfigError, match="tile="):
        model.restore(torch.rand(3, 100, 100), tile=tile)


def test_a_network_that_needs_more_than_an_image_says_so() -> None:
    with pytest.raises(BackboneError, match="with the image alone, and it needs more"):
        wrapped("noise_level").restore(torch.rand(3, 32, 32))


@pytest.mark.parametrize("bad", [False, True])
def test_modes_are_put_back(bad: bool) -> None:
    model = wrapped("mixed").train()
    model.backbone.layers[3].eval()
    modes = [module.training for module in model.modules()]
    if bad:
        with pytest.raises(ImageError):
            model.restore(torch.full((3, 9, 9), torch.nan))
    else:
        first = model.restore(torch.rand(3, 9, 9))
        assert first.isfinite().all()
    assert [module.training for module in model.modules()] == modes


def test_restoring_leaves_no_gradient_and_no_fold_behind(model: PerceiveModel) -> None:
    parameters = [id(p) for p in model.parameters()]
    model.restore(torch.rand(3, 32, 32))
    assert [id(p) for p in model.parameters()] == parameters
    assert model(torch.rand(1, 3, 32, 32)).requires_grad


def test_of_images_at_several_scales_the_full_one_is_restored() -> None:
    model, image = wrapped("scales"), CASES["scales"].images(1)
    _, full = model(image)
    restored = model.restore(image)
    assert restored.shape == image.shape
    torch.testing.assert_close(restored, full, rtol=0, atol=1e-5)


def _between(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(zoo.conv(inputs, 8), nn.GELU(), zoo.conv(8, outputs))


def test_networks_that_change_the_number_of_channels() -> None:
    colours = wrap(_between(1, 3), perceiver=False)
    gray = torch.rand(20, 20)
    assert colours.restore(gray[None]).shape == (3, 20, 20)
    assert torch.equal(colours.restore(gray), colours.restore(gray[None]))
    restored = colours.restore(gray.numpy())
    assert np.array_equal(restored, colours.restore(gray).permute(1, 2, 0).numpy())
    eight = gray.mul(255).byte().numpy()
    assert np.array_equal(colours.restore(Image.fromarray(eight)), colours.restore(eight))
    with pytest.raises(ImageError, match="turns gray images into 3 channels; give a gray one"):
        colours.restore(torch.rand(3, 20, 20))
    assert wrap(_between(3, 1), perceiver=False).restore(torch.rand(3, 20, 20)).shape == (1, 20, 20)
    with pytest.raises(BackboneError, match="1 or 3 channels"):
        wrap(_between(3, 2), perceiver=False).restore(torch.rand(3, 20, 20))


class OneShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.offset = zoo.Isotropic(), nn.Parameter(torch.zeros(1, 3, 24, 40))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.body(image + self.offset)


@pytest.mark.parametrize("size", [(24, 40), (20, 33)])
def test_a_network_of_one_shape_restores_what_fits(size: tuple[int, int]) -> None:
    model = wrap(OneShape(), perceiver=False, example=torch.rand(1, 3, 24, 40))
    assert model.restore(torch.rand(3, *size)).shape == (3, *size)


def test_a_range_of_other_channels_is_refused(tmp_path: Path) -> None:
    net, three = _between(1, 1), ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    with pytest.raises(ConfigError, match="3 means and stds, and the backbone's images have 1"):
        wrap(net, value_range=three)
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(
    "image",
    [torch.rand(3, 64, 64), torch.rand(1, 4, 64, 64), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)],
    ids=["no batch", "four channels", "uint8"],
)
def test_what_is_no_batch_of_images_is_not_perceived(
    image: torch.Tensor, model: PerceiveModel
) -> None:
    with pytest.raises(ImageError, match=r"expected a floating-point tensor \(B, 3, H, W\)"):
        model.perceive(image)


def test_an_opened_photograph_is_turned_as_its_file_is(
    model: PerceiveModel, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray((PIXELS[:20, :, :3] * 255).astype(np.uint8))
    image.save(tmp_path / "turned.png", exif=exif)
    by_path = model.restore(tmp_path / "turned.png")
    opened = model.restore(Image.open(tmp_path / "turned.png"))
    assert opened.size == by_path.size == image.size[::-1]
    assert opened.tobytes() == by_path.tobytes()
