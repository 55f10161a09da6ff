import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from myriad.config import ConfigError, MyriadError, RunError
from myriad.evaluate import batch_leak, check_causality, evaluate, future_leak, windows
from myriad.models import LMOutput, build
from tiny import DATA, tiny_model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build(tiny_model(vocab_size=257)).eval()
    model.embedding.weight.data *= 10  # far from uniform
    return model


@given(st.integers(2, 300), st.integers(1, 40), st.data())
def test_windows_count_every_target_once(tokens, context, data):
    stride = data.draw(st.integers(1, context))
    counted = []
    for window in windows(tokens, context, stride):
        assert 0 <= window.start < window.end < tokens
        assert window.end - window.start <= context
        targets = range(window.first_target, window.end + 1)
        counted.extend(targets)
        seen = window.first_target - window.start
        assert seen >= min(window.first_target, context - stride + 1, context)
    assert counted == list(range(1, tokens))


def naive_loss(model, tokens: list[int], end_id: int) -> tuple[float, int]:
    """One target at a time, each with all the context that the model holds: stride 1."""
    total, count = 0.0, 0
    for at in range(1, len(tokens)):
        if tokens[at] == end_id:
            continue
        seen = torch.tensor([tokens[max(0, at - model.config.context) : at]])
        with torch.no_grad():
            total -= model(seen).logits[0, -1].log_softmax(-1)[tokens[at]].item()
        count += 1
    return total / count, count


def test_perplexity_agrees_with_one_target_at_a_time(model, store):
    split = store.split("validation")
    tokens = split.tokens[:200].tolist()
    expected, count = naive_loss(model, tokens, 256)
    found = evaluate(model, [split], end_id=256, stride=1, limit=199)
    assert found.tokens == count
    assert found.loss == pytest.approx(expected, rel=1e-4)


def test_perplexity_agrees_with_an_independent_computation_from_logits(model, store):
    """Disjoint windows, as a few lines would do it; and transformers' own loss on the same windows."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    split = store.split("validation")
    tokens = torch.from_numpy(split.tokens[:].astype(np.int64))
    context, losses, theirs, count = 32, 0.0, 0.0, 0
    starts = list(range(0, len(tokens) - 1, context))
    starts[-1] = max(0, len(tokens) - 1 - context)  # the last window ends with the text
    done = 1
    for start in starts:
        window = tokens[start : start + context + 1]
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        labels = window[1:].clone()
        labels[: done - start - 1] = -100
        losses += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += (labels != -100).sum().item()
        shifted = torch.cat((torch.tensor([-100]), labels))  # transformers shifts by itself
        padded = torch.cat((logits, logits[-1:]))
        mean = ForCausalLMLoss(padded[None], shifted[None], vocab_size=257)
        theirs += mean.item() * (labels != -100).sum().item()
        done = start + context + 1
    found = evaluate(model, [split], end_id=256, stride=context)
    assert found.tokens == count == split.bytes
    assert found.token_perplexity == pytest.approx(math.exp(losses / count), rel=1e-4)
    assert found.token_perplexity == pytest.approx(math.exp(theirs / count), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(losses / math.log(2) / split.bytes, rel=1e-4)
    assert found.word_perplexity == pytest.approx(math.exp(losses / split.words), rel=1e-3)


def test_unshifted_targets_would_be_noticed(model, store):
    """The error of a published implementation: predicting the token that is in the input."""
    tokens = torch.from_numpy(store.split("validation").tokens[:33].astype(np.int64))
    with torch.no_grad():
        logits = model(tokens[None, :-1]).logits[0]
    unshifted = F.cross_entropy(logits, tokens[:-1]).item()
    shifted = F.cross_entropy(logits, tokens[1:]).item()
    found = evaluate(model, [store.split("validation")], end_id=256, stride=32, limit=32).loss
    assert found == pytest.approx(shifted, rel=1e-4)
    assert abs(found - unshifted) > 0.1


def test_more_context_is_never_fewer_targets(model, store):
    counts = {
        evaluate(model, [store.split("validation")], end_id=256, context=context, stride=stride).tokens
        for context, stride in [(32, 32), (32, 16), (16, 5), (8, 8)]
    }
    assert counts == {store.split("validation").bytes}


@pytest.mark.parametrize(("context", "stride"), [(33, None), (0, None), (16, 17), (16, 0)])
def test_impossible_windows_are_refused(model, store, context, stride):
    if context == 0 or stride == 0:
        context, stride = (context or -1), (-1 if stride == 0 else stride)
    with pytest.raises(ConfigError):
        evaluate(model, [store.split("validation")], end_id=256, context=context, stride=stride)


class Leaky(torch.nn.Module):
    """A model that sees the future or its neighbours, on purpose."""

    def __init__(self, inner, dim: int) -> None:
        super().__init__()
        self.inner, self.dim, self.config = inner, dim, inner.config

    def forward(self, ids, **options) -> LMOutput:
        output = self.inner(ids, **options)
        return output._replace(logits=output.logits + 0.1 * output.logits.mean(dim=self.dim, keepdim=True))


def test_planted_leaks_are_caught(model):
    ids = torch.randint(257, (3, 20))
    assert future_leak(model, ids, 10) < 1e-5
    assert future_leak(Leaky(model, 1), ids, 10) > 1e-3
    assert batch_leak(model, ids) < 1e-5
    assert batch_leak(Leaky(model, 0), ids) > 1e-3
    check_causality(model, ids)
    with pytest.raises(RunError, match="sees the future"):
        check_causality(Leaky(model, 1), ids)
    with pytest.raises(RunError, match="mixes the sequences"):
        check_causality(Leaky(model, 0), ids)


def test_broken_weights_are_called_broken(model):
    broken = copy.deepcopy(model)
    broken.embedding.weight.data[3] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        check_causality(broken, torch.randint(257, (3, 20)))


def test_training_mode_is_left_as_it_was(model, store):
    model.train()
    evaluate(model, [store.split("validation")], end_id=256, limit=64)
    assert model.training
    model.eval()


@pytest.mark.skipif(not (DATA / "wiki.valid.tokens.xz").exists(), reason="WikiText's validation text is not here")
def test_words_and_bytes_of_wikitext(tmp_path):
    import lzma

    from myriad.data.prepare import Recipe, prepare

    text = lzma.decompress((DATA / "wiki.valid.tokens.xz").read_bytes()).decode()
    (tmp_path / "wiki.txt").write_text(text, encoding="utf-8")
    store = prepare(Recipe(source=tmp_path / "wiki.txt", tokenizer="bytes"), tmp_path / "store")
    splits = store.index.splits.values()
    assert sum(split.words for split in splits) == len(text.split())
    assert sum(split.bytes for split in splits) == len(text.encode())
    with pytest.raises(MyriadError, match="no split"):
        store.split("test")
