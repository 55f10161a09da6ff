"""Preparing: text in, a store out.

The source is read once (a BPE that is trained on it reads the beginning before that). Its documents are encoded in
order on all cores, written as they come, and the last ones moved to the splits that hold them out when their number
is known: memory stays bounded whatever the size of the text.

A store is whole or not there (`place`).
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from myriad.data import DataError
from myriad.data.corpus import BPE_TRAINING_BYTES, Corpus, TextHash, text_hash
from myriad.data.parts import Part, count_words, in_parts
from myriad.data.place import new_folder
from myriad.data.recipe import Recipe
from myriad.data.sources import SPLITS
from myriad.data.splits import Bound, bounds_of_shares, documents_of_shares
from myriad.data.store import (
    FileIndex,
    Index,
    SplitIndex,
    Store,
    hash_files,
    hash_of_hashes,
)
from myriad.data.tokenizer import FILE_NAME, Tokenizer, resolve_tokenizer
from myriad.data.writer import Encoded, SplitWriter

SHARD_TOKENS = 2**27
BATCH = 2**19
"""Characters encoded at a time by one thread."""

Progress = Callable[[str, int, int | None], None]
"""Called with a stage ("training the tokenizer", "encoding"), its bytes of text done, and those to do, if known."""


def prepare(
    recipe: Recipe, out: str | Path, progress: Progress | None = None, *, shard_tokens: int = SHARD_TOKENS
) -> Store:
    """Make a store from text.

    Args:
        recipe: the source, the tokenizer and the splits. A BPE is trained on the first 50 MB of the train split.
        out: the store's folder; it must not exist, or be empty.
        progress: told now and then how far the work is.
        shard_tokens: tokens per file.

    Raises:
        BusyError: another process is preparing it.
        DataError: `out` is taken or cannot be written, or the source or the tokenizer is at fault.
    """
    out = Path(os.path.abspath(out))
    report = progress or (lambda stage, done, total: None)
    corpus = Corpus(recipe)
    with new_folder(out) as folder:
        fingerprint = corpus.fingerprint()
        tokenizer = resolve_tokenizer(recipe.tokenizer, _training_texts(corpus, report))
        fill(folder, corpus, tokenizer, fingerprint, shard_tokens, report)
    return Store.open(out)


def has_changed(store: Store, recipe: Recipe) -> bool:
    """Whether a recipe's sources hold other text than when a store was made of it; they are read only if need be."""
    if Corpus(recipe).fingerprint() == store.index.fingerprint:
        return False
    return text_hash(recipe) != store.index.source_sha256


def fill(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, fingerprint: str, shard_tokens: int, report: Progress
) -> None:
    """Write all files of a store into an empty folder.

    Args:
        fingerprint: the corpus' before any of it was read.

    Raises:
        DataError: the corpus cannot be used, or has changed.
    """
    tokenizer.save(folder / FILE_NAME)
    splits, source_sha256 = _Filling(folder, corpus, tokenizer, shard_tokens, report).run()
    if corpus.fingerprint() != fingerprint:
        raise DataError(f"{corpus.source.name}: changed while it was read; prepare it again")
    Index(
        recipe=corpus.recipe,
        fingerprint=fingerprint,
        source_sha256=source_sha256,
        dtype="uint16" if tokenizer.dtype.itemsize == 2 else "uint32",
        vocab_size=tokenizer.vocab_size,
        end_id=tokenizer.end_id,
        tokenizer_sha256=tokenizer.sha256,
        splits=splits,
    ).write(folder)


def _training_texts(corpus: Corpus, report: Progress) -> Iterator[str]:
    size, done = corpus.size(), 0
    total = None if size is None else min(size, BPE_TRAINING_BYTES)
    for text in corpus.training_texts():
        yield text
        done += len(text.encode())
        report("training the tokenizer", done, total)
    report("training the tokenizer", done, done)  # held-out text is none of it


class _Filling:
    """Fills a folder with a corpus' tokens."""

    def __init__(self, folder: Path, corpus: Corpus, tokenizer: Tokenizer, shard_tokens: int, report: Progress):
        self._folder = folder
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._report = report

    def run(self) -> tuple[dict[str, SplitIndex], str]:
        """Write all splits.

        Returns:
            what each split holds, and the hash of the text.
        """
        with ExitStack() as files:
            splits, digest = self._write(self._corpus.bounds(), files)
            self._refuse_empty(splits)
            for split in splits.values():
                split.finish()
        return {name: index_of(split) for name, split in splits.items() if split.tokens}, digest.hexdigest()

    def _write(self, bounds: list[Bound] | None, files: ExitStack) -> tuple[dict[str, SplitWriter], TextHash]:
        """Encode everything and hold out what is to be held out."""
        splits, digest = self._encode(bounds, files)
        train, shares = splits["train"], self._corpus.shares(splits["validation"].tokens > 0)
        if bounds is not None or not shares:
            return splits, digest
        if train.documents == 1:  # its bytes, known only now, are divided instead
            self._discard(splits)
            return self._encode(bounds_of_shares(train.bytes, shares), files)
        self._hold_out(splits, shares)
        return splits, digest

    def _encode(self, bounds: list[Bound] | None, files: ExitStack) -> tuple[dict[str, SplitWriter], TextHash]:
        """Read, encode and write everything once."""
        digest, done, total = TextHash(), 0, self._corpus.size()
        splits = {name: SplitWriter(self._folder, name, self._tokenizer.dtype, self._shard_tokens) for name in SPLITS}
        for split in splits.values():
            files.callback(split.close)
        for batch in encode_all(in_parts(self._corpus.documents(bounds, digest)), self._tokenizer):
            splits[batch.split].add(batch)
            done += int(batch.counts[:, 1].sum())
            self._report("encoding", done, total and max(done, total))
        self._report("encoding", done, done)
        if not any(split.words for split in splits.values()):
            raise DataError(f"{self._corpus.source.name}: holds no text")
        return splits, digest

    def _discard(self, splits: dict[str, SplitWriter]) -> None:
        for split in splits.values():
            split.close()
        for path in self._folder.iterdir():
            if path.name != FILE_NAME:
                path.unlink()

    def _hold_out(self, splits: dict[str, SplitWriter], shares: dict[str, float]) -> None:
        train = splits["train"]
        held_out = documents_of_shares(train.documents, shares)
        if sum(held_out.values()) >= train.documents:
            raise DataError(
                f"{self._corpus.source.name}: {train.documents} documents are too few to hold out {len(shares)} splits"
            )
        for name, documents in reversed(held_out.items()):
            train.move_tail(documents, splits[name])

    def _refuse_empty(self, splits: dict[str, SplitWriter]) -> None:
        recipe = self._corpus.recipe
        if recipe.split_bytes:
            asked = set(SPLITS[: len(recipe.split_bytes)])
        else:
            asked = {"train", *self._corpus.shares(has_validation=splits["validation"].words > 0)}
        asked |= {name for name in SPLITS[1:] if getattr(recipe, name) is not None}
        for name in SPLITS:
            if name in asked and not splits[name].words:
                raise DataError(f"{self._corpus.source.name}: too little text for a {name} split")


def encode_all(parts: Iterable[Part], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Encode on all cores, a bounded number of batches ahead; the parts of each split stay in order."""
    tokenizer.encoder  # noqa: B018 (made once, before threads ask for it)
    threads = os.cpu_count() or 1
    waiting: deque[Future[Encoded]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for batch in _batches(parts):
            waiting.append(pool.submit(_encode, tokenizer, batch))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts of one split, about BATCH characters together."""
    batches: dict[str, list[Part]] = {name: [] for name in SPLITS}
    characters: Counter[str] = Counter()
    for part in parts:
        batches[part.split].append(part)
        characters[part.split] += len(part.text)
        if characters[part.split] >= BATCH:
            yield batches[part.split]
            batches[part.split], characters[part.split] = [], 0
    yield from filter(None, batches.values())


def _encode(tokenizer: Tokenizer, parts: list[Part]) -> Encoded:
    texts = [part.text for part in parts]
    ids, counts = tokenizer.encoder.encode(texts)
    begins = np.array([not part.continues for part in parts])
    starts = (np.cumsum(counts) - counts)[begins]
    words = count_words(texts) - np.array([part.within_word for part in parts])
    sizes = [len(text.encode()) for text in texts]
    return Encoded(
        split=parts[0].split,
        ids=np.insert(ids, starts, tokenizer.end_id),
        starts=starts + np.arange(len(starts)),
        documents=np.cumsum(begins),
        counts=np.stack([words, np.array(sizes)], 1),
    )


def index_of(split: SplitWriter) -> SplitIndex:
    """What a finished split holds, its files hashed."""
    files = [*split.shards, split.offsets]
    *shards, offsets = (
        FileIndex(name=path.name, size=path.stat().st_size, sha256=sha256)
        for path, sha256 in zip(files, hash_files(files), strict=True)
    )
    return SplitIndex(
        tokens=split.tokens,
        documents=split.documents,
        words=split.words,
        bytes=split.bytes,
        shards=shards,
        offsets=offsets,
        sha256=hash_of_hashes(shard.sha256 for shard in shards),
    )
