"""The degradation heads: what they are taught, and that they learn it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perceive_adapter.perceiver.heads import DegradationHeads

NAMES = ("noise", "rain", "haze")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def heads() -> DegradationHeads:
    return DegradationHeads(16, NAMES)


def units(count: int, width: int = 16, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=seeded(seed)), dim=1)


def constant(heads: DegradationHeads, presence: list[float], severity: list[float]) -> None:
    """Make the heads say the same of everything, as logits."""
    with torch.no_grad():
        for layer, logits in ((heads.presence, presence), (heads.severity, severity)):
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor(logits))


def test_one_column_for_each_name(heads: DegradationHeads) -> None:
    presence, severity = heads(units(5))
    assert presence.shape == severity.shape == (5, len(heads.names)) == (5, 3)


def test_learns_several_at_once_and_none() -> None:
    # What is present is written into the embedding, together with how much of it.
    severity = torch.rand(256, 3, generator=seeded()) * 0.8 + 0.2
    severity *= torch.rand(256, 3, generator=seeded(1)) < 0.5
    directions = torch.linalg.qr(torch.randn(16, 4, generator=seeded(2))).Q.T
    embedding = F.normalize(directions[0] + severity @ directions[1:], dim=1)
    heads = DegradationHeads(16, NAMES)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = heads.loss(embedding, severity)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    presence, told = (logits.sigmoid() for logits in heads(embedding))
    right = (presence > 0.5) == (severity > 0)
    assert right.float().mean() > 0.98
    several, none = (severity > 0).sum(1) > 1, (severity == 0).all(1)
    assert right[several].all(1).float().mean() > 0.9
    assert right[none].all(1).float().mean() > 0.9
    assert (told - severity).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("severity", "present"), [(0.0, 0.0), (0.05, 0.0), (0.125, 0.5), (0.2, 1.0), (0.9, 1.0)]
)
def test_what_counts_as_present(heads: DegradationHeads, severity: float, present: float) -> None:
    """The cross entropy is least where presence is the target."""
    target = torch.full((1, 3), severity)
    told = target.clamp(1e-6, 1 - 1e-6).logit()[0].tolist()
    losses = {}
    for probability in (0.001, 0.25, 0.5, 0.75, 0.999):
        constant(heads, [torch.tensor(probability).logit().item()] * 3, told)
        losses[probability] = heads.loss(units(1), target).item()
    best = min(losses, key=losses.__getitem__)
    assert best == pytest.approx(present, abs=0.002)
    entropy = 0.0 if present in (0.0, 1.0) else 0.6931
    assert losses[best] == pytest.approx(entropy, abs=0.002)


def test_severity_is_a_distance(heads: DegradationHeads) -> None:
    target = torch.full((1, 3), 0.5)
    losses = []
    for told in (0.5, 0.6, 0.7):
        constant(heads, [30.0] * 3, [torch.tensor(told).logit().item()] * 3)
        losses.append(heads.loss(units(1), target).item())
    # Smooth below 0.05, linear above: |d| - 0.025, times 4.
    assert losses == pytest.approx([0, 4 * 0.075, 4 * 0.175], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(heads: DegradationHeads, dtype: torch.dtype) -> None:
    embedding, severity = units(4), torch.rand(4, 3, generator=seeded())
    expected, loss = heads(embedding), heads.loss(embedding, severity)
    with torch.autocast("cpu", dtype):  # does not round what the heads compute
        for logits, exact in zip(heads(embedding), expected, strict=True):
            assert torch.equal(logits, exact)
    heads = heads.to(dtype)
    for logits, exact in zip(heads(embedding.to(dtype)), expected, strict=True):
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, exact, atol=0.03, rtol=0.03)
    rounded = heads.loss(embedding.to(dtype), severity)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(loss.item(), rel=0.03)
