import math
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from perceive_adapter.errors import ConfigError, LossInputError
from perceive_adapter.losses import DegradationContrastiveLoss

LABELS = torch.tensor([0, 1, 0, 2, 1, 3])


def vectors(batch=6, width=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, width, generator=generator, dtype=torch.float64).to(dtype).unbind()


def naive_loss(anchor, positive, labels, temperature):
    """One image, one negative at a time."""

    def similarity(a, b):
        return (a / a.norm() * (b / b.norm())).sum() / temperature

    total = 0.0
    for i in range(len(anchor)):
        own = similarity(anchor[i], positive[i]).exp()
        others = 0.0
        for j in range(len(anchor)):
            if labels[j] != labels[i]:
                others = others + similarity(anchor[i], anchor[j]).exp()
                others = others + similarity(anchor[i], positive[j]).exp()
        total = total - (own / (own + others)).log()
    return total / len(anchor)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_value_and_gradients_equal_the_naive_formula(temperature):
    inputs = [v.requires_grad_() for v in vectors(dtype=torch.float64)]
    actual = DegradationContrastiveLoss(temperature)(*inputs, LABELS)
    expected = naive_loss(*inputs, LABELS, temperature)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(value, inputs) for value in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_gradcheck():
    inputs = [v.requires_grad_() for v in vectors(dtype=torch.float64)]
    loss = DegradationContrastiveLoss(0.5)
    assert torch.autograd.gradcheck(lambda a, p: loss(a, p, LABELS), inputs)


def test_length_of_vectors_does_not_matter():
    anchor, positive = vectors()
    loss = DegradationContrastiveLoss()
    torch.testing.assert_close(
        loss(7 * anchor, 0.01 * positive, LABELS), loss(anchor, positive, LABELS)
    )


@pytest.mark.parametrize("batch", [1, 4])
def test_without_negatives_the_loss_is_zero_with_a_graph(batch):
    inputs = [v.requires_grad_() for v in vectors(batch)]
    value = DegradationContrastiveLoss()(*inputs, torch.zeros(batch, dtype=torch.long))
    value.backward()
    assert value.item() == 0
    assert all(torch.equal(v.grad, torch.zeros_like(v)) for v in inputs)


def test_same_label_others_are_neither_positive_nor_negative():
    """Image 1 turns towards image 0 in a plane that image 2 is orthogonal to."""
    loss = DegradationContrastiveLoss()
    first, other = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])

    def value(angle, labels):
        turned = torch.tensor([math.cos(angle), math.sin(angle), 0.0])
        batch = torch.stack([first, turned, other])
        return loss(batch, batch, torch.tensor(labels)).item()

    assert value(0.1, [0, 0, 1]) == pytest.approx(value(1.5, [0, 0, 1]), abs=1e-6)
    assert value(0.1, [0, 2, 1]) > value(1.5, [0, 2, 1]) + 0.1


def test_range():
    perfect = torch.eye(4, dtype=torch.float64)
    value = DegradationContrastiveLoss()(perfect, perfect, torch.arange(4)).item()
    assert value == pytest.approx(math.log1p(6 * math.exp(-10)), rel=1e-3)
    collapsed = torch.ones(4, 3)
    value = DegradationContrastiveLoss()(collapsed, collapsed, torch.arange(4)).item()
    assert value == pytest.approx(math.log(7), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    inputs = vectors(dtype=dtype)
    loss = DegradationContrastiveLoss()
    expected = loss(*(v.float() for v in inputs), LABELS)
    leaves = [v.requires_grad_() for v in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(*leaves, LABELS)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert all(v.grad.isfinite().all() for v in leaves)


def test_zero_vectors_stay_finite():
    inputs = [torch.zeros(2, 3, requires_grad=True) for _ in range(2)]
    value = DegradationContrastiveLoss()(*inputs, torch.tensor([0, 1]))
    value.backward()
    assert value.item() == pytest.approx(math.log(3))
    assert all(v.grad.isfinite().all() for v in inputs)


@pytest.mark.parametrize(
    ("anchor", "positive", "labels", "message"),
    [
        (torch.ones(3), torch.ones(3), LABELS[:3], r"anchor must be.*\(3,\)"),
        (torch.ones(0, 3), torch.ones(0, 3), LABELS[:0], r"not empty.*\(0, 3\)"),
        (torch.ones(2, 3), torch.ones(2, 3).int(), LABELS[:2], "positive must be.*int32"),
        (torch.ones(2, 3), torch.ones(2, 4), LABELS[:2], r"\(2, 3\), positive \(2, 4\)"),
        (torch.ones(2, 3), torch.ones(2, 3), LABELS[:3], r"shape \(2,\), got.*\(3,\)"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2), r"integers.*float32"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2) > 0, r"integers.*bool"),
    ],
)
def test_inputs_that_do_not_fit(anchor, positive, labels, message):
    with pytest.raises(LossInputError, match=message):
        DegradationContrastiveLoss()(anchor, positive, labels)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ConfigError, match="temperature"):
        DegradationContrastiveLoss(temperature)


def run_rank(rank, folder):
    """Write the loss and gradients of one of two ranks, and what unequal batches raise."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    loss = DegradationContrastiveLoss()
    own = slice(3 * rank, 3 * rank + 3)
    inputs = [v[own].clone().requires_grad_() for v in vectors(dtype=torch.float64)]
    value = loss(*inputs, LABELS[own])
    value.backward()
    try:
        loss(torch.ones(rank + 1, 2), torch.ones(rank + 1, 2), LABELS[: rank + 1])
        message = "nothing raised"
    except LossInputError as error:
        message = str(error)
    result = {"value": value.detach(), "gradients": [v.grad for v in inputs], "message": message}
    torch.save(result, f"{folder}/{rank}.pt")
    # A rank that leaves early breaks the other's last collective, and in torch 2.6 a barrier waits
    # now and then for one that has left.
    while not Path(folder, f"{1 - rank}.pt").exists():
        time.sleep(0.01)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_ranks_equal_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    inputs = [v.requires_grad_() for v in vectors(dtype=torch.float64)]
    whole = DegradationContrastiveLoss()(*inputs, LABELS)
    whole.backward()
    torch.testing.assert_close(torch.stack([rank["value"] for rank in ranks]).mean(), whole)
    for index, leaf in enumerate(inputs):
        # DistributedDataParallel averages over ranks: half of what each rank holds.
        joined = torch.cat([rank["gradients"][index] for rank in ranks]) / 2
        torch.testing.assert_close(joined, leaf.grad)
    for rank in ranks:
        assert "equal batch, got [1, 2]" in rank["message"]


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_what_is_no_tensor_is_named(odd):
    given = [*vectors(), LABELS]
    name = ("anchor", "positive", "labels")[odd]
    given[odd] = given[odd].tolist()
    with pytest.raises(LossInputError, match=f"{name} must be a tensor .*got list"):
        DegradationContrastiveLoss()(*given)
