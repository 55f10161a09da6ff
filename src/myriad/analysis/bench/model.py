"""Whole models: tokens per second of training and of generation.

PEER-pytorch's figures are of the same model with the same weights in which its layers stand in the place of ours,
trained with `torch.optim.Adam`. Where the memory does not hold both models they are measured one after the other
instead of in turns.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from myriad import kernels
from myriad.analysis.bench import bounds, peer_pytorch
from myriad.analysis.bench.bounds import Batch
from myriad.analysis.bench.case import precisions
from myriad.analysis.bench.memory import lack
from myriad.analysis.bench.peer_pytorch import with_their_layers
from myriad.analysis.bench.report import BASE, OURS, THEIRS, Contender, Difference, Measurement, Rates, absent, compared
from myriad.analysis.bench.settings import BenchConfig, ModelShape
from myriad.analysis.bench.timing import interleaved
from myriad.ffn.peer import PEER
from myriad.kernels.table_gradient import lone_gradients
from myriad.models import KVCache, LanguageModel
from myriad.train.optim import build_optimizer, clip_gradients
from myriad.train.precision import autocast

LEARNING_RATE = 1e-4
CLIP = 1.0
HELD = 4
"""Times the weights that training holds: weights, gradients and two moments."""


class ModelBench:
    """One model shape, and what is known of it so far."""

    def __init__(self, shape: ModelShape, settings: BenchConfig, rates: Rates, device: torch.device) -> None:
        self.shape, self.settings, self.rates, self.device = shape, settings, rates, device
        torch.manual_seed(settings.seed)
        size = (shape.sequences, shape.length + 1)
        window = torch.randint(shape.model.vocabulary, size, device=device)
        self.ids, self.targets = window[:, :-1], window[:, 1:]
        self.training: dict[Contender, list[float]] = {}
        self.generation: dict[Contender, list[float]] = {}
        self.losses: dict[Contender, float] = {}
        self.expected_loss = 0.0
        self.least_training: dict[str, float] = {}

    def measure(self, whose: list[str]) -> None:
        """Time those that fit into memory together; they take turns."""
        models = {who: self._build(who) for who in whose}
        if OURS in models:
            self._note_reference(models[OURS])
        if self.shape.decode:
            self._time_generation(models)
        self._time_training(models)

    def _build(self, who: str) -> LanguageModel:
        torch.manual_seed(self.settings.seed)
        with self.device:
            model = self.shape.model.build()
        return with_their_layers(model) if who == THEIRS else model

    @torch.no_grad()
    def _note_reference(self, model: LanguageModel) -> None:
        """The reference's loss, and the least time of a step, from the experts that it uses."""
        with kernels.use("reference"):
            self.expected_loss = self._loss(model, Contender(OURS, "float32"))
            routings = model(self.ids, with_routing=True).routing
        layers = [module.config for module in model.modules() if isinstance(module, PEER)]
        batches = [Batch(self.shape.tokens, len(one.ids.unique())) for block in routings for one in block]
        config = self.shape.model
        phases = bounds.model_step_phases(self.shape.tokens, config.cost().flops, layers, config.d_model, batches)
        self.least_training = {name: bounds.seconds(phases, self.rates, name) for name in precisions(self.device)}

    @torch.no_grad()
    def _loss(self, model: LanguageModel, contender: Contender) -> float:
        """The mean over targets, in nats."""
        with autocast(contender.precision, self.device):
            loss = model(self.ids, targets=self.targets).loss
        assert loss is not None
        return loss.item() / self.targets.numel()

    def _time_generation(self, models: dict[str, LanguageModel]) -> None:
        runs = {
            Contender(who, "float32"): partial(generate, model.eval(), self.ids[:1, :1], self.settings.generated)
            for who, model in models.items()
        }
        self.generation |= interleaved(runs, repeats=self.settings.repeats, warmup=1, device=self.device)

    def _time_training(self, models: dict[str, LanguageModel]) -> None:
        runs: dict[Contender, Callable[[], None]] = {}
        for who, model in models.items():
            optimizer = _optimizer(who, model.train())
            mine = [Contender(OURS, precision) for precision in precisions(self.device)]
            for contender in [BASE] if who == THEIRS else mine:
                self.losses[contender] = self._loss(model, contender)
                runs[contender] = partial(self._step, model, optimizer, contender)
        settings = self.settings
        self.training |= interleaved(runs, repeats=settings.repeats, warmup=settings.warmup, device=self.device)

    def _step(self, model: LanguageModel, optimizer: torch.optim.Optimizer, contender: Contender) -> None:
        with autocast(contender.precision, self.device), lone_gradients(self.device):
            output = model(self.ids, targets=self.targets)
        (output.loss / self.targets.numel() + output.aux_loss).backward()
        clip_gradients(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(output.loads)

    def results(self, in_turns: bool) -> Iterator[Measurement]:
        differences = {contender: self._difference(loss) for contender, loss in self.losses.items()}
        yield from compared(
            "model training",
            self.shape.name,
            self.training,
            "tokens/s",
            scale=self.shape.tokens,
            differences=differences,
            bounds=self.least_training,
            in_turns=in_turns,
        )
        # A token alone reads every parameter that takes part.
        generated = self.settings.generated
        least = {"float32": generated * self.shape.model.cost().bytes / self.rates.bytes}
        yield from compared(
            "model decode",
            self.shape.name,
            self.generation,
            "tokens/s",
            scale=generated,
            bounds=least,
            in_turns=in_turns,
        )

    def _difference(self, loss: float) -> Difference:
        apart = abs(loss - self.expected_loss)
        return Difference(largest=apart, relative=apart / self.expected_loss)


def measure_model(
    shape: ModelShape, settings: BenchConfig, rates: Rates, device: torch.device, say: Callable[[str], None]
) -> Iterator[Measurement]:
    """Training, and generation if the shape asks for it."""
    say(f"model {shape.name}")
    mine, theirs = needed_bytes(shape, OURS), needed_bytes(shape, THEIRS)
    if why := lack(mine, device):
        yield absent("model training", shape.name, "tokens/s", OURS, why)
        return
    why = peer_pytorch.missing() or lack(theirs, device)
    if why is not None:
        yield absent("model training", shape.name, "tokens/s", THEIRS, why)
    groups = [[OURS]] if why is not None else [[THEIRS, OURS]]
    if why is None and lack(mine + theirs, device):
        groups = [[THEIRS], [OURS]]
    bench = ModelBench(shape, settings, rates, device)
    for whose in groups:
        bench.measure(whose)
    yield from bench.results(in_turns=len(groups) == 1)


def needed_bytes(shape: ModelShape, who: str) -> int:
    """What training holds: weights and what belongs to them, and for PEER-pytorch's layers the rows of all tokens,
    of both tables and as products, which its backward pass needs."""
    weights = 4 * shape.model.cost().parameters
    logits = 2 * 4 * shape.tokens * shape.model.vocabulary
    if who == OURS:
        return HELD * weights + logits
    gathered = sum(2 * layer.heads * layer.experts_per_head for layer in shape.peer_layers())
    return HELD * weights + logits + 4 * shape.tokens * gathered * shape.model.d_model


@torch.no_grad()
def generate(model: LanguageModel, prompt_BS: Tensor, tokens: int) -> Tensor:
    """The prompt continued by the most likely tokens, one at a time."""
    cache = KVCache()
    ids = last = prompt_BS
    for _ in range(tokens):
        logits = model(last, cache=cache).logits
        assert logits is not None
        last = logits[:, -1:].argmax(dim=-1)
        ids = torch.cat((ids, last), dim=1)
    return ids


def _optimizer(who: str, model: LanguageModel) -> torch.optim.Optimizer:
    if who == THEIRS:
        return torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    return build_optimizer(model, lr=LEARNING_RATE)
