import pytest
from hypothesis import given
from hypothesis import strategies as st

from myriad.data import parts
from myriad.data.parts import SPACES, count_words, in_parts
from myriad.data.sources import Document
from myriad.data.splits import at_character, at_line, bounds_of_lengths, bounds_of_shares, cut_at_bytes
from myriad.data.tokenizer import train_bpe

TEXT = "It's  a test, isn't it?\n\n  def f(x):\n\treturn 12345 + x...  \r\n = Title = \n café 日本 🎉!\n" * 50


@pytest.fixture
def sizes(monkeypatch):
    def set_sizes(part, longest):
        monkeypatch.setattr(parts, "PART", part)
        monkeypatch.setattr(parts, "LONGEST_PART", longest)

    return set_sizes


# --- parts


@pytest.mark.parametrize("part", [7, 64, 1000])
def test_parts_encode_like_the_whole(part, sizes):
    sizes(part, 10_000)
    tokenizer = train_bpe([TEXT], 400)
    found = list(in_parts([Document("a", TEXT[:100]), Document("a", TEXT[100:], continues=True)]))
    assert len(found) > len(TEXT) // (part + 100)
    assert [id for part in found for id in tokenizer.encode(part.text)] == tokenizer.encode(TEXT)
    assert sum(count_words([part.text for part in found])) == len(TEXT.split())
    assert not any(part.within_word for part in found)


@given(
    documents=st.lists(st.lists(st.text(st.sampled_from("ab \n.é"), max_size=12), min_size=1), max_size=4),
    part=st.integers(1, 5),
    longest=st.integers(5, 9),
)
def test_parts_lose_nothing_and_stay_short(documents, part, longest):
    pieces = [
        Document(str(number), text, continues=place > 0)
        for number, texts in enumerate(documents)
        for place, text in enumerate(texts)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART", part)
        patch.setattr(parts, "LONGEST_PART", longest)
        found = list(in_parts(pieces))
    joined, words = [], []
    for piece in found:
        count = len(piece.text.split()) - piece.within_word
        if piece.continues:
            joined[-1], words[-1] = joined[-1] + piece.text, words[-1] + count
        else:
            joined, words = [*joined, piece.text], [*words, count]
    whole = ["".join(texts) for texts in documents]
    assert joined == [text for text in whole if text]
    assert words == [len(text.split()) for text in joined]
    assert all(0 < len(piece.text) < longest + 2 * part for piece in found)


def test_a_text_without_words_is_cut_anywhere(sizes):
    sizes(10, 30)
    found = list(in_parts([Document("a", "x" * 100), Document("b", " " * 45)]))
    assert [len(part.text) for part in found] == [30, 30, 30, 10, 30, 15]
    assert [part.within_word for part in found] == [False, True, True, True, False, False]


def test_a_long_text_passes_in_linear_time():
    assert sum(len(part.text) for part in in_parts([Document("a", "x" * 20_000_000)])) == 20_000_000


@given(st.lists(st.text() | st.text(st.sampled_from("a \n\x1c\x85\xa0\u2003\u3000\U0001f389"))))
def test_words_are_counted_as_python_splits(texts):
    assert count_words(texts).tolist() == [len(text.split()) for text in texts]


def test_every_white_space_is_known():
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    assert SPACES.find("".join(characters)).tolist() == [character.isspace() for character in characters]


# --- cuts at bytes


@given(
    texts=st.lists(st.text(st.sampled_from("aé日🎉 \n"), max_size=9), max_size=6),
    continues=st.lists(st.booleans(), min_size=6, max_size=6),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
)
def test_cuts_are_at_the_bytes_asked_for(texts, continues, lengths):
    pieces = [Document("a", text, continues=flag) for text, flag in zip(texts, continues, strict=False)]
    names = ("train", "validation", "test")[: len(lengths)]
    whole = "".join(texts).encode()
    found = dict.fromkeys(names, b"")
    order = []
    for document in cut_at_bytes(pieces, bounds_of_lengths(lengths, names), at_character):
        found[document.split] += document.text.encode()
        order.append((document.split, document.continues))
    joined = b"".join(found.values())
    assert whole.startswith(joined)
    end = 0
    for name, length in zip(names, lengths, strict=True):
        end += length
        if end <= len(whole):
            cut = len(whole[:end].decode(errors="ignore").encode())
            assert b"".join(found[name] for name in names[: names.index(name) + 1]) == whole[:cut]
    for name in names:
        firsts = [goes_on for split, goes_on in order if split == name][:1]
        assert firsts in ([], [False]) or name == "train"


def test_what_is_missing_is_told():
    def cut():
        missing.append((yield from cut_at_bytes([Document("a", "12345")], bounds, at_character)))

    missing, bounds = [], bounds_of_lengths([4, 4], ["train", "validation"])
    assert [document.text for document in cut()] == ["1234", "5"]
    assert missing == [3]


def test_text_of_other_splits_passes():
    pieces = [Document("a", "aa"), Document("t", "tt", "test"), Document("b", "bb")]
    found = list(cut_at_bytes(pieces, bounds_of_shares(4, {"validation": 0.5}), at_line))
    assert [(d.split, d.text) for d in found] == [("train", "aa"), ("test", "tt"), ("validation", "bb")]


@pytest.mark.parametrize(
    ("text", "at", "cut"),
    [
        ("ab\ncd\nef", 7, 6),
        ("ab cd ef", 7, 6),
        ("abcdef", 3, 3),
        ("é日", 1, 0),
        ("é日", 4, 2),
        ("é日", 5, 5),
        ("ab\n", 3, 3),
    ],
)
def test_a_cut_is_at_a_line_a_word_or_a_character(text, at, cut):
    assert at_line(text.encode(), at) == cut
