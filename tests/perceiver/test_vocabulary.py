"""The word-by-word tokenizer, and texts that a perceiver's towers encode with it."""

import pytest
import torch
from tiny_clip import VIT, tiny

from perceive_adapter.errors import ConfigError
from perceive_adapter.perceiver.vocabulary import WordTokenizer

WORDS = ("terrible", "mediocre", "excellent", "a", "photo", "with", "noise")


def test_words_between_start_and_end() -> None:
    tokenize = WordTokenizer(WORDS, 6)
    assert tokenize.size == 10
    tokens = tokenize(["a photo with noise", "Noise", ""])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[8, 4, 5, 6, 7, 9], [8, 7, 9, 0, 0, 0], [8, 9, 0, 0, 0, 0]]
    # CLIP's text towers are read at the largest token.
    assert tokens.argmax(dim=1).tolist() == [5, 2, 1]


def test_a_single_text_and_none() -> None:
    tokenize = WordTokenizer(WORDS, 6)
    assert torch.equal(tokenize("a photo"), tokenize(["a photo"]))
    assert tokenize([]).shape == (0, 6)


def test_unknown_words_and_long_texts_are_refused() -> None:
    tokenize = WordTokenizer(WORDS, 6)
    with pytest.raises(ConfigError, match=r"\['of', 'rain'\]: its 7 words are terrible, medi"):
        tokenize(["a photo", "a photo of rain"])
    with pytest.raises(ConfigError, match="has 5 words: expected at most 4"):
        tokenize(["a photo with a photo"])


def test_towers_encode_texts_of_the_vocabulary() -> None:
    text = {**VIT["text_cfg"], "vocab_size": len(WORDS) + 3, "context_length": 8}
    towers = tiny({**VIT, "text_cfg": text}, vocabulary=WORDS).towers
    features = towers.encode_texts(["a photo", "a photo with noise", "A PHOTO"])
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert torch.equal(features[0], features[2])
    assert not torch.allclose(features[0], features[1], atol=1e-3)
    # Texts of another length in the same call change nothing.
    torch.testing.assert_close(towers.encode_texts(["a photo"])[0], features[0])
    with pytest.raises(ConfigError, match="'rain'"):
        towers.encode_texts(["a photo with rain"])
