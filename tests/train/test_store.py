"""Checkpoints on storage: what is damaged, foreign or half-written is told from what is whole."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from langcell.bench.ranks import run_ranks
from langcell.errors import InputError
from langcell.storage import open_root
from langcell.train.store import Cursor, DamagedError, Record, Shard, Store, name_of


def made(
    root: str, step: int, *, val_loss: float | None = None, ends_epoch: bool = False, commit: bool = True
) -> str:
    """A checkpoint of one parameter in two shards, whose weights are the step."""
    store, name, shards = Store(open_root(root), 1), name_of(step), []
    for rank in range(2):
        file = f"-{rank:05d}-of-00002.safetensors"
        weights = store.write(
            name, f"weights{file}", save({f"layer{rank}.weight": torch.full((2, 3), float(step))})
        )
        moments = {f"{m}.layer{rank}.weight": torch.zeros(2, 3) for m in ("exp_avg", "exp_avg_sq")}
        shards.append(
            Shard(
                {f"layer{rank}.weight": [2, 3]}, weights, store.write(name, f"optimizer{file}", save(moments))
            )
        )
    cursor = Cursor(1, step // 10, step % 10, step, "plan")
    if commit:
        store.commit(name, Record(cursor, step, 0.05, val_loss, ends_epoch, shards))
    return name


class Model(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer0, self.layer1 = nn.Linear(width, 2, bias=False), nn.Linear(width, 2, bias=False)


def found(rank: int, root: str) -> Any:
    """What ranks find together: the step of its cursor and the weights, or the error."""
    from langcell.train import checkpoint

    warnings: list[str] = []
    collecting, model = Collect(warnings), Model()
    checkpoint.log.addHandler(collecting)
    try:
        held = checkpoint.find(Store(open_root(root), 1), torch.device("cpu"))
        if held is None:
            return None, warnings
        checkpoint.load_weights(held, model)
    except DamagedError as error:
        return str(error), warnings
    finally:
        checkpoint.log.removeHandler(collecting)
    weights = {float(w) for p in model.parameters() for w in p.detach().flatten()}
    return (held.record.cursor.global_step, weights), warnings


class Collect(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def every(rank: int, roots: dict[str, str]) -> dict[str, Any]:
    return {case: found(rank, root) for case, root in roots.items()}


def damage(case: str, folder: Path) -> None:
    """Spoil a checkpoint."""
    shard = folder / "optimizer-00001-of-00002.safetensors"
    record = folder / "checkpoint.json"
    match case:
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-8])
        case "flipped":
            data = bytearray((folder / "weights-00000-of-00002.safetensors").read_bytes())
            data[-3] ^= 1
            (folder / "weights-00000-of-00002.safetensors").write_bytes(data)
        case "missing":
            shard.unlink()
        case "garbled":
            record.write_bytes(record.read_bytes()[:40])
        case "of another format":
            record.write_text(json.dumps({**json.loads(record.read_text()), "format": 99}))
        case "not committed":
            record.unlink()


DAMAGES = ["truncated", "flipped", "missing", "garbled", "of another format", "not committed"]


def test_what_is_damaged_is_passed_over_by_all_ranks(tmp_path: Path) -> None:
    """The file that is wrong is read by one rank alone; both take the checkpoint before it, and say why."""
    roots = {}
    for case in [*DAMAGES, "whole", "none", "all damaged"]:
        roots[case] = str(tmp_path / case)
        for step in (4, 8) if case != "none" else ():
            name = made(roots[case], step)
            if case == "all damaged":
                damage("flipped", tmp_path / case / "checkpoints" / "stage1" / name)
        damage(case, tmp_path / case / "checkpoints" / "stage1" / name_of(8))
    ranks = run_ranks(every, 2, roots)
    for results in ranks:
        for case in DAMAGES:
            assert results[case][0] == (4, {4.0}), case
        assert results["whole"] == ((8, {8.0}), [])
        assert results["none"][0] is None
        assert (
            "no checkpoint in checkpoints/stage1 of the run directory is whole" in results["all damaged"][0]
        )
    for case, word in {
        "truncated": "bytes",
        "flipped": "hash",
        "missing": "is missing",
        "garbled": "JSON",
    }.items():
        [warning] = ranks[0][case][1]
        assert "step-00000008 is passed over" in warning
        assert word in warning
    assert ranks[0]["not committed"][1] == [], "an attempt that failed is nothing to warn of"


def test_a_checkpoint_of_another_model_or_corpus_is_refused(tmp_path: Path) -> None:
    from langcell.train import checkpoint

    made(str(tmp_path), 4)
    [(_, record)] = Store(open_root(str(tmp_path)), 1).committed()
    checkpoint.check_plan(record, "plan")
    with pytest.raises(InputError, match="another corpus, seed or batch"):
        checkpoint.check_plan(record, "other")
    checkpoint.check_shapes(record, Model(), "it")
    with pytest.raises(
        InputError, match=r"it is of another model: layer0\.weight, layer1\.weight do not fit"
    ):
        checkpoint.check_shapes(record, Model(width=4), "it")
    with pytest.raises(InputError, match=r"layer0\.weight"):
        checkpoint.check_shapes(record, nn.Linear(3, 2), "it")


def test_a_half_removed_checkpoint_is_none(tmp_path: Path) -> None:
    """Its record goes first, and what is left is cleaned away at the next start."""
    store = Store(open_root(str(tmp_path)), 1)
    for step in (4, 8):
        made(str(tmp_path), step)
    folder = tmp_path / "checkpoints" / "stage1" / name_of(8)
    (folder / "checkpoint.json").unlink()
    assert [name for name, _ in store.committed()] == [name_of(4)]
    store.clean()
    assert not folder.exists()
    assert store.names() == [name_of(4)]
    store.remove(name_of(4))
    assert store.names() == []


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.none() | st.just(math.nan) | st.floats(0, 9), st.booleans()), min_size=1, max_size=6
    ),
    st.integers(1, 3),
    st.booleans(),
)
def test_what_is_kept(
    tmp_path_factory: pytest.TempPathFactory, saved: list[tuple[float | None, bool]], last: int, ends: bool
) -> None:
    """The last k, the best by validation loss, epoch ends if told; nothing else. Retaining again removes
    nothing."""
    root = str(tmp_path_factory.mktemp("kept"))
    store = Store(open_root(root), 1)
    for step, (val_loss, ends_epoch) in enumerate(saved):
        store.commit(
            _empty(store, step), Record(Cursor(1, 0, step, step, "p"), step, 0.05, val_loss, ends_epoch)
        )
    store.retain(last, ends)
    kept = {record.cursor.step for _, record in store.committed()}
    steps = range(len(saved))
    scored = [
        (val_loss, -step)
        for step, (val_loss, _) in enumerate(saved)
        if val_loss is not None and val_loss == val_loss
    ]
    best = {-min(scored)[1]} if scored else set()
    assert kept == set(steps[-last:]) | best | {step for step in steps if ends and saved[step][1]}
    store.retain(last, ends)
    assert {record.cursor.step for _, record in store.committed()} == kept


def _empty(store: Store, step: int) -> str:
    store.write(name_of(step), "weights", b"")
    return name_of(step)


def test_a_damaged_checkpoint_is_met_once(tmp_path: Path) -> None:
    """It is none any more: not kept in a whole one's stead, nor removed before somebody looked at it."""
    store = Store(open_root(str(tmp_path)), 1)
    for step in (4, 8):
        made(str(tmp_path), step)
    store.set_aside(name_of(8))
    assert [name for name, _ in store.committed()] == [name_of(4)]
    store.retain(1, False)
    store.clean()
    assert store.names() == [name_of(8), name_of(4)]
    made(str(tmp_path), 8)  # trained again
    assert [name for name, _ in store.committed()] == [name_of(8), name_of(4)]


def test_what_was_given_up_removes_its_own_files_alone(tmp_path: Path) -> None:
    store = Store(open_root(str(tmp_path)), 1)
    name = made(str(tmp_path), 4)
    store.write(name, "weights-00000-of-00002-zombie.safetensors", b"late")
    store.discard(
        name, ["weights-00000-of-00002-zombie.safetensors", "weights-00001-of-00002-zombie.safetensors"]
    )
    [(_, record)] = store.committed()
    for shard in record.shards:
        store.read(name, shard.weights)
    assert len(list((tmp_path / "checkpoints" / "stage1" / name).iterdir())) == 5


def test_a_record_says_what_it_was_told(tmp_path: Path) -> None:
    made(str(tmp_path), 12, val_loss=1.5, ends_epoch=True)
    [(name, record)] = Store(open_root(str(tmp_path)), 1).committed()
    assert name == "step-00000012"
    assert Record.from_json(record.to_json()) == record
    assert replace(record, shards=[]) == Record(Cursor(1, 1, 2, 12, "plan"), 12, 0.05, 1.5, True)
