"""The operations in pure torch."""

import pytest
import torch
from torch import Tensor

from perceive_adapter.ops import (
    add_low_rank,
    distances,
    low_rank,
    modulate,
    modulation,
    reference_distances,
)

SIZE = (2, 5, 4, 3)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients(batch: int) -> None:
    x, scale, shift = drawn(*SIZE), drawn(batch, 5, 1, 1, seed=1), drawn(batch, 5, 1, 1, seed=2)
    assert torch.autograd.gradcheck(modulation.reference, (x, scale, shift))
    low, up, gate = drawn(2, 3, 4, 3, seed=3), drawn(5, 3, 1, 1, seed=4), drawn(batch, 3, 1, 1)
    assert torch.autograd.gradcheck(low_rank.reference, (x, low, up, gate))
    assert torch.autograd.gradcheck(add_low_rank, (x, low, up, gate))
    references = drawn(3, *SIZE, seed=5).detach()
    assert torch.autograd.gradcheck(lambda x: distances.reference(x, references), (x,))


def test_by_hand() -> None:
    x = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])  # two channels, two positions
    scale, shift = torch.tensor([2.0, 3.0]).view(1, 2, 1, 1), torch.tensor([[[[10.0]], [[0.0]]]])
    assert modulate(x, scale, shift).flatten().tolist() == [12, 14, 9, 12]
    low, gate = torch.tensor([[[[1.0, -1.0]]]]), torch.tensor([[[[5.0]]]])
    up = torch.tensor([[1.0], [2.0]]).view(2, 1, 1, 1)
    assert add_low_rank(x, low, up, gate).flatten().tolist() == [6, -3, 13, -6]
    assert reference_distances(x, torch.stack([x + 1, x - 2])).tolist() == [[1], [2]]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "nhwc", "tokens"])
def test_a_branch_in_any_layout(layout: str, batch: int) -> None:
    x, low = drawn(*SIZE).detach(), drawn(2, 3, 4, 3, seed=1).detach()
    up, gate = drawn(5, 3, seed=2), drawn(batch, 3, seed=3)
    expected = x + torch.einsum("cr,br,brhw->bchw", up, gate.expand(2, 3), low)
    if layout in ("nchw", "channels_last"):
        if layout == "channels_last":
            x, low = (v.contiguous(memory_format=torch.channels_last) for v in (x, low))
        actual = add_low_rank(x, low, up[..., None, None], gate[..., None, None])
        assert actual.stride() == x.stride()
    else:
        x, low = (v.permute(0, 2, 3, 1) for v in (x, low))
        gate = gate[:, None, None]
        if layout == "tokens":
            x, low, gate = x.flatten(1, 2), low.flatten(1, 2), gate[:, 0]
        actual = add_low_rank(x, low, up, gate, channel_axis=-1)
        actual = actual.reshape(2, 4, 3, 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(actual, expected)


def test_a_branch_beside_sequence_first_features() -> None:
    x, low = drawn(7, 2, 5).detach(), drawn(7, 2, 3, seed=1).detach()  # positions, images, channels
    up, gate = drawn(5, 3, seed=2), drawn(1, 2, 3, seed=3)
    expected = x + torch.einsum("cr,br,nbr->nbc", up, gate[0], low)
    torch.testing.assert_close(add_low_rank(x, low, up, gate, channel_axis=-1), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wider_prompts_keep_the_dtype_of_the_features(dtype: torch.dtype) -> None:
    x, low = drawn(*SIZE).detach().to(dtype), drawn(2, 3, 4, 3).detach().float()
    value, up, gate = torch.ones(2, 5, 1, 1), torch.ones(5, 3, 1, 1), torch.ones(2, 3, 1, 1)
    assert modulate(x, value, value).dtype == dtype
    assert add_low_rank(x, low, up, gate).dtype == dtype


@pytest.mark.parametrize("name", ["modulate", "add_low_rank", "reference_distances"])
def test_one_graph(name: str) -> None:
    torch._dynamo.reset()
    x, low = drawn(*SIZE), drawn(2, 3, 4, 3, seed=1)
    up, value, gate = drawn(5, 3, 1, 1), drawn(2, 5, 1, 1), drawn(2, 3, 1, 1)
    runs = {
        "modulate": lambda: modulate(x, value, value),
        "add_low_rank": lambda: add_low_rank(x, low, up, gate),
        "reference_distances": lambda: reference_distances(x, x.detach()[None]),
    }
    compiled = torch.compile(runs[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), runs[name]())
