import json
import math
import shutil

import numpy as np
import pytest
import tokenizers
from domains import WORDS, write_domains
from made import documents_of, make, write

from myriad.data import DataError
from myriad.data import cluster as module
from myriad.data.cluster import cluster
from myriad.data.clusters import INDEX_NAME, MODEL_NAME, ClusterOptions, Clusters
from myriad.data.features import count_documents
from myriad.data.place import BusyError
from myriad.data.stream import Stream
from myriad.data.tokenizer import END_TOKEN

OPTIONS = ClusterOptions(clusters=3, features=20)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("domains")
    source = write_domains(folder / "in", documents=40)
    return make(folder / "store", source=source, tokenizer="bytes", validation=0.2, test=0.1)


@pytest.fixture(scope="module")
def made(store, tmp_path_factory):
    return cluster(store, tmp_path_factory.mktemp("clusters") / "out", OPTIONS)


def domain_of(text):
    return max(WORDS, key=lambda name: sum(text.count(word) for word in WORDS[name]))


def test_the_clusters_are_the_domains_in_every_split(store, made):
    whole, seen = documents_of(store), set()
    parts = [documents_of(part) for part in made.stores()]
    for split, documents in whole.items():
        assert sorted(text for part in parts for text in part[split]) == sorted(documents)
        for part in parts:
            order = [documents.index(text) for text in part[split]]
            assert order == sorted(order)
    for part in parts:
        (domain,) = {domain_of(text) for texts in part.values() for text in texts}
        seen.add(domain)
    assert seen == set(WORDS)


def test_the_stores_are_whole_and_have_the_tokenizer(store, made):
    for part in made.stores():
        part.verify()
        assert part.tokenizer.sha256 == store.tokenizer.sha256
        assert part.index.recipe == store.index.recipe
        assert Stream(part.split("train").tokens, 32, seed=0).batch(0, 2)[0].shape == (2, 32)
    hashes = [part.index.source_sha256 for part in made.stores()]
    assert len({*hashes, store.index.source_sha256}) == 4


def test_the_index_says_what_is_where(store, made):
    for entry, part in zip(made.index.clusters, made.stores(), strict=True):
        assert entry.tokens == {name: split.tokens for name, split in part.index.splits.items()}
        assert entry.documents == {name: split.documents for name, split in part.index.splits.items()}
    assert made.index.tokenizer_sha256 == store.index.tokenizer_sha256
    assert made.index.source == store.index.source


def test_no_cluster_holds_more_than_its_share(store, tmp_path):
    """One domain is half of the text: some of it must go elsewhere."""
    names = {f"{n:03}": WORDS["sea" if n % 2 else ("kitchen", "code")[n // 2 % 2]] for n in range(120)}
    source = write(tmp_path / "in", {name: " ".join(words * 3) for name, words in names.items()})
    uneven = make(tmp_path / "store", source=source, tokenizer="bytes", validation=0.2)
    for slack in (1.0, 1.2):
        options = OPTIONS.model_copy(update={"slack": slack})
        found = cluster(uneven, tmp_path / f"out {slack}", options)
        tokens = [entry.tokens["train"] for entry in found.index.clusters]
        longest = np.diff(uneven.split("train").document_offsets).max()
        bound = math.ceil(sum(tokens) / 3 * slack)
        assert max(tokens) <= bound + (longest if slack == 1 else 0)


def test_held_out_documents_go_to_the_nearest_center(store, made):
    split = store.split("validation")
    (counts,) = count_documents(split, store.index.vocab_size)
    nearest = made.model.distances(made.model.features.of(counts)).argmin(1)
    texts = documents_of(store)["validation"]
    for number, part in enumerate(made.stores()):
        assert documents_of(part)["validation"] == [
            text for text, at in zip(texts, nearest, strict=True) if at == number
        ]


def test_the_same_options_give_the_same_files_and_another_seed_others(store, made, tmp_path):
    again, other = (cluster(store, tmp_path / str(seed), OPTIONS.model_copy(update={"seed": seed})) for seed in (0, 1))
    names = sorted(path.relative_to(made.path) for path in made.path.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again.path) for path in again.path.rglob("*") if path.is_file())
    assert all((made.path / name).read_bytes() == (again.path / name).read_bytes() for name in names)
    assert (other.path / MODEL_NAME).read_bytes() != (made.path / MODEL_NAME).read_bytes()


def test_typical_tokens_tell_the_domains_apart(tmp_path):
    source = write_domains(tmp_path / "in", documents=40)
    words = make(tmp_path / "store", source=source, tokenizer="bpe:400", validation=0.2)
    found = cluster(words, tmp_path / "out", OPTIONS)
    for entry, part in zip(found.index.clusters, found.stores(), strict=True):
        text = part.tokenizer.decode(part.split("train").tokens[1:200].tolist())
        assert all(token in "".join(f" {word}" for word in WORDS[domain_of(text)]) for token in entry.typical[:3])


def test_long_documents_are_copied_in_pieces(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 17)
    monkeypatch.setattr(module, "BATCH", 64)
    found = cluster(store, tmp_path / "out", OPTIONS)
    assert sum(len(documents_of(part)["train"]) for part in found.stores()) == store.split("train").documents


def test_other_tokenizers_are_counted_if_they_give_the_text_back(tmp_path):
    words = {word: id for id, word in enumerate(["the", "and", "of", "[UNK]", END_TOKEN])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens([END_TOKEN])
    made.save(str(tmp_path / "tokenizer.json"))
    lossy = make(tmp_path / "store", source=write_domains(tmp_path / "in"), tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="its tokenizer does not give back the text"):
        cluster(lossy, tmp_path / "out", ClusterOptions(clusters=2))
    assert not (tmp_path / "out").exists()


def test_a_split_of_test_text_may_lack_a_cluster(tmp_path):
    source = write_domains(tmp_path / "in", documents=40)
    few = make(tmp_path / "store", source=source, tokenizer="bytes", validation=0.2, test=0.01)
    found = cluster(few, tmp_path / "out", OPTIONS)
    assert sum("test" in part.index.splits for part in found.stores()) == 1


# --- faults


def test_too_few_documents_are_refused(store, tmp_path):
    write(tmp_path, {"a.txt": "line of text\n" * 99})
    one = make(tmp_path / "one", source=tmp_path / "a.txt", tokenizer="bytes")
    with pytest.raises(DataError) as refused:
        cluster(one, tmp_path / "out")
    assert str(refused.value) == (
        f"{tmp_path / 'one'}: 1 document in train cannot make 8 clusters; prepare it with --document-start, or from a "
        "source of more documents"
    )
    few = make(tmp_path / "few", source=write_domains(tmp_path / "in"), tokenizer="bytes", validation=0.02)
    with pytest.raises(DataError, match=r"2 documents in validation cannot make 8 clusters; .* or hold out more"):
        cluster(few, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cluster_without_validation_documents_is_named(tmp_path):
    texts = {f"{n:03}": " ".join(WORDS["sea" if n % 2 else "kitchen"]) for n in range(60)}
    texts |= {f"{n:03}": " ".join(WORDS["sea"]) for n in range(60, 70)}
    lopsided = make(tmp_path / "store", source=write(tmp_path / "in", texts), tokenizer="bytes", validation=1 / 7)
    with pytest.raises(DataError, match=r"store: cluster [01] gets no validation documents; ask for fewer clusters"):
        cluster(lopsided, tmp_path / "out", ClusterOptions(clusters=2, slack=2))


def test_nothing_is_overwritten(store, made, tmp_path):
    before = sorted(made.path.rglob("*"))
    with pytest.raises(DataError, match="exists and is not an empty folder"):
        cluster(store, made.path, OPTIONS)
    assert sorted(made.path.rglob("*")) == before
    with module.new_folder(tmp_path / "out"), pytest.raises(BusyError):
        cluster(store, tmp_path / "out", OPTIONS)


@pytest.mark.parametrize("name", [INDEX_NAME, MODEL_NAME])
def test_damage_is_noticed(made, tmp_path, name):
    shutil.copytree(made.path, tmp_path / "copy")
    path = tmp_path / "copy" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=f"{name}: damaged"):
        Clusters.open(tmp_path / "copy")
    path.unlink()
    with pytest.raises(DataError, match="no clusters here" if name == INDEX_NAME else f"{name}: damaged"):
        Clusters.open(tmp_path / "copy")


def test_an_index_that_is_none_is_refused(tmp_path):
    (tmp_path / INDEX_NAME).write_text(json.dumps([1]))
    with pytest.raises(DataError, match="damaged"):
        Clusters.open(tmp_path)
