"""Text of clearly different domains."""

import random
from pathlib import Path

from made import as_jsonl, write

WORDS = {
    "sea": ["ship", "sail", "harbour", "tide", "anchor", "captain", "wave", "island"],
    "kitchen": ["flour", "butter", "oven", "sugar", "spoon", "recipe", "onion", "bread"],
    "code": ["return", "lambda", "import", "assert", "yield", "class", "async", "tuple"],
}


def sentences(domain: str, seed: int, words: int = 40) -> str:
    """A text of one domain's words and some of everyone's."""
    chosen = random.Random(f"{domain} {seed}")
    return " ".join(chosen.choice(WORDS[domain] * 3 + ["the", "and", "of"]) for _ in range(words)) + "\n"


def write_domains(folder: Path, documents: int = 30) -> Path:
    """A file for each document, those of all domains by turns: `007-sea.txt`."""
    names = [f"{n:03}-{list(WORDS)[n % len(WORDS)]}.txt" for n in range(documents * len(WORDS))]
    return write(folder, {name: sentences(name[4:-4], int(name[:3])) for name in names})


def rows_of_domains(documents: int = 30) -> str:
    """JSONL whose field `topic` names the domain."""
    rows = [(list(WORDS)[n % len(WORDS)], n) for n in range(documents * len(WORDS))]
    return as_jsonl(*({"text": sentences(topic, n), "topic": topic} for topic, n in rows))
