"""A small comparison for tests of the command."""

from pathlib import Path

import yaml

from myriad.data.store import Store
from tiny import tiny_model, tiny_run


def write_list(folder: Path, store: Store) -> None:
    """Write `small.yaml`, a run, and `list.yaml`, which makes two contenders of it."""
    run = tiny_run(store, model=tiny_model(layers=1, d_model=16)).model_dump(mode="json")
    run |= {"budget": {"steps": 6}, "checkpoint": {"every": 4}, "batch": {"tokens": 128}, "out": None}
    run["evaluation"] = {"every": 4, "tokens": 256}
    (folder / "small.yaml").write_text(yaml.safe_dump(run))
    dense = "small.yaml 'model.ffns={dense: {kind: dense, d_hidden: 40}}' model.pattern=[dense]"
    contenders = {"peer": "small.yaml", "dense": dense}
    (folder / "list.yaml").write_text(yaml.safe_dump({"contenders": contenders}, sort_keys=False))
