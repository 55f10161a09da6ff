"""Tables that several layers share: one parameter, wherever it is counted, saved, moved or optimised."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from myriad import checkpoint
from myriad.config import ConfigError, validate
from myriad.ffn import FFNConfig, PEERConfig, ProductKeyMemoryConfig, StackConfig, TableConfig
from myriad.models import ModelConfig, Transformer, TransformerConfig
from myriad.train.optim import build_optimizer, clip_gradients
from tiny import tiny_model

IDS = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))
DENSE, SPARSE = 8**2, 32**2
"""Rows: 32 tokens of 8 active experts give gradients of all rows, or of those in use."""


def peer(rows: int = SPARSE, **options) -> PEERConfig:
    sizes = {"experts": rows, "heads": 2, "experts_per_head": 4, "d_key": 8, "query_norm": "rms"}
    return PEERConfig(**{**sizes, "table": "pool", **options})


def memory(rows: int = SPARSE, **options) -> ProductKeyMemoryConfig:
    sizes = {"memories": rows, "heads": 2, "memories_per_head": 4, "d_key": 8}
    return ProductKeyMemoryConfig.memory_plus(**{**sizes, "table": "values", **options})


def pool(rows: int = SPARSE, **options) -> dict[str, TableConfig]:
    return {"pool": TableConfig(**{"rows": rows, "parts": ["down", "up"], **options})}


def model_of(tables: dict[str, TableConfig], *ffns: FFNConfig, **options) -> TransformerConfig:
    """A model of 50 tokens with these layers, block by block."""
    named: dict[str, FFNConfig] = {f"ffn{number}": ffn for number, ffn in enumerate(ffns)}
    sizes = {"vocab_size": 50, "layers": 2 * len(ffns)}
    return tiny_model(**{**sizes, "ffns": named, "pattern": list(named), "tables": tables, **options})


VALUES = {"values": TableConfig(rows=SPARSE)}
CONFIGS = {
    "peer": model_of(pool(), peer()),
    "dense gradients": model_of(pool(DENSE), peer(DENSE)),
    "both gradients": model_of(pool(SPARSE), peer(), peer(heads=1, experts_per_head=20)),
    "gated": model_of(pool(parts=["down", "up", "gate"]), peer(gated=True, activation="silu")),
    "memory": model_of(VALUES, memory()),
    "narrow values": model_of({"values": TableConfig(rows=DENSE, width=12)}, memory(DENSE, d_value=12)),
    "stack": model_of(pool(), StackConfig(layers=[peer(), peer(router="sigmoid")]), layers=1),
    "two tables": model_of({**pool(), **VALUES}, StackConfig(layers=[peer(), memory(gated=False)]), memory()),
    "bfloat16": model_of(pool(dtype="bfloat16"), peer(table_dtype="bfloat16")),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def built(config: TransformerConfig, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return config.build()


def apart(model: Transformer) -> Transformer:
    """The same model with tables of their own in every layer."""
    raw = model.config.model_dump(mode="json")
    other = validate(ModelConfig, {**raw, "tables": {}, "ffns": _without_tables(raw["ffns"])}).build()
    state = model.state_dict()
    for name, parameter in other.named_parameters():
        part = name.rpartition(".")[2].removeprefix("experts_")
        key = name if name in state else next(k for k in state if k.startswith("tables.") and k.endswith(f".{part}"))
        parameter.data.copy_(state[key])
    return other.train(model.training)


def _without_tables(raw):
    if isinstance(raw, list):
        return [_without_tables(item) for item in raw]
    if isinstance(raw, dict):
        return {key: None if key == "table" else _without_tables(value) for key, value in raw.items()}
    return raw


def backward(model: Transformer, ids: Tensor = IDS) -> Tensor:
    loss = model(ids, targets=ids).loss
    loss.backward()
    return loss.detach()


def table_gradients(model: Transformer) -> dict[str, Tensor]:
    """Part -> the sum of the gradients of all tables of that part."""
    sums: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if model.roles()[name] == "table":
            part = name.rpartition(".")[2].removeprefix("experts_")
            sums[part] = sums.get(part, torch.zeros(())) + parameter.grad.to_dense().float()
    return sums


@every_config
def test_a_table_is_one_parameter_one_key_and_of_one_role(config):
    model = built(config)
    expected = {f"tables.{name}.{part}" for name, table in config.tables.items() for part in table.parts}
    for names in (dict(model.named_parameters()), model.state_dict(), {k: 0 for k, r in model.roles().items()}):
        assert {name for name in names if name.split(".")[0] == "tables"} == expected
    tables = {name for name, role in model.roles().items() if role == "table"}
    assert tables == expected
    assert set(model.roles()) == {name for name, _ in model.named_parameters()}


@every_config
def test_cost_counts_a_table_once_and_its_use_in_every_layer(config):
    model = built(config)
    cost, alone = config.cost(), apart(model).config.cost()
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.parameters < alone.parameters
    assert cost[1:] == alone[1:]


@every_config
@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_are_those_of_tables_apart_and_gradients_their_sums(config, checkpointing):
    """Over two micro-batches, so that gradients meet in one backward pass and in the next."""
    model = built(config).double() if config is not CONFIGS["bfloat16"] else built(config)
    other = apart(model).to(model.embedding.weight.dtype)
    model.activation_checkpointing = checkpointing
    close = {"rtol": 2e-2, "atol": 2e-2} if config is CONFIGS["bfloat16"] else {}
    for ids in (IDS, IDS.flip(1)):
        assert_close(backward(model, ids), backward(other, ids))
    found, expected = table_gradients(model), table_gradients(other)
    assert found.keys() == expected.keys()
    for part, gradient in found.items():
        assert_close(gradient, expected[part], **close)
    mine = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        if name in mine:
            assert_close(mine[name].grad, parameter.grad, **close)


@pytest.mark.parametrize(
    ("config", "layout"),
    [("peer", torch.sparse_coo), ("dense gradients", torch.strided), ("both gradients", torch.strided)],
)
def test_gradients_are_sparse_where_every_use_is(config, layout):
    model = built(CONFIGS[config])
    for _ in range(2):
        backward(model)
        assert model.tables.get_parameter("pool.up").grad.layout == layout


@every_config
def test_a_step_moves_a_table_as_the_sum_of_its_gradients_does(config):
    model, other = built(config), built(config)
    for each in (model, other):
        backward(each)
    for name, parameter in other.named_parameters():
        if other.roles()[name] == "table":
            parameter.grad = parameter.grad.to_dense()
    norms = [clip_gradients(each.parameters(), 0.1) for each in (model, other)]
    assert_close(*norms)
    for each in (model, other):
        optimizer = build_optimizer(each, lr=1e-2)
        assert len([group for group in optimizer.param_groups if group["role"] == "table"]) == 1
        optimizer.step()
    before = built(config)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before.get_parameter(name)), name
        assert_close(parameter, other.get_parameter(name), rtol=1e-5, atol=1e-6)


@every_config
def test_copies_share_within_and_not_between(config):
    model = built(config)
    other = copy.deepcopy(model)
    expected = model(IDS).logits
    for name, parameter in model.named_parameters():
        if name.startswith("tables."):
            parameter.data.zero_()
    assert (model(IDS).logits - expected).abs().max() > 1e-3
    assert torch.equal(other(IDS).logits, expected)
    assert len(other.state_dict()) == len(model.state_dict())


@every_config
def test_what_takes_the_place_of_a_parameter_is_used_by_every_layer(config, tmp_path):
    """Loading onto meta tensors assigns new parameters; converting may as well."""
    model = built(config).eval()
    checkpoint.write_model(tmp_path, model, None, None)
    loaded = checkpoint.load(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    for owner in loaded.tables.children():
        for part in list(owner._parameters):
            setattr(owner, part, nn.Parameter(torch.zeros_like(owner.get_parameter(part))))
    zeros = built(config).eval()
    for name, parameter in zeros.named_parameters():
        if name.startswith("tables."):
            parameter.data.zero_()
    assert torch.equal(loaded(IDS).logits, zeros(IDS).logits)


@pytest.mark.parametrize("config", ["dense gradients", "peer", "stack", "memory"])
def test_compiled_blocks_give_the_same_gradients(config):
    model, plain = built(CONFIGS[config]), built(CONFIGS[config])
    for block in model.blocks:
        block.compile(backend="aot_eager")
    assert_close(backward(model), backward(plain), rtol=1e-5, atol=0)
    for part, gradient in table_gradients(model).items():
        assert_close(gradient, table_gradients(plain)[part], rtol=1e-4, atol=1e-5)


@every_config
def test_config_round_trip(config):
    assert validate(ModelConfig, config.model_dump(mode="json")) == config


def test_a_table_of_memories_may_be_called_values_and_others_as_python_calls_things():
    for name in ("values", "keys", "items", "pool_2", "P"):
        config = model_of({name: TableConfig(rows=DENSE)}, memory(DENSE, table=name))
        assert f"tables.{name}.values" in built(config).state_dict()


def raw_model(tables: dict, *ffns: dict) -> dict:
    named = {f"ffn{number}": ffn for number, ffn in enumerate(ffns)}
    return {"kind": "transformer", "layers": len(ffns), "ffns": named, "pattern": list(named), "tables": tables}


def raw_peer(**options) -> dict:
    return {"kind": "peer", "experts": 64, "experts_per_head": 4, "table": "pool", **options}


PARTS = ["down", "up"]
MEMORY = {"kind": "product_key_memory", "memories": 64, "table": "pool"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            raw_model({"pool": {"rows": 64, "parts": PARTS}}, raw_peer(table="pol")),
            "ffns.ffn0.table names 'pol', not one of tables; did you mean 'pool'? (known: pool)",
        ),
        (raw_model({}, raw_peer()), "ffns.ffn0.table names 'pool', not one of tables (known: none)"),
        (
            raw_model({"pool": {"rows": 64, "parts": PARTS}}, raw_peer(table=None)),
            "tables.pool is used by no layer: one names it in its field `table`",
        ),
        (
            raw_model({"pool": {"rows": 81, "parts": PARTS}}, raw_peer()),
            "tables.pool.rows = 81, but ffns.ffn0.table needs 64",
        ),
        (
            raw_model({"pool": {"rows": 64, "width": 9, "parts": PARTS}}, raw_peer()),
            "tables.pool.width = 9, but ffns.ffn0.table needs 256",
        ),
        (
            raw_model({"pool": {"rows": 64, "parts": PARTS}}, raw_peer(), raw_peer(gated=True)),
            'tables.pool.parts = ["down", "up"], but ffns.ffn1.table needs ["down", "up", "gate"]',
        ),
        (
            raw_model({"pool": {"rows": 64, "parts": PARTS, "dtype": "bfloat16"}}, raw_peer()),
            'tables.pool.dtype = "bfloat16", but ffns.ffn0.table needs null',
        ),
        (
            raw_model({"pool": {"rows": 64}}, MEMORY | {"d_value": 32}),
            "tables.pool.width = 256, but ffns.ffn0.table needs 32",
        ),
        (
            raw_model({"pool": {"rows": 64}}, {"kind": "stack", "layers": [MEMORY | {"table": None}, raw_peer()]}),
            'tables.pool.parts = ["values"], but ffns.ffn0.layers.1.table needs ["down", "up"]',
        ),
        (
            raw_model({"a.b": {"rows": 64}}, MEMORY | {"table": "a.b"}),
            "tables: 'a.b' cannot name a table: letters, digits and _ can, but no attribute of modules",
        ),
        (
            raw_model({"train": {"rows": 64}}, MEMORY | {"table": "train"}),
            "tables: 'train' cannot name a table: letters, digits and _ can, but no attribute of modules",
        ),
        (
            raw_model({"pool": {"row": 64}}, MEMORY),
            "tables.pool.row: unknown key; did you mean 'rows'? (known: rows, width, parts, dtype)",
        ),
    ],
)
def test_tables_that_do_not_fit_are_refused(raw, message):
    with pytest.raises(ConfigError) as caught:
        validate(ModelConfig, raw)
    assert str(caught.value).removeprefix("config: ") == message
