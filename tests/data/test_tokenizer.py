import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from myriad.data import DataError
from myriad.data.bpe import FastBPE
from myriad.data.tokenizer import (
    END_TOKEN,
    GPT2_FILES,
    ByteEncoder,
    Tokenizer,
    byte_tokenizer,
    known_vocab_size,
    resolve_tokenizer,
    train_bpe,
)

TEXTS = [
    "the cat sat on the mat\n",
    "the dog sat on the log\n\n",
    "naïve café 12345 ... 'tis\t日本語 🎉\n",
] * 5
BYTES = byte_tokenizer()
BPE = train_bpe(TEXTS, 300)
both = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])


@both
@given(text=st.text())
def test_decoding_undoes_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@both
@given(texts=st.lists(st.text(), max_size=4))
def test_a_batch_gives_what_single_texts_give(tokenizer, texts):
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
    assert all(ids.dtype == np.dtype("<u2") for ids in batch)


@given(text=st.text())
def test_byte_ids_are_byte_values_and_the_file_agrees(text):
    plain = tokenizers.Tokenizer.from_buffer(BYTES._content)
    plain.encode_special_tokens = True
    assert BYTES.encode(text) == list(text.encode()) == plain.encode(text).ids
    assert plain.decode(plain.encode(text).ids, skip_special_tokens=False) == text


def test_vocabulary_and_end_token():
    assert (BYTES.vocab_size, BYTES.end_id) == (257, 256)
    assert BPE.vocab_size == 300
    for tokenizer in (BYTES, BPE):
        assert tokenizer.decode([tokenizer.end_id]) == END_TOKEN


@both
def test_the_end_token_written_in_a_text_stays_text(tokenizer, tmp_path):
    text = f"a{END_TOKEN}b {END_TOKEN}"
    tokenizer.save(tmp_path)
    for opened in (tokenizer, Tokenizer.open(tmp_path)):
        ids = opened.encode(text)
        assert opened.end_id not in ids
        assert opened.decode(ids) == text


@both
def test_saving_keeps_every_byte(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    tokenizer.save(tmp_path / "other.json")
    from_folder, from_file = Tokenizer.open(tmp_path), Tokenizer.open(tmp_path / "other.json")
    assert from_folder.sha256 == from_file.sha256 == tokenizer.sha256
    assert from_folder.encode("the cat") == tokenizer.encode("the cat")
    assert type(from_folder.encoder) is type(tokenizer.encoder) is (ByteEncoder if tokenizer is BYTES else FastBPE)


def test_training_is_deterministic():
    assert train_bpe(iter(TEXTS), 300).sha256 == BPE.sha256
    assert train_bpe(TEXTS[:1], 300).sha256 != BPE.sha256


def test_a_bpe_joins_no_words_and_may_stay_small():
    tokenizer = train_bpe(["ab ab ab"], 1000)
    assert tokenizer.vocab_size < 270
    assert len(tokenizer.encode("ab ab ab")) == 3


def test_specs(tmp_path):
    assert resolve_tokenizer("bytes", []).sha256 == BYTES.sha256
    assert resolve_tokenizer("bpe:300", TEXTS).sha256 == BPE.sha256
    BPE.save(tmp_path)
    assert resolve_tokenizer(tmp_path, []).sha256 == BPE.sha256
    assert resolve_tokenizer(str(tmp_path / "tokenizer.json"), []).sha256 == BPE.sha256


def test_vocabulary_sizes_known_beforehand():
    specs = ("bytes", "bpe:8192", "gpt2", "bpe:x", "runs/a")
    assert [known_vocab_size(spec) for spec in specs] == [257, 8192, 50257, None, None]


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("byte", "byte: no such tokenizer; did you mean 'bytes'?"),
        ("bpe:8k", "bpe:8k: no such tokenizer; did you mean 'bpe:8192'?"),
        ("bpe:256", "bpe:256: too few tokens"),
        ("bpe:" + "9" * 5000, "no such tokenizer"),
        ("", "no such tokenizer"),
        ("x" * 5000, "no such tokenizer"),
    ],
)
def test_unknown_specs_are_told(spec, line):
    with pytest.raises(DataError) as error:
        resolve_tokenizer(spec, TEXTS)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def write_gpt2_files(folder, names):
    """Two files in GPT-2's form, of a BPE with two merges."""
    definition = json.loads(BPE._content)
    singles = [token for token in definition["model"]["vocab"] if len(token) == 1]
    vocab = {token: id for id, token in enumerate([*singles, "th", "the", END_TOKEN])}
    (folder / names[0]).write_text(json.dumps(dict(reversed(vocab.items()))))
    (folder / names[1]).write_text("#version: 0.2\nt h\nth e\n")


def test_gpt2_files_of_either_name_give_the_same_tokenizer(tmp_path):
    found = []
    for number, names in enumerate(GPT2_FILES):
        (tmp_path / str(number)).mkdir()
        write_gpt2_files(tmp_path / str(number), names)
        found.append(resolve_tokenizer(tmp_path / str(number), []))
    assert found[0].sha256 == found[1].sha256
    assert (found[0].vocab_size, found[0].end_id) == (259, 258)
    assert found[0].encode("the") == [257]
    assert isinstance(found[0].encoder, FastBPE)


def test_gpt2_comes_from_the_hub(tmp_path, monkeypatch):
    write_gpt2_files(tmp_path, GPT2_FILES[1])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name: str(tmp_path / name))
    assert resolve_tokenizer("gpt2", []).sha256 == resolve_tokenizer(tmp_path, []).sha256


def test_a_hub_out_of_reach_is_told(monkeypatch):
    def fail(*_):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(DataError, match=r"^gpt2: cannot be had .* holds encoder\.json and vocab\.bpe instead$"):
        resolve_tokenizer("gpt2", [])


@pytest.mark.parametrize(
    ("vocabulary", "merges"),
    [
        ("[]", "a b\n"),
        ("{", "a b\n"),
        ('{"a": 0}', "a b\n"),
        ('{"a": 0, "b": 1, "ab": 2}', "a b c\n"),
        ('{"a": "x"}', "\n"),
    ],
)
def test_gpt2_files_that_are_none_are_told(vocabulary, merges, tmp_path):
    (tmp_path / "encoder.json").write_text(vocabulary)
    (tmp_path / "vocab.bpe").write_text(merges)
    with pytest.raises(DataError, match=r"encoder\.json and .*vocab\.bpe: not the two files of a BPE") as error:
        resolve_tokenizer(tmp_path, [])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"model": 1}'])
def test_a_file_that_is_no_tokenizer_is_named(content, tmp_path):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(DataError, match=r"t\.json: not a tokenizers file"):
        Tokenizer.open(tmp_path / "t.json")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.open(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"t\.json: has no <\|endoftext\|> token"):
        Tokenizer.open(tmp_path / "t.json")


def test_a_large_vocabulary_takes_32_bits():
    vocab = {f"w{i}": i for i in range(2**16)} | {END_TOKEN: 2**16}
    large = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=END_TOKEN))
    large.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(large.to_str().encode())
    assert tokenizer.dtype == np.dtype("<u4")
    assert tokenizer.encode("w65535 w1") == [65535, 1]


def test_a_callers_truncation_and_padding_are_lifted():
    cut = tokenizers.Tokenizer.from_buffer(BPE._content)
    cut.enable_truncation(2)
    cut.enable_padding(length=4)
    tokenizer = Tokenizer(cut.to_str().encode())
    assert tokenizer.encode_batch(["the cat sat", ""])[1].size == 0
    assert tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"


def test_no_torch_is_needed():
    code = "import sys, myriad.data.store; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
