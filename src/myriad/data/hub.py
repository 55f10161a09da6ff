"""The Hugging Face hub: what reading from it has in common."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from myriad.data import DataError


@contextmanager
def reading_from_hub(what: str, advice: str) -> Iterator[None]:
    """Turn whatever goes wrong with the hub or the network into one line, and leave out the attempts before it.

    Args:
        what: begins the line.
        advice: ends it.

    Raises:
        DataError: something went wrong.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # the libraries have no common one
        reason = (str(error).strip() or "no reason given").splitlines()[0][:300]
        raise DataError(f"{what} ({type(error).__name__}: {reason}); {advice}") from None
    finally:
        logger.setLevel(level)
