"""A run folder of a tiny PEER model, as training leaves one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from myriad import checkpoint
from myriad.data.tokenizer import byte_tokenizer
from myriad.ffn import PEERConfig, TableConfig
from myriad.models import LanguageModel, TransformerConfig


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are faster so, and much faster where other work goes on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(tables: dict[str, TableConfig] | None = None, **options: Any) -> LanguageModel:
    """Far from its initial weights: peaked distributions, and running statistics that were moved."""
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=257,
        context=48,
        layers=2,
        d_model=32,
        heads=4,
        kv_heads=2,
        ffns={"peer": PEERConfig(experts=64, heads=2, experts_per_head=4, d_key=8, **options)},
        pattern=["peer"],
        tables=tables or {},
    )
    model = config.build()
    nn.init.normal_(model.get_parameter("embedding.weight"), std=0.5)
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.rand_like(buffer) + 0.5 if name.endswith("var") else torch.randn_like(buffer))
    return model.eval()


def write_run(folder: Path, model: LanguageModel | None = None) -> Path:
    folder.mkdir()
    tokenizer = folder.with_suffix(".tokenizer.json")
    byte_tokenizer().save(tokenizer)
    written = checkpoint.save_checkpoint(
        folder, 5, model or tiny_model(), run_config={}, tokenizer=tokenizer, end_id=256, tensors={}, state={}
    )
    checkpoint.publish(folder, written, written)
    return folder


@pytest.fixture(scope="session")
def run_writer() -> Callable[[Path, LanguageModel], Path]:
    """Writes a run folder of a model."""
    return write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("hf") / "run")


@pytest.fixture
def own_run(tmp_path: Path) -> Path:
    """A run folder that the test may damage."""
    return write_run(tmp_path / "run")


@pytest.fixture
def bfloat16_tables(tmp_path: Path) -> tuple[LanguageModel, Path]:
    """A model whose tables are bfloat16 beside float32, and a run folder of it."""
    model = tiny_model(table_dtype="bfloat16")
    return model, write_run(tmp_path / "bfloat16", model)


@pytest.fixture
def shared_table(tmp_path: Path) -> tuple[LanguageModel, Path]:
    """A model whose two PEER layers have their experts in common, and a run folder of it."""
    model = tiny_model(tables={"pool": TableConfig(rows=64, parts=["down", "up"])}, table="pool")
    return model, write_run(tmp_path / "shared", model)
