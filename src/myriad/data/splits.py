"""Splits: text cut at byte positions, into splits or into what is held out of a single document."""

from collections.abc import Callable, Generator, Iterable, Sequence

from myriad.data.sources.base import Document

Bound = tuple[str, int]
"""A split and the byte, counted over the whole text, at which it ends."""
NEVER = 2**63
"""The end of a split that takes all that is left."""
Place = Callable[[bytes, int], int]
"""Where to cut a text, given the byte at or before which it should be."""


def at_character(text: bytes, at: int) -> int:
    """The last start of a character up to byte `at`."""
    while 0 < at < len(text) and text[at] & 0xC0 == 0x80:
        at -= 1
    return at


def at_line(text: bytes, at: int) -> int:
    """The last start of a line up to byte `at`; without one, of a word, or else of a character."""
    return text.rfind(b"\n", 0, at) + 1 or text.rfind(b" ", 0, at) + 1 or at_character(text, at)


def cut_at_bytes(
    documents: Iterable[Document], bounds: Sequence[Bound], place: Place
) -> Generator[Document, None, int]:
    """The training documents laid end to end and cut into splits; nothing is read after the last bound.

    A document that lies across a bound is cut there, and what follows begins a document of its split. Documents
    of other splits pass as they are.

    Returns:
        how many bytes were missing to reach the last bound.
    """
    position, left, begins = 0, list(bounds), True
    for document in documents:
        if document.split != "train":
            yield document
            continue
        text, continues = document.text.encode(), document.continues
        while text:
            split, end = left[0]
            at = len(text) if position + len(text) <= end else place(text, end - position)
            if at:
                yield document._replace(text=text[:at].decode(), split=split, continues=continues and not begins)
                continues, begins = True, False
            text, position = text[at:], position + at
            if text or position == end:
                del left[0]
                begins = True
                if not left:
                    return 0
    return left[-1][1] - position


def bounds_of_lengths(lengths: Iterable[int], names: Iterable[str]) -> list[Bound]:
    """The bounds of splits of given lengths in bytes."""
    bounds, end = [], 0
    for length, name in zip(lengths, names, strict=False):
        end += length
        bounds.append((name, end))
    return bounds


def bounds_of_shares(size: int, shares: dict[str, float]) -> list[Bound]:
    """The bounds that hold out the last shares of `size` bytes, by split in their order."""
    left = 1.0 - sum(shares.values())
    bounds = [("train", int(size * left))]
    for name, share in shares.items():
        left += share
        bounds.append((name, int(size * left)))
    return [*bounds[:-1], (bounds[-1][0], NEVER)]


def documents_of_shares(count: int, shares: dict[str, float]) -> dict[str, int]:
    """How many of `count` documents each share holds out: at least one."""
    return {name: max(1, round(count * share)) for name, share in shares.items()}
