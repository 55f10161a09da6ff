"""The model in transformers: loading, saving, forward, loss."""

import json
import shutil
import socket

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache
from transformers.loss.loss_utils import ForCausalLMLoss

import myriad
from myriad import checkpoint
from myriad.checkpoint import CheckpointError
from myriad.hf import MyriadConfig, MyriadForCausalLM
from myriad.train.optim import hold_weights

END = 256
IDS = torch.randint(END, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(run) -> MyriadForCausalLM:
    return MyriadForCausalLM.from_pretrained(run)


@pytest.fixture
def fresh(run) -> MyriadForCausalLM:
    """One that the test may change."""
    return MyriadForCausalLM.from_pretrained(run)


def padded(lengths=(20, 13, 7)) -> tuple[torch.Tensor, torch.Tensor]:
    """IDS with padding on the left, and its mask."""
    mask = torch.stack([torch.arange(20) >= 20 - length for length in lengths]).long()
    return IDS * mask, mask


# Loading and saving


@pytest.mark.parametrize("place", ["", "checkpoints/00000005"])
def test_auto_classes_open_a_run_and_give_its_logits_bit_for_bit(run, place):
    opened, info = AutoModelForCausalLM.from_pretrained(run / place, output_loading_info=True)
    assert isinstance(opened, MyriadForCausalLM)
    assert not opened.training
    assert not any(info.values())
    loaded = myriad.load(run)
    for name, value in loaded.state_dict().items():  # buffers, too
        assert torch.equal(opened.model.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(opened(IDS).logits, loaded(IDS).logits)


def test_the_tokenizer_opens_and_keeps_a_literal_end_token_as_text(run):
    tokenizer = AutoTokenizer.from_pretrained(run)
    text = "é <|endoftext|>"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == END
    assert tokenizer.decode(list(text.encode())) == text


def test_a_subfolder_is_a_checkpoint(run):
    opened = MyriadForCausalLM.from_pretrained(run, subfolder="checkpoints/00000005")
    assert opened.name_or_path == str(run / "checkpoints/00000005")


def test_loading_uses_no_network_and_says_nothing(run, monkeypatch, capfd, recwarn):
    def refuse(*args):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    myriad.hf.open_model(run)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_what_transformers_saves_opens_in_both(model, tmp_path, shard_size):
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(MyriadForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)
        assert torch.equal(myriad.load(tmp_path)(IDS).logits, expected)


def test_a_sharded_checkpoint_of_ours_opens(model, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_SIZE", "20KB")
    checkpoint.write_model(tmp_path, model.model, None, END)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        assert torch.equal(MyriadForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_other_dtypes_survive(fresh, tmp_path):
    fresh.bfloat16().save_pretrained(tmp_path)
    opened = MyriadForCausalLM.from_pretrained(tmp_path)
    assert {value.dtype for value in opened.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_tables_of_bfloat16_stay_so_beside_float32(bfloat16_tables, tmp_path, writer):
    ours, folder = bfloat16_tables
    if writer == "theirs":
        MyriadForCausalLM.from_pretrained(folder).save_pretrained(folder := tmp_path / "saved")
    opened = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in opened.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if "experts_" in name else torch.float32)
    with torch.no_grad():
        assert torch.equal(opened(IDS).logits, ours(IDS).logits)


def test_a_model_with_weights_of_bfloat16_opens_in_them(fresh, tmp_path):
    ours = fresh.model.eval()
    hold_weights(ours, "bfloat16")
    checkpoint.write_model(tmp_path, ours, None, END)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.bfloat16}
    assert all(map(torch.equal, opened.parameters(), ours.parameters()))
    with torch.no_grad():
        found, expected = opened(IDS).logits.float(), ours(IDS).logits.float()
    # Transformers rounds the running statistics, too.
    assert (found - expected).abs().mean() < 0.03 * expected.abs().mean()
    assert len(opened.generate(IDS, max_new_tokens=3, do_sample=False)[0]) == IDS.shape[1] + 3


@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_a_table_that_layers_share_is_one_key_and_one_parameter(shared_table, tmp_path, writer):
    ours, folder = shared_table
    if writer == "theirs":
        MyriadForCausalLM.from_pretrained(folder).save_pretrained(folder := tmp_path / "saved")
    keys = load_file(folder / "model.safetensors").keys()
    assert [key for key in keys if "pool" in key] == ["model.tables.pool.down", "model.tables.pool.up"]
    opened, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert len(list(opened.parameters())) == len(list(ours.parameters()))
    with torch.no_grad():
        assert torch.equal(opened(IDS).logits, ours(IDS).logits)
        opened.model.tables.pool.up.zero_()
        ours.tables.pool.up.zero_()
        assert torch.equal(opened(IDS).logits, ours(IDS).logits)


def test_a_new_model_has_our_initial_weights(model):
    torch.manual_seed(3)
    made = MyriadForCausalLM(model.config)
    torch.manual_seed(3)
    expected = model.config.language_model.build().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in made.model.state_dict().items())


# Damage


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("opener", [MyriadForCausalLM.from_pretrained, myriad.hf.open_model])
def test_a_damaged_file_is_refused_by_name(own_run, name, opener):
    flip_a_byte(own_run / name)  # its hard link in the checkpoint, too
    with pytest.raises(CheckpointError, match=f"{name}: damaged"):
        opener(own_run)


def test_auto_classes_refuse_a_damaged_file(own_run):
    flip_a_byte(own_run / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        AutoModelForCausalLM.from_pretrained(own_run)


def test_a_run_killed_while_it_changed_its_links_is_read_from_its_checkpoint(own_run):
    (own_run / "model.safetensors").unlink()
    opened = MyriadForCausalLM.from_pretrained(own_run)
    assert opened.name_or_path == str(own_run / "checkpoints/00000005")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), "missing keys model.norm.weight"),
        (lambda state: state.update(more=torch.zeros(1)), "unexpected keys more"),
        (lambda state: state.update({"model.norm.weight": torch.zeros(3)}), "mismatched keys model.norm.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(model, tmp_path, change, message):
    """In a folder without hashes, such as transformers writes."""
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        MyriadForCausalLM.from_pretrained(tmp_path)


def test_weights_that_are_no_safetensors_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="damaged"):
        MyriadForCausalLM.from_pretrained(tmp_path)


def test_pickled_weights_are_not_read(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        MyriadForCausalLM.from_pretrained(tmp_path)


def test_a_model_of_another_library_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(CheckpointError, match="not a model of Myriad"):
        MyriadForCausalLM.from_pretrained(tmp_path)


def test_a_run_that_is_not_there_or_has_no_tokenizer_is_refused(own_run, tmp_path):
    with pytest.raises(CheckpointError, match="no such run folder"):
        myriad.hf.open_model(tmp_path / "nothing")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        shutil.copyfile(own_run / name, tmp_path / "bare" / name)
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        myriad.hf.open_model(tmp_path / "bare")


# Forward


def test_a_cache_gives_the_logits_of_one_pass(model):
    with torch.no_grad():
        whole = model(IDS).logits
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in IDS.split((7, 1, 12), dim=1)]
    assert cache.get_seq_length() == 20
    assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_a_cache_is_made_when_asked_for_and_outside_training(fresh):
    assert fresh(IDS).past_key_values.get_seq_length() == 20
    assert fresh(IDS, use_cache=False).past_key_values is None
    assert fresh.train()(IDS).past_key_values is None


def test_padding_changes_nothing(model):
    ids, mask = padded()
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        for row, length in enumerate((20, 13, 7)):
            alone = model(IDS[row : row + 1, -length:]).logits
            assert_close(together[row : row + 1, -length:], alone, atol=1e-4, rtol=1e-4)


def test_only_the_logits_asked_for_are_returned(model):
    with torch.no_grad():
        whole = model(IDS).logits
        assert torch.equal(model(IDS, logits_to_keep=2).logits, whole[:, -2:])
        assert torch.equal(model(IDS, logits_to_keep=torch.tensor([3, 5])).logits, whole[:, [3, 5]])


def test_a_tuple_comes_when_asked_for(model):
    loss, logits, *_ = model(IDS, labels=IDS, return_dict=False)
    assert loss.ndim == 0
    assert logits.shape == (3, 20, 257)


def test_masks_and_caches_that_cannot_be_are_refused(model):
    with pytest.raises(ValueError, match=r"expected a shape of .* = \(3, 20\), not \(3, 19\)"):
        model(IDS, attention_mask=torch.ones(3, 19))
    with pytest.raises(ValueError, match="DynamicCache"):
        model(IDS, past_key_values=StaticCache(config=model.config, max_cache_len=30))
    with pytest.raises(ValueError, match="context of 48"):
        model(torch.zeros(1, 49, dtype=torch.long))


# Loss


def labels_with_gaps() -> torch.Tensor:
    labels = IDS.clone()
    labels[0, :9] = -100
    labels[2, 3] = -100
    return labels


def test_the_loss_is_that_of_transformers_and_of_a_few_lines(model):
    labels = labels_with_gaps()
    with torch.no_grad():
        output = model(IDS, labels=labels)
        own = model.model(IDS, targets=F.pad(labels[:, 1:], (0, 1), value=-100))
    assert_close(output.loss, ForCausalLMLoss(output.logits, labels, 257), atol=1e-5, rtol=0)
    terms = [
        -output.logits[row, at - 1].log_softmax(0)[labels[row, at]]
        for row in range(3)
        for at in range(1, 20)
        if labels[row, at] >= 0
    ]
    assert_close(output.loss, torch.stack(terms).mean(), atol=1e-5, rtol=0)
    assert len(terms) == own.targets
    assert_close(output.loss, own.loss / own.targets, atol=1e-5, rtol=0)


def test_the_mean_may_be_over_the_targets_of_several_batches(model):
    with torch.no_grad():
        loss = model(IDS, labels=IDS).loss
        assert_close(model(IDS, labels=IDS, num_items_in_batch=114).loss, loss * 57 / 114)


def test_the_loss_is_of_all_positions_whatever_logits_are_kept(model):
    with torch.no_grad():
        assert torch.equal(model(IDS, labels=IDS, logits_to_keep=1).loss, model(IDS, labels=IDS).loss)


def test_the_auxiliary_loss_counts_in_training_only(fresh):
    ffn = fresh.get_submodule("model.blocks.0.ffn")
    ffn.register_forward_hook(lambda module, inputs, output: output._replace(aux_loss=torch.tensor(2.5)))
    evaluated = fresh(IDS, labels=IDS)
    assert_close(evaluated.loss, ForCausalLMLoss(evaluated.logits, IDS, 257))
    trained = fresh.train()(IDS, labels=IDS)
    assert_close(trained.loss, ForCausalLMLoss(trained.logits, IDS, 257) + 2.5)
    assert trained.aux_loss == 2.5


def test_statistics_come_out_in_training_and_move_the_model_when_handed_back(fresh):
    assert fresh(IDS).loads is None
    before = fresh.get_buffer("model.blocks.1.ffn.queries.norm.running_mean").clone()
    output = fresh.train()(IDS, labels=IDS)
    assert torch.equal(fresh.get_buffer("model.blocks.1.ffn.queries.norm.running_mean"), before)
    fresh.model.after_step(output.loads)
    assert not torch.equal(fresh.get_buffer("model.blocks.1.ffn.queries.norm.running_mean"), before)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")  # newer transformers rename it
def test_activation_checkpointing_gives_the_same_gradients(run):
    def gradients(enable: bool) -> dict[str, torch.Tensor]:
        made = MyriadForCausalLM.from_pretrained(run).train()
        if enable:
            made.gradient_checkpointing_enable()
            assert made.model.activation_checkpointing
        made(IDS, labels=IDS).loss.backward()
        found = {name: value.grad for name, value in made.named_parameters()}
        made.gradient_checkpointing_disable()
        assert not made.model.activation_checkpointing
        return found

    plain, checkpointed = gradients(False), gradients(True)
    for name, grad in plain.items():
        assert grad is not None, name
        assert_close(checkpointed[name].to_dense(), grad.to_dense())


def test_input_embeddings_are_found(model):
    assert model.get_input_embeddings() is model.model.embedding


def test_a_model_built_from_a_config_is_ours(model):
    made = AutoModelForCausalLM.from_config(MyriadConfig(model=model.config.model))
    assert isinstance(made, MyriadForCausalLM)
    assert made.state_dict().keys() == model.state_dict().keys()
