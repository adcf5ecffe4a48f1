"""The operations in pure torch."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from perceive_adapter.ops import add_low_rank, distances, low_rank, reference_distances

SIZE = (2, 5, 4, 3)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients(batch: int) -> None:
    x, low, gated = drawn(2, 5, 12), drawn(2, 3, 12, seed=3), drawn(batch, 5, 3, seed=4)
    assert torch.autograd.gradcheck(low_rank.reference, (x, low, gated))
    assert torch.autograd.gradcheck(add_low_rank, (x, low, gated))
    gate = drawn(batch, 3, seed=6)
    for run in (low_rank.reference, add_low_rank):
        assert torch.autograd.gradcheck(run, (x, low, drawn(5, 3, seed=7), gate))
    references = drawn(3, *SIZE, seed=5).detach()
    assert torch.autograd.gradcheck(lambda x: distances.reference(x, references), (drawn(*SIZE),))


def test_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # two channels, two positions
    low, gated = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[5.0], [10.0]]])
    assert add_low_rank(x, low, gated).flatten().tolist() == [6, -3, 13, -6]
    gate = torch.tensor([[2.0]])
    assert add_low_rank(x, low, gated[0], gate).flatten().tolist() == [11, -8, 23, -16]
    assert reference_distances(x, torch.stack([x + 1, x - 2])).tolist() == [[1], [2]]


def test_large_features_of_half_a_precision_do_not_overflow() -> None:
    features = torch.ones(1, 8, 256, 300, dtype=torch.float16)
    assert reference_distances(features, [features / 2, features * 2]).tolist() == [[0.5], [1.0]]


@pytest.mark.parametrize("blocks", [7, 2**19])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("last", [(), (0,), (1,), (0, 1, 2)], ids=str)
def test_distances_to_references_in_any_order(
    blocks: int, together: bool, last: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stacked or apart, channels last in some of them: the plain formula, and its gradient."""
    monkeypatch.setattr(distances, "_BLOCK", blocks)
    maps = [drawn(*SIZE, seed=seed).detach() for seed in range(3)]
    expected = [(maps[0] - other).abs().mean((1, 2, 3)) for other in maps[1:]]
    signs = sum((maps[0] - other).sign() for other in maps[1:])
    for index in last:
        maps[index] = maps[index].contiguous(memory_format=torch.channels_last)
    x, *references = maps
    found = reference_distances(
        x.requires_grad_(), torch.stack(references) if together else references
    )
    torch.testing.assert_close(found, torch.stack(expected))
    found.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, signs / x[0].numel())


def test_distances_of_nothing() -> None:
    x = torch.rand(2, 5, 4, 3)
    for references in (torch.rand(0, 2, 5, 4, 3), []):
        assert reference_distances(x, references).shape == (0, 2)
    none = x[:0]
    for references in (torch.rand(3, 0, 5, 4, 3), [none] * 3):
        assert reference_distances(none, references).shape == (3, 0)
    flat = x[..., :0]
    for references in (torch.rand(3, 2, 5, 4, 0), [flat] * 3):
        assert reference_distances(flat, references).isnan().all()


@pytest.mark.newer_torch("compiles for each number of references")
def test_no_graph_for_each_number_of_references() -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(reference_distances, backend=graphs, dynamic=True)
    x = torch.rand(2, 5, 4, 3)
    for count in (2, 3, 4, 5):
        references = torch.rand(count, 2, 5, 4, 3)
        torch.testing.assert_close(compiled(x, references), reference_distances(x, references))
    assert graphs.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wider_prompts_keep_the_dtype_of_the_features(dtype: torch.dtype) -> None:
    x, low = drawn(2, 5, 12).detach().to(dtype), drawn(2, 3, 12).detach().float()
    assert add_low_rank(x, low, torch.ones(2, 5, 3)).dtype == dtype


def test_in_place() -> None:
    x, low = drawn(2, 5, 12).detach(), drawn(2, 3, 12, seed=1).detach()
    gated = drawn(1, 5, 3, seed=2).detach()
    expected = add_low_rank(x, low, gated)
    assert not torch.equal(x, expected)
    add_low_rank(x, low, gated, in_place=True)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("name", ["add_low_rank", "reference_distances", "apart"])
def test_one_graph(name: str) -> None:
    torch._dynamo.reset()
    x, low, gated = drawn(2, 5, 12), drawn(2, 3, 12, seed=1), drawn(2, 5, 3)
    runs = {
        "add_low_rank": lambda: add_low_rank(x, low, gated),
        "reference_distances": lambda: reference_distances(x, x.detach()[None]),
        "apart": lambda: reference_distances(x, [x.detach() + 1, x.detach()]),
    }
    compiled = torch.compile(runs[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), runs[name]())
