import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from myriad.data.recount import ByteLevelCounter, DecodingCounter, counter_for
from myriad.data.tokenizer import END_TOKEN, Tokenizer, byte_tokenizer, train_bpe

TEXT = "the cat sees  the dog;\n\tit's 3 €, 日本語 too\u2003. "
BPE = train_bpe([TEXT * 20], 300)


def _word_level():
    words = {word: id for id, word in enumerate(["the", "cat", "[UNK]", END_TOKEN])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens([END_TOKEN])
    return Tokenizer(made.to_str().encode())


WORDS = _word_level()
BYTES = byte_tokenizer()
COUNTERS = {tokenizer: counter_for(tokenizer) for tokenizer in (BYTES, BPE, WORDS)}


def recount(tokenizer, text, size):
    """Words and bytes of a text whose tokens come in pieces of a size; the pieces are the tokens."""
    ids = np.array(tokenizer.encode(text), np.int64)
    pieces = [ids[start : start + size] for start in range(0, max(1, len(ids)), size)]
    found = list(COUNTERS[tokenizer](pieces))
    assert np.concatenate([piece for piece, _, _ in found]).tolist() == ids.tolist()
    return sum(words for _, words, _ in found), sum(size for _, _, size in found)


@settings(max_examples=50)
@given(st.text(st.characters(codec="utf-8") | st.sampled_from(" \n\u2003é日"), max_size=40), st.integers(1, 7))
def test_pieces_of_any_size_count_as_the_whole(text, size):
    for tokenizer in (BYTES, BPE):
        assert recount(tokenizer, text, size) == (len(text.split()), len(text.encode()))


def test_byte_level_tokenizers_need_no_decoding():
    for tokenizer in (BYTES, BPE):
        assert isinstance(COUNTERS[tokenizer], ByteLevelCounter)
    assert isinstance(COUNTERS[WORDS], DecodingCounter)


@pytest.mark.parametrize("size", [1, 100])
def test_other_tokenizers_are_decoded(size):
    assert recount(WORDS, "the cat the", size) == (3, 11)
