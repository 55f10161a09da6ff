"""A corpus of different domains as JSON lines, for mixtures whose experts divide a corpus among themselves.

    python benchmarks/domains.py --enwik8 enwik8 --wikitext wiki.train.tokens --megabytes 6 --out domains

OUT/train.jsonl, validation.jsonl and test.jsonl: each line is a document, {"text": ..., "domain": ...}, of one of three
domains: `code` (Python's own sources), `markup` (enwik8 pages, as they stand in the dump) and `prose` (WikiText-2
articles). Those of a domain are the first ones of a shuffled order, of which some are held out; the domains follow each
other document by document.
"""

import argparse
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from myriad.data.sources import open_source

MEGABYTE = 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--enwik8", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path, required=True, help="wiki.train.tokens of WikiText-2")
    parser.add_argument("--megabytes", type=float, default=6, help="of each domain, at most")
    parser.add_argument("--held-out", type=float, default=0.15, help="megabytes of each domain, for either split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    options = parser.parse_args()
    sizes = {"test": options.held_out, "validation": options.held_out, "train": options.megabytes}
    found: dict[str, dict[str, list[str]]] = {split: {} for split in sizes}
    for name, texts in {"code": code(), "markup": pages(options.enwik8), "prose": articles(options.wikitext)}.items():
        random.Random(options.seed).shuffle(texts)
        rest = iter(texts)
        for split, megabytes in sizes.items():
            chosen = found[split][name] = list(up_to(rest, megabytes * MEGABYTE))
            print(f"{split}: {name}: {len(chosen)} documents, {sum(map(len, chosen)) / MEGABYTE:.2f} M characters")
    options.out.mkdir(parents=True)
    for split, domains in found.items():
        with (options.out / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for together in itertools.zip_longest(*domains.values()):
                for name, text in zip(domains, together, strict=True):
                    if text is not None:
                        file.write(json.dumps({"text": text, "domain": name}) + "\n")


def code() -> list[str]:
    """The standard library's modules."""
    return [document.text for document in open_source("python").documents()]


def pages(dump: Path) -> list[str]:
    """The pages of a dump, redirections left out."""
    text = dump.read_text(encoding="utf-8", errors="replace")
    return [page for page in re.findall(r"<page>.*?</page>\n", text, re.DOTALL) if "#REDIRECT" not in page.upper()]


def articles(tokens: Path) -> list[str]:
    """WikiText's articles, each from its heading on."""
    return re.split(r"(?m)^(?= = [^=].* = $)", tokens.read_text(encoding="utf-8"))[1:]


def up_to(texts: Iterator[str], size: float) -> Iterator[str]:
    """The next texts until they have so many characters; the one that does not fit is dropped."""
    while size > 0 and (text := next(texts, None)) is not None:
        if len(text) <= size:
            yield text
        size -= len(text)


if __name__ == "__main__":
    main()
