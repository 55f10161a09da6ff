import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made import as_jsonl, documents_of, make, write

from myriad.config import ConfigError, validate
from myriad.data import DataError, parts
from myriad.data.corpus import Corpus, TextHash, text_hash
from myriad.data.place import BusyError
from myriad.data.prepare import Recipe, has_changed, prepare
from myriad.data.sources import Document, text
from myriad.data.sources.text import TextSource
from myriad.data.store import Store
from myriad.data.tokenizer import train_bpe
from myriad.data.writer import SplitWriter

FILES = {"1.txt": "zero one\n", "2.txt": "zwei drei é\n", "3.txt": "last"}


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "texts", FILES)


class Given(TextSource):
    """Documents given by a test."""

    def __init__(self, *documents):
        super().__init__("given")
        self._documents = documents

    def documents(self):
        return iter(self._documents)

    def fingerprint(self):
        return "given"


def given_corpus(*documents):
    found = Corpus(Recipe(source="python"))
    found.source = Given(*documents)
    return found


def left_behind(path):
    return sorted(found.name for found in path.iterdir())


# --- splits


def test_a_file_is_one_document_cut_at_a_line_start(tmp_path):
    lines = [f"line {number}\n" for number in range(100)]
    found = documents_of(make(tmp_path / "out", source=write(tmp_path, {"a.txt": "".join(lines)}) / "a.txt"))
    assert {name: len(documents) for name, documents in found.items()} == {"train": 1, "validation": 1}
    assert found["train"][0] + found["validation"][0] == "".join(lines)
    assert found["validation"][0].startswith("line ")
    assert 0.05 <= len(found["validation"][0]) / len("".join(lines)) < 0.07


def test_the_last_documents_are_held_out(tmp_path):
    write(tmp_path / "in", {f"{number:03}.txt": f"text {number}" for number in range(100)})
    found = documents_of(make(tmp_path / "out", source=tmp_path / "in", validation=0.1, test=0.03))
    assert found["validation"] == [f"text {number}" for number in range(87, 97)]
    assert found["test"] == ["text 97", "text 98", "text 99"]
    assert found["train"] == [f"text {number}" for number in range(87)]


def test_one_file_in_a_folder_is_cut_like_a_file(tmp_path):
    content = "some words on a line\n" * 100
    write(tmp_path, {"in/a.txt": content})
    of_file = make(tmp_path / "file", source=tmp_path / "in" / "a.txt", test=0.1)
    of_folder = make(tmp_path / "folder", source=tmp_path / "in", test=0.1)
    assert documents_of(of_file) == documents_of(of_folder)
    assert [len(documents_of(of_file)[name]) for name in ("train", "validation", "test")] == [1, 1, 1]


OWN = {"train/1": "a", "train/2": "b", "validation/1": "c", "test/1": "d"}


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({}, {"train": ["a", "b"], "validation": ["c"], "test": ["d"]}),
        ({"validation": 0.5}, {"train": ["a"], "validation": ["b"], "test": ["d"]}),
        ({"validation": "other.txt"}, {"train": ["a", "b"], "validation": ["other"], "test": ["d"]}),
        ({"validation": "other.txt", "test": "in"}, {"train": ["a", "b"], "validation": ["other"], "test": [*"dabc"]}),
        ({"test": 0.4}, {"train": ["a"], "validation": ["c"], "test": ["b"]}),
        ({"split_bytes": [2, 1, 1]}, {"train": ["d", "a"], "validation": ["b"], "test": ["c"]}),
        ({"split_bytes": [1, 1]}, {"train": ["d"], "validation": ["a"]}),
    ],
)
def test_the_recipe_overrides_the_sources_own_splits(recipe, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(
        write(tmp_path, {f"in/{name}": content for name, content in OWN.items()} | {"other.txt": "other"})
    )
    assert documents_of(make(tmp_path / "out", source="in", **recipe)) == expected


def test_without_validation_text_of_its_own_a_source_holds_some_out(tmp_path):
    write(tmp_path / "in", {"train/1": "a", "train/2": "b", "test/1": "c"})
    found = documents_of(make(tmp_path / "out", source=tmp_path / "in"))
    assert found == {"train": ["a"], "validation": ["b"], "test": ["c"]}


def test_one_training_document_is_cut_though_there_are_others(tmp_path):
    write(tmp_path / "in", {"train/1": "line\n" * 40, "test/1": "c"})
    found = documents_of(make(tmp_path / "out", source=tmp_path / "in"))
    assert found == {"train": ["line\n" * 38], "validation": ["line\n" * 2], "test": ["c"]}


def test_bytes_are_cut_exactly(tmp_path):
    content = "ab cd\n" * 20
    write(tmp_path, {"a.txt": content})
    found = documents_of(make(tmp_path / "out", source=tmp_path / "a.txt", split_bytes=("1e2", 10, 5)))
    assert found == {"train": [content[:100]], "validation": [content[100:110]], "test": [content[110:115]]}


def test_too_few_bytes_are_told(tmp_path):
    write(tmp_path, {"a.txt": "12345"})
    with pytest.raises(DataError, match=r"a\.txt: holds 5 bytes of text; split_bytes asks for 1,008"):
        make(tmp_path / "out", source=tmp_path / "a.txt", split_bytes=(1000, 8))
    with pytest.raises(DataError, match="too little text for a validation split"):
        make(tmp_path / "out", source=write(tmp_path, {"b.txt": "ab日"}) / "b.txt", split_bytes=(2, 1))
    assert left_behind(tmp_path) == ["a.txt", "b.txt"]


@settings(max_examples=40, deadline=None)
@example(documents=["aa"], validation=None, test=0.25, part=1, shard=1)  # too short for a default validation split
@given(
    documents=st.lists(st.text(st.sampled_from("aé日 \n"), max_size=30), min_size=1, max_size=7),
    validation=st.none() | st.floats(0.01, 0.5),
    test=st.none() | st.floats(0.01, 0.45),
    part=st.integers(1, 9),
    shard=st.integers(1, 9),
)
def test_nothing_is_lost_whatever_is_held_out(documents, validation, test, part, shard, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("held-out")
    write(tmp_path / "in", {str(number): content for number, content in enumerate(documents)})
    recipe = Recipe(source=tmp_path / "in", validation=validation, test=test)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART", part)
        patch.setattr(text, "BLOCK", part + 1)
        fault = None
        try:
            store = prepare(recipe, tmp_path / "out", shard_tokens=shard)
        except DataError as error:
            fault = str(error)
    if fault is not None:
        assert any(words in fault for words in ("too few", "too little", "holds no text"))
        assert left_behind(tmp_path) == ["in"]
        return
    store.verify()
    found = documents_of(store)
    whole = [content for content in documents if content]
    assert set(found) == {"train", "validation"} | ({"test"} if test else set())
    assert "".join("".join(found[name]) for name in ("train", "validation", "test") if name in found) == "".join(whole)
    if len(whole) > 1:
        assert [*found["train"], *found["validation"], *found.get("test", [])] == whole
        assert len(found["validation"]) == max(1, round(len(whole) * (validation or 0.05)))


def test_long_documents_are_held_out_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART", 8)
    write(tmp_path / "in", {"a": "first " * 10, "b": "second " * 10})
    found = documents_of(make(tmp_path / "out", source=tmp_path / "in"))
    assert found == {"train": ["first " * 10], "validation": ["second " * 10]}


def test_the_end_token_in_a_text_adds_no_document(tmp_path):
    write(tmp_path, {"a.txt": "one <|endoftext|> two\n" * 50})
    for tokenizer in ("bytes", "bpe:280"):
        store = make(tmp_path / tokenizer, source=tmp_path / "a.txt", tokenizer=tokenizer)
        tokens = store.split("train").tokens[:]
        assert np.flatnonzero(tokens == store.index.end_id).tolist() == [0]


def test_a_long_file_is_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART", 16)
    content = "some words on a line\n" * 100
    write(tmp_path, {"a.txt": content})
    recipe = Recipe(source=tmp_path / "a.txt", tokenizer="bpe:300")
    store = prepare(recipe, tmp_path / "store", shard_tokens=50)
    train, validation = store.split("train"), store.split("validation")
    assert (train.documents, validation.documents) == (1, 1)
    assert train.bytes + validation.bytes == len(content)
    assert train.words + validation.words == 500
    assert store.tokenizer.decode([*train.tokens[1:], *validation.tokens[1:]]) == content
    assert train.tokens[1:].tolist() == store.tokenizer.encode(content[: train.bytes])


def test_small_documents_of_several_splits_stay_in_order(tmp_path):
    rows = [{"text": f"{number} " * (number % 7 + 1)} for number in range(3000)]
    write(tmp_path / "in", {"train.jsonl": as_jsonl(*rows), "valid.jsonl": as_jsonl(*rows[:50])})
    store = make(tmp_path / "out", source=tmp_path / "in", tokenizer="bpe:300")
    train = store.split("train")
    expected = [store.index.end_id]
    for row in rows:
        expected += [*store.tokenizer.encode(row["text"]), store.index.end_id]
    assert train.tokens[:].tolist() == expected[:-1]
    assert train.document_offsets[:-1].tolist() == np.flatnonzero(train.tokens[:] == store.index.end_id).tolist()
    assert store.split("validation").documents == 50


# --- the text that a tokenizer is trained on


def texts_to_train_on(found, limit):
    return "".join(found.training_texts(limit))


def test_a_tokenizer_is_trained_on_training_text_alone():
    found = given_corpus(Document("a", "éé"), Document("b", "vv", "validation"), Document("c", "cd"))
    assert texts_to_train_on(found, 100) == "éécd"
    assert texts_to_train_on(found, 5) == "ééc"
    assert texts_to_train_on(found, 3) == "é"


@given(count=st.integers(2, 60), limit=st.integers(1, 200))
def test_text_that_is_held_out_trains_no_tokenizer(count, limit):
    documents = [Document(str(number), f"{number:03}") for number in range(count)]
    held_out = max(1, round(count * 0.05))
    expected = "".join(document.text for document in documents[: count - held_out])[:limit]
    assert texts_to_train_on(given_corpus(*documents), limit) == expected


def test_held_out_bytes_train_no_tokenizer(tmp_path):
    content = "line\n" * 100
    write(tmp_path, {"in/a.txt": content})
    for source in ("in", "in/a.txt"):
        assert texts_to_train_on(Corpus(Recipe(source=tmp_path / source)), 1000) == content[:475]
        assert texts_to_train_on(Corpus(Recipe(source=tmp_path / source, split_bytes=(7, 5))), 1000) == content[:7]


def test_a_huge_source_is_not_read_to_its_end_to_train_a_tokenizer():
    class Endless(Given):
        def documents(self):
            return (Document(str(number), "abc") for number in range(10**12))

    found = given_corpus()
    found.source = Endless()
    assert texts_to_train_on(found, 3000) == "abc" * 1000


def test_a_trained_tokenizer_is_that_of_the_text(tmp_path):
    content = "the cat sat on the mat\n" * 100
    write(tmp_path, {"a.txt": content})
    store = make(tmp_path / "out", source=tmp_path / "a.txt", tokenizer="bpe:280")
    assert store.tokenizer.sha256 == train_bpe([content[: store.split("train").bytes]], 280).sha256


# --- hashes


def test_the_same_text_gives_the_same_hashes_wherever_it_lies(folder, tmp_path):
    store = make(tmp_path / "store", source=folder)
    again = make(tmp_path / "deep" / "store2", source=folder.rename(tmp_path / "elsewhere"))
    assert again.index.source_sha256 == store.index.source_sha256
    assert again.split("train").sha256 == store.split("train").sha256 != store.split("validation").sha256


def test_the_hash_tells_names_and_texts_apart():
    def digest(*documents):
        found = TextHash()
        list(found.watch(Given(*documents)))
        return found.hexdigest()

    base = digest(Document("a", "bc"), Document("d", "e"))
    assert base == digest(Document("a", "b"), Document("a", "c", continues=True), Document("d", "e"))
    assert base == digest(Document("a", "bc"), Document("empty", ""), Document("d", "e"))
    others = [
        digest(Document("ab", "c"), Document("d", "e")),
        digest(Document("a", "bc"), Document("e", "d")),
        digest(Document("a", "b"), Document("a", "c"), Document("d", "e")),
        digest(Document("d", "e"), Document("a", "bc")),
    ]
    assert base not in others


@pytest.mark.parametrize("recipe", [{}, {"validation": 0.4}, {"split_bytes": (5, 5)}, {"document_start": "e"}])
def test_the_hash_of_a_recipe_is_that_of_its_store(recipe, folder, tmp_path):
    store = make(tmp_path / "out", source=folder, **recipe)
    assert text_hash(store.index.recipe) == store.index.source_sha256


def test_a_source_is_read_again_only_if_it_may_have_changed(folder, tmp_path, monkeypatch):
    store = make(tmp_path / "out", source=folder, validation=folder / "3.txt")
    recipe = store.index.recipe
    with monkeypatch.context() as patch:
        patch.setattr("myriad.data.prepare.text_hash", lambda _: pytest.fail("read again"))
        assert not has_changed(store, recipe)
    os.utime(folder / "1.txt", (1, 1))
    assert not has_changed(store, recipe)
    write(folder, {"1.txt": "zero two\n"})
    assert has_changed(store, recipe)


# --- recipes


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"validation": 1.5}, "validation: expected a share between 0 and 1, or a source, found 1.5"),
        ({"validation": "0"}, "validation: expected a share between 0 and 1, or a source, found 0"),
        ({"validation": "nan"}, "validation: expected a share between 0 and 1, or a source, found nan"),
        ({"validation": 0.5, "test": "0.5"}, "shares of 0.5 and 0.5 leave nothing to train on"),
        ({"validation": 0.1, "split_bytes": [1, 1]}, "split_bytes says where all splits are; validation and test"),
        ({"test": "a.txt", "split_bytes": [1, 1]}, "split_bytes says where all splits are; validation and test"),
        ({"split_bytes": [1]}, "split_bytes"),
        ({"split_bytes": [1, 2, 3, 4]}, "split_bytes"),
        ({"split_bytes": [1, 0]}, "split_bytes.1: expected greater than or equal to 1, found 0"),
        ({"split_bytes": ["9e6", "x"]}, "split_bytes.1: expected a valid integer"),
        ({"document_start": "(", "field": "text"}, "document_start: '(' is no regular expression"),
        ({"document_start": "a{99999999999999}"}, "is no regular expression"),
        ({"valdation": 0.1}, "valdation: unknown key; did you mean 'validation'?"),
        ({"validation": True}, "validation: expected a share"),
        ({"validation": [1]}, "validation"),
    ],
)
def test_recipes_that_cannot_be_are_told(settings, line):
    with pytest.raises(ConfigError) as error:
        validate(Recipe, {"source": "a", **settings})
    assert line in str(error.value)


def test_a_recipe_reads_words_and_survives_json():
    recipe = Recipe(source="a", validation="0.1", test="b", split_bytes=None, document_start="^#")
    assert (recipe.validation, recipe.test) == (0.1, "b")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert Recipe(source="a", split_bytes=("90e6", 5e6, 5_000_000)).split_bytes == (90_000_000, 5_000_000, 5_000_000)


# --- faults


def test_progress_is_told(folder, tmp_path):
    told = []
    prepare(Recipe(source=folder, tokenizer="bpe:300"), tmp_path / "store", lambda *what: told.append(what))
    assert told[-1] == ("encoding", 26, 26)
    assert {stage for stage, _, _ in told} == {"training the tokenizer", "encoding"}


@pytest.mark.parametrize("content", ["", " \n\t \n"])
def test_empty_text_is_refused(content, tmp_path):
    write(tmp_path, {"a.txt": content})
    with pytest.raises(DataError, match=r"a\.txt: holds no text"):
        make(tmp_path / "out", source=tmp_path / "a.txt")
    assert left_behind(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("made", ["store", "file", "full"])
def test_nothing_is_overwritten(made, folder, tmp_path):
    out = tmp_path / "out"
    if made == "store":
        make(out, source=folder)
    elif made == "file":
        out.write_text("mine")
    else:
        write(out, {"mine": "mine"})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"out: (holds a store already|exists and is not an empty folder)"):
        make(out, source=folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_may_become_a_store(folder, tmp_path):
    (tmp_path / "out").mkdir()
    assert make(tmp_path / "out", source=folder).split("train").documents == 2


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_interrupted_preparation_leaves_nothing(fault, folder, tmp_path):
    def interrupt(stage, done, total):
        raise fault("stop")

    with pytest.raises(DataError if fault is OSError else fault, match="stop"):
        prepare(Recipe(source=folder), tmp_path / "out", interrupt)
    assert left_behind(tmp_path) == ["texts"]


def test_a_source_that_changes_while_it_is_read_is_told(folder, tmp_path):
    def grow(stage, done, total):
        write(folder, {"1.txt": "longer than before"})

    with pytest.raises(DataError, match="texts: changed while it was read; prepare it again"):
        prepare(Recipe(source=folder), tmp_path / "out", grow)
    assert left_behind(tmp_path) == ["texts"]


def test_a_text_too_short_to_split_is_refused(tmp_path):
    write(tmp_path, {"a.txt": "x", "b.jsonl": as_jsonl({"text": "a"}, {"text": "b"})})
    with pytest.raises(DataError, match="too little text for a train split"):
        make(tmp_path / "out", source=tmp_path / "a.txt")
    with pytest.raises(DataError, match="2 documents are too few to hold out 2 splits"):
        make(tmp_path / "out", source=tmp_path / "b.jsonl", test=0.1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(folder, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(DataError, match="cannot be prepared"):
        make(tmp_path / "locked" / "out", source=folder)


def test_an_out_below_a_file_is_told(folder):
    with pytest.raises(DataError, match="cannot be prepared"):
        make(folder / "1.txt" / "out", source=folder)


def test_what_a_killed_preparation_left_is_removed_and_nothing_else(folder, tmp_path):
    left = [".out.preparing-0123abcd/train-00000.bin", ".out.preparing-mine/a", ".other.preparing-0123abcd/a"]
    write(tmp_path, dict.fromkeys(left, "x"))
    make(tmp_path / "out", source=folder)
    assert left_behind(tmp_path) == [".other.preparing-0123abcd", ".out.preparing-mine", "out", "texts"]


def test_two_preparations_of_one_store_exclude_each_other(folder, tmp_path):
    with (
        FileLock(tmp_path / ".out.lock"),
        pytest.raises(BusyError, match="out: another process is preparing this store"),
    ):
        make(tmp_path / "out", source=folder)
    assert make(tmp_path / "out", source=folder).split("train").documents == 2
    assert left_behind(tmp_path) == ["out", "texts"]


FULL_DISK = """
import resource, signal, sys
from myriad.data import DataError
from myriad.data.prepare import Recipe, prepare
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    prepare(Recipe(source=sys.argv[1], tokenizer="bytes"), sys.argv[2])
except DataError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("limit", [0, 100, 5_000, 50_000, 199_999])
def test_a_full_disk_is_told_and_leaves_nothing(limit, tmp_path):
    write(tmp_path, {"a.txt": "some words\n" * 20_000})
    words = [str(tmp_path / "a.txt"), str(tmp_path / "out"), str(limit)]
    done = subprocess.run([sys.executable, "-c", FULL_DISK, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"{tmp_path / 'out'}: cannot be prepared" in done.stderr
    assert left_behind(tmp_path) == ["a.txt"]


KILLED = """
import sys
from myriad.data.prepare import Recipe, prepare
print("ready", flush=True)
prepare(Recipe(source=sys.argv[1], tokenizer="bpe:400", validation="0.3"), sys.argv[2], shard_tokens=20_000)
"""


def test_a_preparation_killed_at_any_moment_leaves_no_store_that_looks_whole(tmp_path):
    rows = [{"text": f"document {number} has some words\n" * 30} for number in range(1500)]
    write(tmp_path, {"a.jsonl": as_jsonl(*rows)})
    whole = make(tmp_path / "whole", source=tmp_path / "a.jsonl", tokenizer="bpe:400", validation=0.3)
    moments = random.Random(0)
    finished = 0
    for _ in range(4):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "a.jsonl"), str(tmp_path / "out")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if (tmp_path / "out").exists():
            finished += 1
            Store.open(tmp_path / "out").verify()
            break
    if not finished:
        assert all(name.startswith(".out.") for name in left_behind(tmp_path) if name not in ("a.jsonl", "whole"))
        make(tmp_path / "out", source=tmp_path / "a.jsonl", tokenizer="bpe:400", validation=0.3)
    store = Store.open(tmp_path / "out")
    assert {name: (split.tokens, split.documents) for name, split in store.index.splits.items()} == {
        name: (split.tokens, split.documents) for name, split in whole.index.splits.items()
    }
    assert store.split("train").tokens[:].tolist() == whole.split("train").tokens[:].tolist()
    if not finished:
        assert left_behind(tmp_path) == ["a.jsonl", "out", "whole"]


# --- bounded memory


LARGE = """
import resource, sys
from myriad.data.prepare import Recipe, prepare
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
store = prepare(Recipe(source=sys.argv[1], tokenizer="bytes", document_start="^#"), sys.argv[2])
print(peak() - before, sum(split.documents for split in store.index.splits.values()))
"""


def test_memory_is_bounded_whatever_the_size_of_the_text(tmp_path):
    document = "# heading\n" + ("some words on a line " * 9 + "\n") * 5
    copies = 200_000_000 // len(document)
    with open(tmp_path / "large.txt", "w") as file:
        for _ in range(100):
            file.write(document * (copies // 100))
    command = [sys.executable, "-c", LARGE, str(tmp_path / "large.txt"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    growth, documents = map(int, done.stdout.split())
    assert growth < 150, f"{growth} MB"
    assert documents == copies // 100 * 100
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    (tmp_path / "large.txt").unlink()


def test_the_tail_is_moved_across_shards(tmp_path):
    from myriad.data.prepare import encode_all
    from myriad.data.tokenizer import byte_tokenizer

    for held_out in range(1, 9):
        folder = tmp_path / str(held_out)
        folder.mkdir()
        train, test = (SplitWriter(folder, name, np.dtype("<u2"), 7) for name in ("train", "test"))
        texts = ["abc" * number for number in range(1, 10)]
        for batch in encode_all((parts.Part(content, "train") for content in texts), byte_tokenizer()):
            train.add(batch)
        train.move_tail(held_out, test)
        for split, expected in ((train, texts[: 9 - held_out]), (test, texts[9 - held_out :])):
            split.finish()
            tokens = np.concatenate([np.fromfile(path, "<u2") for path in split.shards]).tolist()
            assert tokens == [id for content in expected for id in (256, *content.encode())]
            assert (split.documents, split.bytes, split.words) == (len(expected), len("".join(expected)), len(expected))
            assert np.fromfile(split.offsets, "<i8")[-1] == split.tokens == len(tokens)


def test_no_torch_is_needed():
    code = "import sys, myriad.data.prepare; assert not {'torch', 'datasets', 'pyarrow', 'tiktoken'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
