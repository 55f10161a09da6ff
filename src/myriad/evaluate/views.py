"""As what a model is evaluated: by its causal rule, which is the honest figure, or as training sees it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from myriad.config import ConfigError
from myriad.ffn import FFN
from myriad.models import LanguageModel

View = Callable[[LanguageModel], AbstractContextManager[None]]


@contextmanager
def causal_view(model: LanguageModel) -> Iterator[None]:
    """The whole model in eval mode, for the while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def training_view(model: LanguageModel) -> Iterator[None]:
    """In eval mode, but what chooses experts by a look at later tokens in training does so here, too.

    What is measured so is not causal: no measure of quality.

    Raises:
        ConfigError: nothing in the model does.
    """
    modules = [module for module in model.modules() if isinstance(module, FFN | LanguageModel)]
    looking_ahead = [module for module in modules if not module.causal_in_training()]
    if not looking_ahead:
        raise ConfigError("training view: the model chooses experts causally in training, too: it has one view alone")
    with causal_view(model):
        for module in looking_ahead:
            module.training = True  # itself alone: what it holds would drop values
        yield
