"""Learnable tier prompts."""

import pytest
import torch

from perceive_adapter.errors import ConfigError
from perceive_adapter.perceiver.prompts import TierPrompts, tier_words


def draw(seed: int = 0) -> TierPrompts:
    words = torch.arange(48.0).reshape(3, 16)
    return TierPrompts.draw(
        words, torch.full((16,), -1.0), torch.full((16,), -2.0), length=200, seed=seed
    )


def test_assembly() -> None:
    prompts = draw()
    assembled = prompts()
    assert assembled.shape == (3, 202, 16)
    assert torch.equal(assembled[:, 0], torch.full((3, 16), -1.0))
    assert torch.equal(assembled[:, 1:-1], prompts.context)
    assert torch.equal(assembled[:, -2], torch.arange(48.0).reshape(3, 16))
    assert torch.equal(assembled[:, -1], torch.full((3, 16), -2.0))


def test_draw_is_normal_seeded_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    drawn = draw().context[:, :-1]
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn.std().item() == pytest.approx(0.02, rel=0.05)
    assert drawn.mean().item() == pytest.approx(0, abs=1e-3)
    assert torch.equal(draw().context, draw().context)
    assert not torch.equal(draw(0).context, draw(1).context)


def test_only_the_context_trains() -> None:
    prompts = draw()
    assert not prompts.trained
    prompts().sum().backward()
    torch.optim.SGD(prompts.parameters(), lr=1e-3).step()
    assert [name for name, _ in prompts.named_parameters()] == ["context"]
    assert prompts.trained
    assert not prompts.initial.requires_grad


def test_trained_survives_a_state_dict() -> None:
    prompts, other = draw(), draw(seed=1)
    other.load_state_dict(prompts.state_dict())
    assert not other.trained
    with torch.no_grad():
        prompts.context[0, 0, 0] += 1
    other.load_state_dict(prompts.state_dict())
    assert other.trained


def test_words() -> None:
    assert tier_words(("low", "medium", "high"), None) == ("terrible", "mediocre", "excellent")
    assert tier_words(("bad", "good"), ["awful", "perfect"]) == ("awful", "perfect")
    with pytest.raises(ConfigError, match=r"tiers \['bad'\] have no default word.*words="):
        tier_words(("bad", "high"), None)
