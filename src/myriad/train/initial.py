"""The weights that a run starts from: random ones, or those of a model that was trained before."""

from pathlib import Path

from myriad import checkpoint
from myriad.config import ConfigError, first_difference
from myriad.data.tokenizer import FILE_NAME
from myriad.models import LanguageModel, Transformer, TransformerConfig, TransformerExpertsConfig, from_seed
from myriad.train.run import RunConfig


def initial_model(run: RunConfig, tokenizer: Path) -> LanguageModel:
    """The model of a run before its first step.

    The weights of `run.init` are taken where its model has the shape of the run's; a transformer grows into a mixture
    whose experts choose.

    Args:
        run: the settings; the vocabulary is known.
        tokenizer: the `tokenizer.json` of the run's data.

    Raises:
        MyriadError: `run.init` is missing, damaged, or of another shape or tokenizer; the text names the difference.
    """
    if run.init is None:
        return run.model.build()
    folder = checkpoint.intact_folder(Path(run.init))
    found = checkpoint.read_config(folder)
    _refuse_other_tokenizer(run.init, folder / FILE_NAME, tokenizer)
    if isinstance(found, TransformerConfig) and isinstance(run.model, TransformerExpertsConfig):
        grown_from = Transformer(found)
        checkpoint.load_weights(grown_from, folder)
        try:
            model = from_seed(run.model, grown_from)
        except ConfigError as error:
            raise ConfigError(f"init: {run.init}: {error}") from None
    else:
        mine, theirs = run.model.shape(), found.shape()
        if mine != theirs:
            raise ConfigError(f"init: {run.init}: model.{first_difference(theirs, mine)}")
        model = run.model.build()
        checkpoint.load_weights(model, folder)
    checkpoint.refuse_broken_weights(model, run.init)
    return model


def _refuse_other_tokenizer(init: str, theirs: Path, mine: Path) -> None:
    """Weights know tokens by number: a folder that names no tokenizer is taken at its word."""
    if theirs.exists() and mine.exists() and checkpoint.hash_file(theirs) != checkpoint.hash_file(mine):
        raise ConfigError(f"init: {init}: was trained with another tokenizer than that of {mine.parent}")
