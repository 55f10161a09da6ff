"""A corpus of different domains as JSON lines, for mixtures whose experts divide a corpus among themselves.

    python benchmarks/domains.py --enwik8 enwik8 --wikitext wiki.train.tokens --megabytes 6 --out domains.jsonl

Each line is a document, {"text": ..., "domain": ...}, of one of three domains: `code` (Python's own sources), `markup`
(enwik8 pages, as they stand in the dump) and `prose` (WikiText-2 articles). Those of a domain are the first ones of a
shuffled order; the domains follow each other document by document.
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    domains = {"code": code(), "markup": pages(options.enwik8), "prose": articles(options.wikitext)}
    chosen = {}
    for name, texts in domains.items():
        random.Random(options.seed).shuffle(texts)
        chosen[name] = list(up_to(texts, options.megabytes * MEGABYTE))
        print(f"{name}: {len(chosen[name])} documents, {sum(map(len, chosen[name])) / MEGABYTE:.1f} M characters")
    with options.out.open("w", encoding="utf-8") as file:
        for together in itertools.zip_longest(*chosen.values()):
            for name, text in zip(chosen, together, strict=True):
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


def up_to(texts: list[str], size: float) -> Iterator[str]:
    """The first texts until they have so many characters."""
    for text in texts:
        size -= len(text)
        if size < 0:
            return
        yield text


if __name__ == "__main__":
    main()
