"""Generation: transformers' on our model, and our own function over it."""

import warnings
from threading import Thread

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GenerationConfig, TextIteratorStreamer

import myriad
from myriad.config import ConfigError, MyriadError
from myriad.hf import ContextError, OpenModel, generate_text, open_model

CONTEXT, END = 48, 256
PROMPT = torch.randint(END, (1, 9), generator=torch.Generator().manual_seed(2))
LITERAL = "<|endoftext|>"


@pytest.fixture(scope="module")
def model(run):
    return AutoModelForCausalLM.from_pretrained(run)


@pytest.fixture(scope="module")
def opened(run) -> OpenModel:
    return open_model(run)


@pytest.fixture(scope="module")
def reference(run):
    """The same weights without transformers."""
    return myriad.load(run)


def greedy_by_hand(reference, ids: list[int], count: int) -> list[int]:
    """No cache, no transformers."""
    made = list(ids)
    for _ in range(count):
        with torch.no_grad():
            made.append(int(reference(torch.tensor([made])).logits[0, -1].argmax()))
    return made[len(ids) :]


# transformers' generate


def test_greedy_with_a_cache_without_one_and_by_hand_agree(model, reference):
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
    cached = model.generate(PROMPT, use_cache=True, **options)
    assert torch.equal(cached, model.generate(PROMPT, use_cache=False, **options))
    assert cached[0, 9:].tolist() == greedy_by_hand(reference, PROMPT[0].tolist(), 20)


def test_samples_with_a_cache_and_without_one_agree(model):
    def sample(use_cache: bool):
        torch.manual_seed(4)
        return model.generate(
            PROMPT,
            use_cache=use_cache,
            do_sample=True,
            top_k=0,
            max_new_tokens=20,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )

    cached, plain = sample(True), sample(False)
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-4)


def test_a_padded_batch_gives_what_each_prompt_gives_alone(model):
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": END}
    prompts = [PROMPT[0], PROMPT[0, :3], PROMPT[0, 2:7]]
    ids, mask = torch.full((3, 9), END), torch.zeros(3, 9, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = prompt, 1
    together = model.generate(ids, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], **options)
        assert torch.equal(together[row, 9:], alone[0, len(prompt) :])


def test_as_many_beams_as_tokens_search_all_pairs(model, reference):
    """Two tokens, all first tokens kept: the best pair over all 256 x 256."""
    made = model.generate(
        PROMPT, num_beams=257, do_sample=False, max_new_tokens=2, suppress_tokens=[END], length_penalty=0.0
    )
    first = torch.arange(256)[:, None]
    with torch.no_grad():
        logits = reference(torch.cat((PROMPT.expand(256, -1), first), dim=1)).logits.log_softmax(-1)
    total = logits[:, -2].gather(1, first) + logits[:, -1, :256]
    assert made[0, 9:].tolist() == [int(total.argmax()) // 256, int(total.argmax()) % 256]


def test_beams_with_a_cache_and_without_one_agree(model):
    ids = torch.cat((PROMPT, PROMPT.flip(1)))
    options = {"attention_mask": torch.ones_like(ids), "num_beams": 3, "do_sample": False, "max_new_tokens": 10}
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


def test_a_text_iterator_streams_what_is_generated(opened):
    model, tokenizer = opened
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=model.generate, args=(PROMPT,), kwargs=options | {"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(model.generate(PROMPT, **options)[0, 9:])


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 100},
        {"max_length": 100},
        {"max_new_tokens": 100, "num_beams": 2},
        {"generation_config": GenerationConfig(max_new_tokens=100, do_sample=False)},
        {"generation_config": GenerationConfig(max_length=100, do_sample=False)},
    ],
)
def test_generation_stops_at_the_context_and_says_so(model, options, capfd):
    if "generation_config" not in options:
        options = options | {"do_sample": False, "suppress_tokens": [END]}
    with pytest.warns(UserWarning, match="stopped at the model's context of 48 tokens") as caught:
        made = model.generate(PROMPT, **options)
    assert made.shape == (1, CONTEXT)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert capfd.readouterr().err == ""  # nor a word from transformers' logger


def test_a_limit_set_on_the_model_stops_at_the_context_too(run):
    model = AutoModelForCausalLM.from_pretrained(run)
    model.generation_config.max_new_tokens = 100
    with pytest.warns(UserWarning, match="context of 48"):
        assert model.generate(PROMPT, do_sample=False, suppress_tokens=[END]).shape == (1, CONTEXT)


@pytest.mark.parametrize("limit", [{"max_new_tokens": CONTEXT - 9}, {"max_length": CONTEXT}])
def test_what_just_fits_the_context_is_no_matter(model, limit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.generate(PROMPT, do_sample=False, suppress_tokens=[END], **limit).shape == (1, CONTEXT)


def test_padding_takes_positions_of_the_context(model):
    ids, mask = torch.full((2, 40), END), torch.ones(2, 40, dtype=torch.long)
    mask[1, :35] = 0
    with pytest.warns(UserWarning, match="context of 48"):
        made = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, suppress_tokens=[END])
    assert made.shape == (2, CONTEXT)


def test_generation_goes_on_from_a_cache_up_to_the_context(model):
    options = {"do_sample": False, "suppress_tokens": [END], "return_dict_in_generate": True}
    first = model.generate(PROMPT, max_new_tokens=5, **options)
    with pytest.warns(UserWarning, match="context of 48"):
        whole = model.generate(first.sequences, max_new_tokens=99, past_key_values=first.past_key_values, **options)
    with pytest.warns(UserWarning, match="context of 48"):
        expected = model.generate(PROMPT, max_new_tokens=99, **options)
    assert torch.equal(whole.sequences, expected.sequences)


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 10])
def test_a_prompt_that_fills_the_context_is_refused(model, length):
    with pytest.raises(ValueError, match=f"a prompt of {length} tokens leaves no room in the model's context of 48"):
        model.generate(torch.zeros(1, length, dtype=torch.long), max_new_tokens=1)


# generate_text


def test_the_prompt_follows_the_end_token(opened, reference):
    (made,) = generate_text(opened, "café", max_tokens=8, temperature=0)
    expected = greedy_by_hand(reference, [END, *"café".encode()], 8)
    assert made.tokens == expected[: expected.index(END)] if END in expected else expected
    assert made.text == bytes(made.tokens).decode(errors="replace")


def test_an_empty_prompt_begins_a_document(opened, reference):
    (made,) = generate_text(opened, "", max_tokens=1, temperature=0)
    assert made.tokens == greedy_by_hand(reference, [END], 1)


def test_a_literal_end_token_in_a_prompt_is_text(opened, reference):
    (made,) = generate_text(opened, LITERAL, max_tokens=5, temperature=0)
    assert made.tokens == greedy_by_hand(reference, [END, *LITERAL.encode()], 5)


@pytest.mark.parametrize("temperature", [0, 1e-30])
def test_temperature_zero_is_greedy_and_needs_no_seed(opened, temperature):
    made = generate_text(opened, "ab", temperature=temperature, max_tokens=10, samples=3)
    assert len(made) == 3
    assert made == generate_text(opened, "ab", temperature=1.0, top_k=1, max_tokens=10, samples=3)


def test_a_seed_reproduces_and_leaves_the_generator_alone(run, opened):
    before = torch.get_rng_state()
    first = generate_text(opened, "ab", seed=7, max_tokens=20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert generate_text(str(run), "ab", seed=7, max_tokens=20) == first
    assert generate_text(opened, "ab", seed=8, max_tokens=20) != first


def test_without_a_seed_the_generators_own_state_decides(opened):
    torch.manual_seed(1)
    first, second = (generate_text(opened, "ab", max_tokens=20) for _ in range(2))
    torch.manual_seed(1)
    assert generate_text(opened, "ab", max_tokens=20) == first
    assert first != second


def test_samples_differ(opened):
    made = generate_text(opened, "ab", seed=0, samples=4, max_tokens=10)
    assert len({sample.text for sample in made}) == 4


def ranks_and_masses(reference, tokens: list[int], temperature: float) -> list[tuple[int, float]]:
    """For each token: how many are likelier, and the probability that they have together."""
    with torch.no_grad():
        logits = reference(torch.tensor([[END, *tokens[:-1]]])).logits[0].double()
    found = []
    for row, token in zip((logits / temperature).softmax(-1), tokens, strict=True):
        likelier = row > row[token]
        found.append((int(likelier.sum()), float(row[likelier].sum())))
    return found


def sampled(opened, **options) -> list[list[int]]:
    made = generate_text(opened, "", seed=3, samples=8, max_tokens=20, **options)
    return [sample.tokens for sample in made if sample.tokens]


def test_top_k_keeps_the_likeliest(opened, reference):
    def ranks(top_k: int) -> list[int]:
        rows = sampled(opened, top_k=top_k)
        return [rank for tokens in rows for rank, _ in ranks_and_masses(reference, tokens, 1.0)]

    assert set(ranks(3)) == {0, 1, 2}
    assert max(ranks(0)) > 50  # beyond transformers' own default, too


def test_top_p_keeps_the_fewest_with_that_probability(opened, reference):
    def masses(top_p: float) -> list[float]:
        rows = sampled(opened, top_p=top_p, temperature=0.8)
        return [mass for tokens in rows for _, mass in ranks_and_masses(reference, tokens, 0.8)]

    assert 0 < max(masses(0.5)) < 0.5
    assert max(masses(1.0)) > 0.9


def test_temperature_sharpens(opened, reference):
    def mean_mass(temperature: float) -> float:
        rows = sampled(opened, temperature=temperature)
        masses = [mass for tokens in rows for _, mass in ranks_and_masses(reference, tokens, 1.0)]
        return sum(masses) / len(masses)

    assert mean_mass(0.3) < mean_mass(1.0) < mean_mass(3.0)


@pytest.mark.parametrize("seed", range(5))
def test_pieces_make_up_the_text(opened, seed):
    pieces: list[str] = []
    (streamed,) = generate_text(opened, "a b", seed=seed, stream=pieces.append)
    assert "".join(pieces) == streamed.text
    assert "" not in pieces
    assert generate_text(opened, "a b", seed=seed) == [streamed]


class Scripted:
    """A model that says what it is told to, one row for each sample."""

    device = torch.device("cpu")

    def __init__(self, *rows: list[int]) -> None:
        self.rows = torch.tensor(rows)

    def room_after(self, tokens: int) -> int:
        return 1000

    def generate(self, ids, *, streamer, **options):
        if streamer is not None:
            streamer.put(ids)
            for token in self.rows[0]:
                streamer.put(token[None])
            streamer.end()
        return torch.cat((ids.expand(len(self.rows), -1), self.rows), dim=1)


@pytest.mark.parametrize("text", ["naïve — ok\nzwei Wörter\n", "中文 なに 🎉🎉 end", "é", "a\n\n b"])
def test_no_piece_breaks_a_character(opened, text):
    pieces: list[str] = []
    (made,) = generate_text(OpenModel(Scripted([*text.encode(), END]), opened.tokenizer), "p", stream=pieces.append)
    assert made.text == text == "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)
    assert (len(pieces) > 1) == (" " in text or "\n" in text)


def test_what_stopped_it_is_told(opened):
    assert generate_text(opened, "ab", seed=0, top_k=5, max_tokens=3)[0].stopped == "length"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the function says it in its result
        (made,) = generate_text(opened, "ab", temperature=0, max_tokens=200)
    assert made.stopped == "context"
    assert len(made.tokens) == CONTEXT - 3
    (ended,) = generate_text(OpenModel(Scripted([*b"done", END]), opened.tokenizer), "p")
    assert ended == ("done", list(b"done"), "end")


def test_each_sample_ends_for_itself(opened):
    """In a batch, end tokens pad what ended before the longest."""
    rows = Scripted(list(b"abc"), [*b"a", END, END], [*b"ab", END])
    made = generate_text(OpenModel(rows, opened.tokenizer), "p", samples=3, max_tokens=3)
    assert made == [("abc", list(b"abc"), "length"), ("a", list(b"a"), "end"), ("ab", list(b"ab"), "end")]


def test_a_prompt_that_fills_the_context_is_refused_as_text(opened):
    assert generate_text(opened, "x" * (CONTEXT - 2), temperature=0)[0].stopped in ("context", "end")
    with pytest.raises(ContextError, match="a prompt of 48 tokens leaves no room"):
        generate_text(opened, "x" * (CONTEXT - 1))


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
        {"samples": 0},
        {"samples": 2, "stream": print},
        {"prompt": "\udcff"},
    ],
)
def test_options_that_cannot_be_are_named_before_anything_is_opened(options):
    with pytest.raises(ConfigError, match=f"^{next(iter(options))}: expected"):
        generate_text("nowhere", **({"prompt": "x"} | options))


def test_errors_are_one_line_that_the_user_can_mend():
    assert issubclass(ContextError, MyriadError)
    assert ContextError.exit_code == 2
