"""A word-by-word tokenizer, for text towers that know few words."""

from collections.abc import Sequence

import torch
from torch import Tensor

from perceive_adapter.errors import ConfigError

__all__ = ["WordTokenizer"]


class WordTokenizer:
    """Turn texts of known words into tokens, in the manner of open_clip's tokenizers.

    Token 0 pads, the words follow, then the start and, as the largest number, the end of a text,
    where CLIP's text towers are read.

    Args:
        words: the vocabulary, in lower case.
        context_length: tokens of a text, start and end included.

    Example:
        >>> tokenize = WordTokenizer(["a", "noisy", "photo"], context_length=6)
        >>> tokenize(["a photo"]).tolist()
        [[4, 1, 3, 5, 0, 0]]
    """

    def __init__(self, words: Sequence[str], context_length: int) -> None:
        self.words = tuple(words)
        self.context_length = context_length
        self.start, self.end = len(self.words) + 1, len(self.words) + 2
        self._tokens = {word: index for index, word in enumerate(self.words, start=1)}

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.words) + 3

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Return the tokens (N, context_length), int64, of N texts, or of a single one.

        Raises:
            ConfigError: a text has an unknown word, or too many words.
        """
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64, device="cpu")
        for row, text in zip(tokens, texts, strict=True):
            words = text.lower().split()
            if unknown := [word for word in words if word not in self._tokens]:
                raise ConfigError(
                    f"{text!r} has words that this text tower does not know, {unknown}: its "
                    f"{len(self.words)} words are {', '.join(self.words)}."
                )
            if len(words) + 2 > self.context_length:
                raise ConfigError(
                    f"{text!r} has {len(words)} words: expected at most {self.context_length - 2}."
                )
            numbers = [self.start, *(self._tokens[word] for word in words), self.end]
            row[: len(numbers)] = row.new_tensor(numbers)
        return tokens
