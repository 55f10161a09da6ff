"""The fast form of byte-level BPE gives the ids of `tokenizers`."""

import json
import lzma
import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from myriad.data.bpe import CUT, JOIN, FastBPE, fast_bpe
from myriad.data.tokenizer import END_TOKEN, LibraryEncoder, Tokenizer, resolve_tokenizer, train_bpe
from tiny import DATA

TEXTS = [
    "the cat sat on the mat\n",
    "the dog sat on the log\n\n",
    "naïve café 12345 ... 'tis\t日本語 🎉\n",
    "    def f(x):\n        return x  # isn't it\n\n\n",
] * 5
TRAINED = train_bpe(TEXTS, 400)
HARD = st.text() | st.text(st.sampled_from("aé1²'.\n \t\r\x0b\x1c\x85\xa0\u2003\u3000st日🎉<|>"), max_size=40)
PIECES = st.sampled_from([END_TOKEN, JOIN, CUT, "it's", " the", "  ", "\n\n", " \n", "1234", "...", "'ll"])
gpt2_files = pytest.mark.skipif(not (DATA / "vocab.bpe.xz").exists(), reason="GPT-2's vocabulary is not here")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("gpt2")
    for name in ("encoder.json", "vocab.bpe"):
        (folder / name).write_bytes(lzma.decompress((DATA / f"{name}.xz").read_bytes()))
    return resolve_tokenizer(folder, [])


def slow(tokenizer):
    return LibraryEncoder(tokenizer._tokenizer, tokenizer.dtype)


def assert_equal(tokenizer, texts):
    assert isinstance(tokenizer.encoder, FastBPE)
    (ids, counts), (expected, lengths) = tokenizer.encoder.encode(texts), slow(tokenizer).encode(texts)
    assert ids.dtype == expected.dtype == tokenizer.dtype
    assert ids.tolist() == expected.tolist()
    assert counts.tolist() == lengths.tolist()


@given(st.lists(HARD | st.lists(PIECES | HARD).map("".join), max_size=4))
def test_the_ids_are_those_of_tokenizers(texts):
    assert_equal(TRAINED, texts)


@gpt2_files
@settings(max_examples=200)
@given(texts=st.lists(HARD | st.lists(PIECES | HARD).map("".join), max_size=4))
def test_the_ids_of_gpt2_are_those_of_tokenizers(texts, gpt2):
    assert_equal(gpt2, texts)


@gpt2_files
@pytest.mark.skipif(not (DATA / "wiki.valid.tokens.xz").exists(), reason="WikiText's validation text is not here")
def test_real_text_has_the_ids_of_tokenizers(gpt2):
    text = lzma.decompress((DATA / "wiki.valid.tokens.xz").read_bytes()).decode()
    assert_equal(gpt2, text.split("\n = "))
    assert_equal(gpt2, [text])


@pytest.mark.parametrize("plane", [0, 0x10000, 0x20000, 0x30000, 0xE0000, 0xF0000])
def test_every_character_is_of_the_same_class(plane):
    """After a letter, a digit, a sign and a space, before a letter: whether the two rules cut there."""
    codes = [code for code in range(plane, plane + 0x10000) if not 0xD800 <= code < 0xE000]
    assert_equal(ALL_PAIRS, ["".join(f"x{chr(code)}1{chr(code)}.{chr(code)} {chr(code)}x " for code in codes)])


def pair_tokenizer() -> Tokenizer:
    """A tokenizer that joins every byte with a letter, digit, sign or space before it: its ids show every cut."""
    definition = json.loads(train_bpe([""], 257)._content)
    vocab = definition["model"]["vocab"]
    singles = [token for token in vocab if token != END_TOKEN]
    merges = [[first, second] for first in ("x", "1", ".", "Ġ", "Ċ") for second in singles]
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    definition["model"]["merges"] = merges
    return Tokenizer(json.dumps(definition).encode())


ALL_PAIRS = pair_tokenizer()


def changed(change) -> Tokenizer:
    definition = json.loads(TRAINED._content)
    change(definition)
    return Tokenizer(json.dumps(definition).encode())


def swap_last_merges(definition):
    merges = definition["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]


def add_unreachable_token(definition):
    model = definition["model"]
    model["vocab"]["zqz"] = len(model["vocab"])
    model["vocab"]["zq"] = len(model["vocab"])
    model["merges"] += [["zq", "z"], ["z", "q"]]


DIFFERENT = {
    "a prefix space": lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
    "no splitting": lambda d: d["pre_tokenizer"].update(use_regex=False),
    "another splitter": lambda d: d.update(pre_tokenizer={"type": "Whitespace"}),
    "no splitter": lambda d: d.update(pre_tokenizer=None),
    "a normalizer": lambda d: d.update(normalizer={"type": "Lowercase"}),
    "whole words first": lambda d: d["model"].update(ignore_merges=True),
    "dropout": lambda d: d["model"].update(dropout=0.1),
    "merges in another order": swap_last_merges,
    "a token that is never made": add_unreachable_token,
    "a token without merge": lambda d: d["model"]["vocab"].update(zqz=len(d["model"]["vocab"])),
    "a byte that is missing": lambda d: d["model"]["vocab"].pop("ÿ"),
    "an added token that is no special one": lambda d: d["added_tokens"].append(
        {**d["added_tokens"][0], "id": 400, "content": "cat", "special": False}
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_it_cannot_do_is_left_to_tokenizers(name):
    tokenizer = changed(DIFFERENT[name])
    assert fast_bpe(tokenizer._tokenizer, tokenizer.dtype) is None
    assert isinstance(tokenizer.encoder, LibraryEncoder)
    assert len(tokenizer.encode_batch(["the cat sat", "it"])) == 2


def test_other_models_are_left_to_tokenizers():
    vocab = {"a": 0, "b": 1, END_TOKEN: 2}
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=END_TOKEN))
    assert fast_bpe(other, TRAINED.dtype) is None


@pytest.mark.parametrize("text", ["a", " ", "\n", "é", "1", "^", "'", "ab ", "  x", "\x85", "\u3000a"])
def test_long_runs_take_linear_time(text):
    start = time.perf_counter()
    TRAINED.encoder.encode([text * (10**6 // len(text))])
    assert time.perf_counter() - start < 10
