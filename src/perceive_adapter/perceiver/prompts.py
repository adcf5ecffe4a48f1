"""Learnable prompts, one for each quality tier."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perceive_adapter.errors import ConfigError

__all__ = ["DEFAULT_WORDS", "TierPrompts", "tier_words"]

DEFAULT_WORDS = {"low": "terrible", "medium": "mediocre", "high": "excellent"}
"""The words that Perceive-IR starts from."""


class TierPrompts(nn.Module):
    """Learnable context vectors in the token-embedding space of a frozen text tower.

    The prompt of a tier is ``[start] context [end]``. Only ``context`` trains. Its first value is
    kept in ``initial``, so that an untrained perceiver can be told from a trained one, also after
    it was saved.

    Source: stage 1 of Perceive-IR (IEEE TIP 2025, https://arxiv.org/abs/2408.15994), with the
    learnable context of CoOp (IJCV 2022, https://arxiv.org/abs/2109.01134).

    Args:
        context: (K, N, W), for K tiers N vectors of the width W of the text tower.
        start: (W,), embedding of the start-of-text token.
        end: (W,), embedding of the end-of-text token.

    Example:
        >>> prompts = TierPrompts.draw(torch.ones(3, 8), torch.zeros(8), torch.zeros(8), length=4)
        >>> prompts().shape
        torch.Size([3, 6, 8])
        >>> [name for name, _ in prompts.named_parameters()]
        ['context']
    """

    initial: Tensor
    start: Tensor
    end: Tensor

    def __init__(self, context: Tensor, start: Tensor, end: Tensor) -> None:
        super().__init__()
        self.context = nn.Parameter(context.detach().clone())
        self.register_buffer("initial", context.detach().clone())
        self.register_buffer("start", start.detach().clone())
        self.register_buffer("end", end.detach().clone())

    @classmethod
    def draw(
        cls, words: Tensor, start: Tensor, end: Tensor, *, length: int, seed: int = 0
    ) -> "TierPrompts":
        """Draw contexts of ``length`` vectors from N(0, 0.02), the last one a word's embedding.

        Args:
            words: (K, W), token embedding of each tier's word.
            start: (W,).
            end: (W,).
            length: N, at least 1.
            seed: of the draw; the global generators are left alone.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = len(words), length, words.shape[1]
        context = 0.02 * torch.randn(shape, generator=generator, device="cpu")
        context[:, -1] = words.detach()
        return cls(context, start, end)

    @property
    def trained(self) -> bool:
        """Whether the context differs from the one that was drawn."""
        return not torch.equal(self.context, self.initial)

    def forward(self) -> Tensor:
        """Assemble the prompts, (K, 1 + N + 1, W)."""
        tiers = self.context.shape[0]
        start, end = (token.expand(tiers, 1, -1) for token in (self.start, self.end))
        return torch.cat([start, self.context, end], dim=1)


def tier_words(tiers: Sequence[str], words: Sequence[str] | None) -> tuple[str, ...]:
    """Give back ``words``, or the paper's words where it is None and the tiers are the paper's.

    Raises:
        ConfigError: ``words`` is None and a tier has no default word.

    Example:
        >>> tier_words(["low", "high"], None)
        ('terrible', 'excellent')
    """
    if words is not None:
        return tuple(words)
    if unknown := [tier for tier in tiers if tier not in DEFAULT_WORDS]:
        raise ConfigError(
            f"tiers {unknown} have no default word: words are known for {list(DEFAULT_WORDS)}. "
            "Pass words=, one word that describes the quality for each tier."
        )
    return tuple(DEFAULT_WORDS[tier] for tier in tiers)
