import json

import numpy as np
import pytest
from domains import WORDS, rows_of_domains, sentences
from made import documents_of, make, write

from myriad.data import DataError
from myriad.data.clusters import ClusterOptions
from myriad.data.features import count_documents
from myriad.data.labels import FieldLabels, FileLabels, cluster_source
from myriad.data.recipe import Recipe


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text(rows_of_domains())
    return tmp_path / "rows.jsonl"


def folders(path, documents=12):
    return write(
        path,
        {f"{name}/{n}.txt": sentences(name, n) for name in WORDS for n in range(documents)}
        | {"alone.md": "x y\n" * 40},
    )


def names(found):
    return [entry.name for entry in found.index.clusters]


def test_a_field_decides(rows, tmp_path):
    found = cluster_source(Recipe(source=rows), tmp_path / "out", FieldLabels("topic"))
    assert names(found) == sorted(WORDS)
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    for name, store in zip(sorted(WORDS), found.stores(), strict=True):
        parts = documents_of(store)
        assert parts["train"] + parts["validation"] == [row["text"] for row in written if row["topic"] == name]
        assert len(parts["validation"]) == 2  # 5 % of each cluster by itself
        assert store.index.recipe.source == str(rows)


def test_files_and_top_level_folders_decide(tmp_path):
    found = cluster_source(Recipe(source=folders(tmp_path / "in")), tmp_path / "out", FileLabels())
    assert names(found) == ["alone.md", "code", "kitchen", "sea"]
    parts = [documents_of(store) for store in found.stores()]
    assert parts[1]["train"] == [sentences("code", n) for n in sorted(range(12), key=str)][:-1]
    assert "".join(parts[0]["train"] + parts[0]["validation"]) == "x y\n" * 40  # a document alone is cut


def test_folders_of_splits_are_no_clusters(tmp_path):
    texts = {f"{split}/{name}/1.txt": sentences(name, len(split)) for name in WORDS for split in ("train", "valid")}
    found = cluster_source(Recipe(source=write(tmp_path / "in", texts)), tmp_path / "out", FileLabels())
    assert names(found) == sorted(WORDS)
    for name, store in zip(sorted(WORDS), found.stores(), strict=True):
        assert documents_of(store) == {"train": [sentences(name, 5)], "validation": [sentences(name, 5)]}


def test_files_of_rows_decide(tmp_path):
    rows = {
        f"{name}.jsonl": "".join(json.dumps({"body": sentences(name, n)}) + "\n" for n in range(9)) for name in WORDS
    }
    recipe = Recipe(source=write(tmp_path / "in", rows), field="body")
    found = cluster_source(recipe, tmp_path / "out", FileLabels())
    assert names(found) == [f"{name}.jsonl" for name in sorted(WORDS)]
    assert [documents_of(store)["train"][0] for store in found.stores()] == [sentences(n, 0) for n in sorted(WORDS)]


def test_all_clusters_have_one_tokenizer_of_all_their_text(rows, tmp_path):
    found = cluster_source(Recipe(source=rows, tokenizer="bpe:380"), tmp_path / "out", FieldLabels("topic"))
    stores = list(found.stores())
    assert len({store.tokenizer.sha256 for store in stores}) == 1
    assert {store.index.recipe.tokenizer for store in stores} == {"bpe:380"}
    for words in WORDS.values():
        assert len(stores[0].tokenizer.encode(f" {words[0]}")) < len(words[0]) / 2 + 1
    again = cluster_source(Recipe(source=rows, tokenizer="bpe:380"), tmp_path / "again", FieldLabels("topic"))
    assert again.index == found.index


def test_the_model_assigns_text_to_the_clusters_that_were_given(rows, tmp_path):
    options = ClusterOptions(features=20)
    found = cluster_source(Recipe(source=rows), tmp_path / "out", FieldLabels("topic"), options)
    assert found.model.centers_CR.shape == (3, 20)
    for number, store in enumerate(found.stores()):
        (counts,) = count_documents(store.split("validation"), store.index.vocab_size)
        assert np.all(found.model.distances(found.model.features.of(counts)).argmin(1) == number)


def test_other_sources_and_document_starts_are_divided_too(tmp_path, rows):
    (tmp_path / "valid.jsonl").write_text(rows_of_domains(2))
    recipe = Recipe(source=rows, validation=tmp_path / "valid.jsonl", document_start="^.")
    found = cluster_source(recipe, tmp_path / "out", FieldLabels("topic"))
    assert [documents_of(store)["validation"] for store in found.stores()] == [
        [sentences(name, n) for n in range(6) if list(WORDS)[n % 3] == name] for name in sorted(WORDS)
    ]


def test_faults_are_named(tmp_path, rows):
    text = write(tmp_path, {"a.txt": "text\n" * 50}) / "a.txt"
    one = write(tmp_path / "one", {"sea/1": "a b\n" * 50, "sea/2": "c d\n" * 50})
    (tmp_path / "valid.jsonl").write_text(rows_of_domains(2).replace('"sea"', '"code"'))
    faults = [
        (text, FieldLabels("topic"), {}, "a.txt: --by field needs rows"),
        (text, FileLabels(), {}, "a.txt: --by file divides a folder, and this is none"),
        (one, FileLabels(), {}, r"one: all documents belong to one cluster \(sea\)"),
        (rows, FieldLabels("topics"), {}, "has no field 'topics'; did you mean 'topic'"),
        (rows, FieldLabels("topic"), {"validation": tmp_path / "valid.jsonl"}, "sea: too little text for a validation"),
    ]
    for source, labels, options, message in faults:
        with pytest.raises(DataError, match=message):
            cluster_source(Recipe(source=source, **options), tmp_path / "out", labels)
        assert not (tmp_path / "out").exists()


def test_a_field_of_many_values_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("myriad.data.labels.MOST", 4)
    rows = "".join(json.dumps({"text": "some words", "url": f"page {n}"}) + "\n" for n in range(9))
    (tmp_path / "rows.jsonl").write_text(rows)
    with pytest.raises(DataError, match="more than 4 clusters"):
        cluster_source(Recipe(source=tmp_path / "rows.jsonl"), tmp_path / "out", FieldLabels("url"))


def test_a_store_that_was_clustered_by_file_equals_those_prepared_alone(tmp_path):
    source = folders(tmp_path / "in")
    found = cluster_source(Recipe(source=source), tmp_path / "out", FileLabels())
    alone = make(tmp_path / "alone", source=source / "sea", tokenizer="bytes")
    assert documents_of(list(found.stores())[3]) == documents_of(alone)
