"""Kernels against the references in double precision: outputs and every gradient.

    python -m pytest tests/ops/kernel_parity.py                     # on a GPU
    TRITON_INTERPRET=1 python -m pytest tests/ops/kernel_parity.py  # anywhere, and slowly

`test_kernels.py` runs the second one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from perceive_adapter.injection.plan import Layout
from perceive_adapter.ops import add_low_rank, dispatch, distances, low_rank, reference_distances
from perceive_adapter.ops.kernels import device, sums
from perceive_adapter.ops.kernels import distances as distance_kernels
from perceive_adapter.ops.kernels import low_rank as low_rank_kernels

DEVICE = "cpu" if dispatch.INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 7.8e-3}  # of the largest
if dispatch.INTERPRETED:
    TOLERANCE[torch.bfloat16] *= 2  # it cuts single precision off instead of rounding it
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SHAPES = [(2, 5, 6, 7), (1, 48, 16, 16), (3, 130, 3, 7), (2, 16, 1, 19)]
LAYOUTS = ["nchw", "channels_last", "tokens", "nhwc", "sliced"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN."""
    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)

        def filled(*args: object, make: Callable = make, **options: object) -> Tensor:
            made = make(*args, **options)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        monkeypatch.setattr(owner, name, filled)
    monkeypatch.setattr(dispatch, "LARGE", dict.fromkeys(dispatch.NAMES, 0))


def random(*shape: int, seed: int) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(DEVICE)


def laid_out(x: Tensor, layout: str) -> tuple[Tensor, int]:
    """(B, C, H, W) in a layout, and its channel axis."""
    if layout == "tokens":
        return x.flatten(2).transpose(1, 2).contiguous(), -1
    if layout == "nhwc":
        return x.permute(0, 2, 3, 1).contiguous(), -1
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last), 1
    if layout == "sliced":
        return torch.cat([x, x], dim=3)[..., ::2].clone()[:, :, :, : x.shape[3]], 1
    return x, 1


def compare(
    fused: Callable[..., Tensor], reference: Callable[..., Tensor], leaves: list[Tensor]
) -> None:
    """Both give the same, and so do their gradients; the reference computes in float64.

    Where pure torch in the same dtype is further off, sums that cancel, twice its error will do.
    """
    with Called() as called:
        found = results(fused, leaves)
    assert any(name.startswith("perceive_adapter.") for name in called.names)
    truth = results(reference, [leaf.double() for leaf in leaves])
    plain = results(reference, leaves)
    for actual, expected, other in zip(found, truth, plain, strict=True):
        assert actual.shape == expected.shape
        largest = expected.abs().max()
        if largest:
            error, usual = ((x.double() - expected).abs().max() / largest for x in (actual, other))
            assert error < max(TOLERANCE[leaves[0].dtype], 2 * usual)


class Called(TorchDispatchMode):
    """Records the names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(op))
        return op(*args, **(kwargs or {}))


def results(run: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """The output and the gradients of all leaves."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = run(*leaves)
    weight = random(*output.shape, seed=9).bfloat16().to(output.dtype)  # the same in all of them
    return (output.detach(), *torch.autograd.grad(output, leaves, weight))


@pytest.fixture(params=[*SHAPES, (1, 3, 30, 70)], ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return request.param


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [1, 4, 20])
def test_add_low_rank(
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    rank: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Either backward pass, whatever cache this machine has.
    monkeypatch.setattr(low_rank_kernels, "fits_in_cache", lambda _: rank != 4)
    x, axis = laid_out(random(*shape, seed=0), layout)
    low, _ = laid_out(random(shape[0], rank, *shape[2:], seed=1), layout)
    images = shape[0] if rank > 1 else 1
    gated = [random(images, shape[1], rank, seed=2)]
    gates = [random(shape[1], rank, seed=2), random(images, rank, seed=3)]
    for factors in (gated, gates):
        leaves = [value.to(dtype) for value in (x, low, *factors)]
        compare(in_rows(add_low_rank, axis), in_rows(low_rank.reference, axis), leaves)


def in_rows(run: Callable[..., Tensor], axis: int) -> Callable[..., Tensor]:
    layout = Layout(0, axis)

    def of_maps(x: Tensor, low: Tensor, *factors: Tensor) -> Tensor:
        wide, narrow = (layout.rows(maps, len(factors[-1])) for maps in (x, low))
        return layout.from_rows(run(wide, narrow, *factors), x)

    return of_maps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_factors_in_single_precision(dtype: torch.dtype) -> None:
    """As autocast has them: a product in the features' dtype, gradients in each factor's own."""
    leaves = [random(2, 5, 42, seed=0).to(dtype), random(2, 3, 42, seed=1).to(dtype)]
    up, gate = random(5, 3, seed=2).float(), random(2, 3, seed=3)
    for factors in ([up, gate.to(dtype)], [up, gate.float()], [up.expand(2, -1, -1).clone()]):
        compare(add_low_rank, cast_reference, [*leaves, *factors])
        found = results(add_low_rank, [*leaves, *factors])
        assert [x.dtype for x in found[1:]] == [x.dtype for x in (*leaves, *factors)]


def cast_reference(x: Tensor, low: Tensor, *factors: Tensor) -> Tensor:
    return low_rank.reference(x, low, *(factor.to(x.dtype) for factor in factors))


@DTYPES
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_reference_distances(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> None:
    x = random(*shape, seed=0).to(dtype)
    references = random(count, *shape, seed=1).to(dtype)
    references[0, 0] = x[0]  # a difference of 0 has no sign
    compare(
        lambda x: reference_distances(x, references),
        lambda x: distances.reference(x, references.to(x.dtype)),
        [x],
    )


@DTYPES
def test_memory_formats_are_kept(dtype: torch.dtype) -> None:
    for layout in ("nchw", "channels_last", "nhwc"):
        x, axis = laid_out(random(1, 6, 4, 5, seed=0).to(dtype), layout)
        low, _ = laid_out(random(1, 2, 4, 5, seed=1).to(dtype), layout)
        gated = random(1, 6, 2, seed=4).to(dtype)
        assert in_rows(add_low_rank, axis)(x, low, gated).stride() == x.stride()


def test_the_same_bits_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    x, low = (random(2, c, 2145, seed=0).float().requires_grad_() for c in (20, 3))
    gated = random(2, 20, 3, seed=1).float().requires_grad_()
    gate = random(2, 3, seed=3).float().requires_grad_()
    references = random(2, 2, 20, 2145, seed=2).float()
    leaves = (x, low, gated, gate)
    for apart, run in (
        (False, lambda: add_low_rank(x, low, gated).square().mean()),
        (False, lambda: add_low_rank(x, low, gated[0], gate).square().mean()),
        (True, lambda: add_low_rank(x, low, gated[0], gate).square().mean()),
        (False, lambda: reference_distances(x, references).square().sum()),
    ):
        monkeypatch.setattr(low_rank_kernels, "fits_in_cache", lambda _, apart=apart: apart)
        one, two = (torch.autograd.grad(run(), leaves, allow_unused=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True) if a is not None)


def test_the_products_are_counted() -> None:
    x, low = torch.zeros(2, 5, 18, device=DEVICE), torch.zeros(2, 2, 18, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        add_low_rank(x, low, torch.zeros(1, 5, 2, device=DEVICE))
    assert counter.get_total_flops() == 2 * 2 * 5 * 2 * 18


def test_empty_batches() -> None:
    x, low = torch.empty(0, 4, 20, device=DEVICE), torch.empty(0, 2, 20, device=DEVICE)
    gated = torch.ones(1, 4, 2, device=DEVICE).requires_grad_()
    up, gate = (torch.ones(*size, device=DEVICE).requires_grad_() for size in ((4, 2), (0, 2)))
    x.requires_grad_()
    (add_low_rank(x, low, gated) + add_low_rank(x, low, up, gate)).sum().backward()
    for leaf in (x, gated, up, gate):
        assert leaf.grad is not None
        assert not leaf.grad.any()
    assert reference_distances(x, x.expand(2, 0, 4, 20)).shape == (2, 0)


def test_factors_of_another_size_are_refused() -> None:
    x, low = torch.ones(3, 4, 20, device=DEVICE), torch.ones(3, 2, 20, device=DEVICE)
    up, gate = torch.ones(4, 2, device=DEVICE), torch.ones(3, 2, device=DEVICE)
    for factors in ((up, gate[:2]), (up, gate[:, :0]), (up[:3], gate), (up[:3],), (up[:, :0],)):
        with pytest.raises(RuntimeError, match="must match"):
            add_low_rank(x, low, *factors)


@pytest.mark.parametrize("parts", [1, 130, 1100])
def test_sums_of_many_parts(parts: int) -> None:
    """More of them than a program holds at once, too."""
    one, other = random(parts, 3, 7, seed=0).float(), random(parts + 5, 21, seed=1).float()
    for found, of in zip(
        sums.summed_both(one, other, one.dtype, one.dtype), (one, other), strict=True
    ):
        torch.testing.assert_close(found, of.sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.summed(one, one.dtype), one.sum(0), rtol=1e-4, atol=1e-4)


def test_tiles_in_flight_fit_into_shared_memory() -> None:
    cpu = torch.device("cpu")
    assert [device.stages(cpu, kib * 2**10, 4) for kib in (1, 16, 100)] == [4, 3, 1]


def test_programs_that_go_through_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernels in (low_rank_kernels, distance_kernels):
        monkeypatch.setattr(kernels, "_PROGRAMS", 2)
    x, low = random(1, 130, 2001, seed=0).float(), random(1, 2, 2001, seed=1).float()
    for factors in ([(1, 130, 2)], [(130, 2), (1, 2)]):
        leaves = [x, low, *(random(*size, seed=2).float() for size in factors)]
        for apart in (True, False):
            monkeypatch.setattr(low_rank_kernels, "fits_in_cache", lambda _, apart=apart: apart)
            compare(add_low_rank, low_rank.reference, leaves)
    references = random(2, 1, 9, 2001, seed=3).float()
    compare(
        lambda x: reference_distances(x, references),
        lambda x: distances.reference(x, references.to(x.dtype)),
        [random(1, 9, 2001, seed=4).float()],
    )


def test_what_no_kernel_is_for_takes_pure_torch() -> None:
    for dtype, channels in ((torch.float64, 5), (torch.float32, 1025)):
        x, low = (random(1, c, 18, seed=0).to(dtype).requires_grad_() for c in (channels, 2))
        output = add_low_rank(x, low, random(1, channels, 2, seed=1).to(dtype))
        assert "Baddbmm" in str(output.grad_fn)


def test_ops_are_registered_as_they_behave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for strided in (False, True):
        x, low = random(2, 6, 19, seed=0).float(), random(2, 3, 19, seed=1).float()
        if strided:
            x, low = (v.transpose(1, 2).contiguous().transpose(1, 2) for v in (x, low))
        x.requires_grad_()
        gated = random(2, 6, 3, seed=3).float().requires_grad_()
        torch.library.opcheck(low_rank_kernels.add_product, (x, low, gated, None))
        gate = random(2, 3, seed=4).float().requires_grad_()
        torch.library.opcheck(low_rank_kernels.add_product, (x, low, gated[0].detach(), gate))
        references = random(3, 2, 114, seed=5).float()
        rows = x.detach().reshape(2, 114).requires_grad_()
        torch.library.opcheck(distance_kernels._measure, (rows, references))
