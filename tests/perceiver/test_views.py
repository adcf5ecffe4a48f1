"""Native-resolution views."""

import itertools
from collections.abc import Callable

import pytest
import torch

from perceive_adapter.data.traced_views import traced_views
from perceive_adapter.data.views import even_views, flipped_views, native_views
from perceive_adapter.errors import ConfigError, ImageError


def positions(height: int, width: int) -> torch.Tensor:
    """An image (1, 2, H, W) whose pixels know where they are."""
    grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(grid)[None].float()


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 16])
def test_grid(limit: int) -> None:
    for height, width in itertools.product([1, 31, 32, 33, 64, 70, 300], repeat=2):
        image = positions(height, width)
        views = native_views(image, 32, limit)
        count = views.shape[1]
        crop = min(32, height), min(32, width)
        needed = -(-height // 32) * -(-width // 32)
        assert views.shape == (1, count, 2, *crop)
        assert 1 <= count <= min(limit, needed)
        assert limit < needed or count == needed
        for view in views[0]:
            top, left = view[:, 0, 0].int().tolist()
            assert torch.equal(view, image[0, :, top : top + crop[0], left : left + crop[1]])
        for axis, (size, side) in enumerate(zip((height, width), crop, strict=True)):
            offsets = sorted(set(views[0, :, axis, 0, 0].int().tolist()))
            steps = [b - a for a, b in itertools.pairwise(offsets)]
            assert offsets[0] == size - side - offsets[-1] or len(offsets) == 1
            assert not steps or max(steps) - min(steps) <= 1
            assert len(offsets) > 1 or abs(offsets[0] * 2 - (size - side)) <= 1


def test_enough_views_cover_every_pixel() -> None:
    views = native_views(positions(100, 75), 32, 12)
    seen = {(y, x) for view in views[0] for y, x in view.flatten(1).int().T.tolist()}
    assert views.shape[1] == 12
    assert len(seen) == 100 * 75


def test_grid_follows_the_aspect_ratio() -> None:
    assert native_views(torch.zeros(1, 1, 400, 400), 32, 5).shape[1] == 4
    wide = native_views(positions(200, 800), 32, 4)[0]
    assert wide[:, 0, 0, 0].unique().numel() == 1
    assert wide[:, 1, 0, 0].unique().numel() == 4


def test_small_image_is_not_copied() -> None:
    image = torch.zeros(2, 3, 32, 20)
    views = native_views(image, 32, 4)
    assert views.shape == (2, 1, 3, 32, 20)
    assert views.data_ptr() == image.data_ptr()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    assert native_views(torch.ones(1, 3, 70, 70).to(dtype), 32, 4).dtype == dtype


def test_gradient_counts_the_views_of_a_pixel() -> None:
    image = torch.zeros(1, 1, 48, 32, requires_grad=True)
    native_views(image, 32, 2).sum().backward()
    assert image.grad is not None
    assert image.grad[0, 0, :, 0].tolist() == [1.0] * 16 + [2.0] * 16 + [1.0] * 16


def nearest_multiple_of_8(side: int) -> int:
    """Of the side of tiles that are at most 32 long."""
    return min(32, side // -(-side // 32) + 4)


def test_hardly_a_pixel_is_left_out_between_many_tiles() -> None:
    for side in range(33, 200):
        tiles = even_views(positions(side, side), 32, 100, 8)
        seen = {(y, x) for view in tiles[0] for y, x in view.flatten(1).int().T.tolist()}
        assert len(seen) > 0.5 * side**2 if side < 64 else len(seen) > 0.7 * side**2


@pytest.mark.parametrize("views", [native_views, even_views])
@pytest.mark.parametrize("limit", [1, 2, 16])
def test_sides_are_multiples_unless_the_image_is_smaller(
    views: Callable[..., torch.Tensor], limit: int
) -> None:
    for height, width in itertools.product([3, 8, 15, 32, 41, 70, 300], repeat=2):
        image = positions(height, width)
        tiles = views(image, 32, limit, 8)
        for axis, side in enumerate((height, width)):
            many = views is even_views and tiles.shape[1] == -(-height // 32) * -(-width // 32)
            expected = nearest_multiple_of_8(side) if many and side > 32 else min(side, 32)
            assert tiles.shape[3 + axis] == (side if side < 8 else expected // 8 * 8)
            # As much is left out at one end as at the other, but for a pixel.
            first, last = tiles[0, :, axis].min(), tiles[0, :, axis].max()
            assert abs(first - (side - 1 - last)) <= 1


@pytest.mark.parametrize("limit", [1, 2, 4, 16])
def test_even_tiles_are_equal_and_cover_the_image(limit: int) -> None:
    for height, width in itertools.product([1, 31, 32, 33, 65, 100], repeat=2):
        image = positions(height, width)
        tiles = even_views(image, 32, limit)
        rows, columns = -(-height // 32), -(-width // 32)
        if rows * columns > limit:
            assert torch.equal(tiles, native_views(image, 32, limit))
            continue
        tile = height // rows, width // columns
        assert tiles.shape == (1, rows * columns, 2, *tile)
        seen = {(y, x) for view in tiles[0] for y, x in view.flatten(1).int().T.tolist()}
        assert len(seen) == rows * tile[0] * columns * tile[1]  # no pixel twice
        for view in tiles[0]:
            top, left = view[:, 0, 0].int().tolist()
            assert torch.equal(view, image[0, :, top : top + tile[0], left : left + tile[1]])


def test_even_tiles_take_turns_batch_wise_and_pass_gradients() -> None:
    image = torch.rand(2, 3, 50, 33, requires_grad=True)
    tiles = even_views(image, 32, 4)
    assert tiles.shape == (2, 4, 3, 25, 16)
    for one, of_one in zip(image, tiles, strict=True):
        assert torch.equal(even_views(one[None], 32, 4)[0], of_one)
    tiles.sum().backward()
    assert image.grad is not None
    # A column between the tiles is left out, since 33 does not divide evenly.
    assert image.grad[0, 0, 0].tolist() == [1.0] * 16 + [0.0] + [1.0] * 16


class Mean(torch.nn.Module):
    def __init__(self, views: Callable[..., torch.Tensor], multiple: int) -> None:
        super().__init__()
        self.views, self.multiple = views, multiple

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.views(image, 32, 4, self.multiple).mean((1, 2))


def test_views_are_turned_by_row_and_column() -> None:
    image = torch.rand(2, 3, 90, 120)  # three rows and four columns
    views, turned = (cut(image, 32, 16, 8) for cut in (even_views, flipped_views))
    for index in range(12):
        flips = [2] * (index // 4 % 2) + [3] * (index % 2)
        assert torch.equal(turned[:, index], views[:, index].flip(flips))


def test_a_lone_view_is_given_both_ways() -> None:
    image = torch.rand(2, 3, 20, 30)
    view = even_views(image, 32, 16, 8)
    assert torch.equal(flipped_views(image, 32, 16, 8), torch.cat([view, view.flip(4)], dim=1))


@pytest.mark.parametrize(("axis", "other_side"), [(2, [2, 3, 0, 1]), (3, [1, 0, 3, 2])])
def test_a_flipped_image_has_the_same_views_in_two_rows_and_columns(
    axis: int, other_side: list[int]
) -> None:
    image = torch.rand(1, 3, 60, 64)
    views, flipped = (flipped_views(i, 32, 16) for i in (image, image.flip(axis)))
    assert torch.equal(flipped[:, other_side], views)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("views", [native_views, flipped_views])
def test_compiles_in_one_graph_for_any_size(
    views: Callable[..., torch.Tensor], multiple: int
) -> None:
    torch._dynamo.reset()
    module = Mean(views, multiple)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for size in [(20, 30), (70, 41), (90, 40), (5, 30), (200, 100)]:
        image = torch.rand(2, 3, *size)
        assert torch.equal(compiled(image), module(image))


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("views", [native_views, flipped_views])
def test_exports(views: Callable[..., torch.Tensor], multiple: int) -> None:
    image = torch.rand(1, 3, 60, 41)
    module = Mean(views, multiple)
    exported = torch.export.export(module, (image,))
    assert torch.equal(exported.module()(image), module(image))


@pytest.mark.parametrize("views", [native_views, flipped_views])
@pytest.mark.parametrize("size", [(64, 32), (60, 41), (20, 150)])
def test_a_graph_is_exported_for_images_of_any_size(
    views: Callable[..., torch.Tensor], size: tuple[int, int]
) -> None:
    module, sides = Mean(views, 8), {2: torch.export.Dim("h", min=2), 3: torch.export.Dim("w")}
    exported = torch.export.export(
        module, (torch.rand(2, 3, *size),), dynamic_shapes={"image": sides}, strict=False
    ).module()
    for other in [(5, 20), (20, 30), (32, 32), (90, 41), (300, 200), (33, 400)]:
        image = torch.rand(2, 3, *other)
        torch.testing.assert_close(exported(image), module(image))


@pytest.mark.parametrize(("limit", "multiple"), [(1, 1), (3, 8), (4, 1), (16, 8)])
def test_traced_views_are_those_of_images_whose_size_is_known(limit: int, multiple: int) -> None:
    cuts = [(native_views, False, False), (even_views, True, False), (flipped_views, True, True)]
    for height, width in itertools.product([1, 8, 15, 31, 32, 33, 64, 70, 129, 300], repeat=2):
        image = positions(height, width)
        for views, even, turned in cuts:
            expected = views(image, 32, limit, multiple)
            actual = traced_views(image, 32, limit, multiple, even=even, turned=turned)
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("views", [native_views, flipped_views])
def test_errors(views: Callable[..., torch.Tensor]) -> None:
    for size, limit, multiple in [(0, 1, 1), (1, 0, 1), (-3, 4, 1), (4, 4, 0)]:
        with pytest.raises(ConfigError, match=f"{size=}, {limit=} and {multiple=}"):
            views(torch.zeros(1, 3, 4, 4), size, limit, multiple)
    for shape in [(3, 4, 4), (1, 3, 0, 4), (1, 3, 4, 0)]:
        with pytest.raises(ImageError, match=r"expected \(B, C, H, W\)"):
            views(torch.zeros(shape), 4, 4)
