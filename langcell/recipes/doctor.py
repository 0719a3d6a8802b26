"""Pre-flight on the live cluster: what would end a run after an hour is found in a minute.

Each check is one row, green or red (or grey: it could not be told, or need not be). They use what training
uses: tasks on every node, the run's own storage, the actual checkpoints, as many workers with the same
resources, which sum over NCCL (gloo on CPUs). A cluster that has scaled to none brings up nodes for them, and
pays for these: what is checked is what will be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import ray
from pyarrow import fs
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
from rich.console import Console
from rich.table import Table

from langcell.config import Config
from langcell.corpus.manifest import Manifest
from langcell.errors import InputError, RunError
from langcell.recipes import forecast, probing
from langcell.recipes.probing import Seat, Worker
from langcell.recipes.rundir import with_absolute_paths
from langcell.recipes.session import connect
from langcell.recipes.training import use_gpus, worker_resources
from langcell.storage import open_root, sizes

State = Literal["ok", "red", "?"]
COLOURS = {"ok": "green", "red": "red", "?": "bright_black"}
ANSWER_S = 120.0
"""Within which a node must do what it is asked (s); starting a worker process and PyTorch is most of it."""
NODES_S = 900.0
"""Within which the cluster must place the workers (s): a cloud's GPU node takes ten minutes to come."""


@dataclass(frozen=True)
class Row:
    """What one check found. detail: what is there; on red also what to do."""

    check: str
    where: str
    state: State
    detail: str


def run(config: Config, *, nodes_s: float = NODES_S) -> list[dict[str, str]]:
    """Check, and print a table.

    Raises RunError where a row is red, InputError where no cluster answers.
    """
    config = with_absolute_paths(config)
    rows: list[Row] = []
    print(f"placing {config.train.num_workers} workers, which may bring up nodes", flush=True)
    with connect(config.run), _placed(config, nodes_s) as workers:
        # With the workers in their places: nodes that came for them are looked at too.
        for part in (_software, _storage, _corpus, _weights, partial(_workers, workers=workers)):
            rows += _rows_of(part, config)
    Console(width=110).print(_table(rows))
    red = sum(row.state == "red" for row in rows)
    if red:
        raise RunError(f"{red} of {len(rows)} checks are red")
    return [asdict(row) for row in rows]


def _rows_of(part: Callable[[Config], list[Row]], config: Config) -> list[Row]:
    """What a part finds; where it fails itself, that: the rows of the others must not be lost."""
    try:
        return part(config)
    except Exception as error:
        name = getattr(part, "func", part).__name__.strip("_")
        return [Row(name, "", "red", f"{type(error).__name__}: {_said(error)}")]


def _table(rows: list[Row]) -> Table:
    table = Table("check", box=None, pad_edge=False)
    for title in ("where", "", "what was found"):
        table.add_column(title, overflow="fold")  # a path is never cut short
    for row in rows:
        table.add_row(row.check, row.where, f"[{COLOURS[row.state]}]{row.state}[/]", row.detail)
    return table


def _nodes() -> dict[str, str]:
    """Address of each living node, by its id."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _everywhere(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What `function` gives on each node, or the exception, by node id."""
    calls = {
        node: ray.remote(num_cpus=0, max_retries=0)(function)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(*arguments)
        for node in _nodes()
    }
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=ANSWER_S)
    found: dict[str, Any] = {}
    for node, call in calls.items():
        try:
            found[node] = ray.get(call, timeout=0)
        except RayTaskError as error:
            found[node] = error.cause
        except RayError as error:
            found[node] = error
    return found


def _said(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _software(config: Config) -> list[Row]:
    """The driver's versions on every node."""
    own, rows = probing.versions(), []
    for node, found in _everywhere(probing.versions).items():
        where = _nodes().get(node, node)
        if isinstance(found, Exception):
            rows.append(Row("software", where, "red", f"the node does not answer: {_said(found)}"))
            continue
        other = [f"{name} {found[name]} (here {own[name]})" for name in own if found[name] != own[name]]
        if other:
            detail = f"other versions: {', '.join(other)}. One image, or one environment, for all nodes"
            rows.append(Row("software", where, "red", detail))
        else:
            detail = (
                f"Python {own['python']}, ray {own['ray']}, torch {own['torch']}, langcell {own['langcell']}"
            )
            rows.append(Row("software", where, "ok", detail))
    return rows


def _storage(config: Config) -> list[Row]:
    """Each folder is written from every node, and what each wrote is read from every node."""
    rows = []
    for option, uri in {"run.dir": config.run.dir, "corpus.dir": config.corpus.dir}.items():
        written = _everywhere(probing.write, uri)
        names = {node: found[0] for node, found in written.items() if not isinstance(found, Exception)}
        seen = _everywhere(probing.read, uri, list(names.values()))
        for node, found in written.items():
            where = _nodes().get(node, node)
            if isinstance(found, Exception):
                detail = (
                    f"{uri} cannot be written to: {_said(found)}. Mount it, or give the node's role the right"
                )
                rows.append(Row(option, where, "red", detail))
                continue
            back = seen.get(node, RuntimeError("the node has gone"))
            if isinstance(back, Exception):
                rows.append(Row(option, where, "red", f"{uri} cannot be read: {_said(back)}"))
                continue
            missing, speed = back
            if missing:
                others = [_nodes().get(other, other) for other, name in names.items() if name in missing]
                detail = (
                    f"{uri} is another folder here: what {', '.join(others)} wrote is not seen. All nodes "
                    "must share it (NFS, EFS, Filestore), or give a URI (s3://, gs://)"
                )
                rows.append(Row(option, where, "red", detail))
            else:
                detail = f"{uri}: {found[1]:,.0f} MB/s written, {speed:,.0f} read"
                rows.append(Row(option, where, "ok", detail))
        if names:
            _everywhere(probing.clear, uri)
    return rows


def _corpus(config: Config) -> list[Row]:
    """A whole corpus; or none at all, and a Census that it can be made from."""
    place = config.corpus.dir
    try:
        if Manifest.exists(place):
            manifest = Manifest.read(place)
            cells = f"{manifest.cells:,} cells in {len(manifest.blocks):,} blocks, sizes as in the manifest"
            census = Row("census", "", "?", "not needed: the corpus is whole")
            return [Row("corpus", place, "ok", cells), census]
        files = sizes(open_root(place), ["beta.parquet", "texts.parquet"])
        started = any(size is not None for size in files) or _has_blocks(place)
    except (InputError, OSError) as error:
        return [Row("corpus", place, "red", f"{place}: {_said(error)}")]
    corpus = Row("corpus", place, "?", "none yet: jobs/pretrain.py prepares it first")
    if started:
        detail = (
            "half-written: files stand there without a manifest.json. The same jobs/prepare.py goes on with "
            "it (jobs/pretrain.py does so by itself, on these nodes)"
        )
        corpus = Row("corpus", place, "red", detail)
    return [corpus, _census(config)]


def _census(config: Config) -> Row:
    """From where tasks run: a head may have a way out that data nodes lack."""
    name = config.census.uri or config.census.version
    reader = ray.remote(num_cpus=1, max_retries=0)(probing.census)
    try:
        cells = ray.get(reader.remote(config.census), timeout=NODES_S)
    except RayTaskError as error:
        return Row("census", "a data task", "red", _said(error.cause))
    except RayError as error:
        return Row("census", "a data task", "red", f"{name} was not opened: {_said(error)}")
    return Row("census", "a data task", "ok", f"{name}: {cells:,} cells match")


def _has_blocks(place: str) -> bool:
    selector = fs.FileSelector("blocks", recursive=True, allow_not_found=True)
    return any(info.type == fs.FileType.File for info in open_root(place).get_file_info(selector))


def _weights(config: Config) -> list[Row]:
    """The checkpoints to start from, read where workers may stand."""
    rows = []
    for node, found in _everywhere(probing.weights, config.model).items():
        where = _nodes().get(node, node)
        if isinstance(found, Exception):
            rows.append(Row("weights", where, "red", _said(found)))
        else:
            names = [config.model.text_init, config.model.cell_init or "a cell encoder from scratch"]
            rows.append(Row("weights", where, "ok", " and ".join(names)))
    return rows


def _wanted(config: Config) -> dict[str, float]:
    """What training reserves for a worker."""
    gpus, kind = use_gpus(config.train), config.train.accelerator
    want = worker_resources(config.train, gpus)
    return {**want, f"accelerator_type:{kind}": 0.001} if gpus and kind else want


def _workers(config: Config, workers: list[Any]) -> list[Row]:
    """As many workers as training asks for: placed, with memory enough, and joined by a network."""
    train, want = config.train, _wanted(config)
    each = ", ".join(f"{name} {n:g}" for name, n in want.items() if n)
    if len(workers) < (train.min_workers or train.num_workers):
        has = ", ".join(f"{name} {n:g}" for name, n in ray.cluster_resources().items() if name in want)
        detail = (
            f"no place in time for {train.num_workers} workers of {each}; the cluster has "
            f"{has or 'none of these'}. Look at the autoscaler's log (quota, capacity, max_workers), or "
            "lower --train.num_workers"
        )
        return [Row("workers", "cluster", "red", detail)]
    seats: list[Seat] = ray.get([worker.seat.remote() for worker in workers], timeout=ANSWER_S)
    hosts = sorted({seat.host for seat in seats})
    found = f"{len(workers)} workers of {each}, on {seats[0].device}"
    if len(workers) < train.num_workers:
        found += f" (train.num_workers is {train.num_workers}: the others find no place yet)"
    return [
        Row("workers", ", ".join(hosts), "ok", found),
        _fits(config, seats),
        _bandwidth(workers, seats),
    ]


@contextmanager
def _placed(config: Config, nodes_s: float) -> Iterator[list[Any]]:
    """Workers: all, or as many as may be the least, or none where there is no room for these in time."""
    train, want = config.train, _wanted(config)
    for count in dict.fromkeys((train.num_workers, train.min_workers or train.num_workers)):
        group = placement_group([want] * count, strategy="PACK")
        try:
            if ray.wait([group.ready()], timeout=nodes_s)[0]:
                yield [
                    Worker.options(  # type: ignore[attr-defined]
                        num_cpus=want["CPU"],
                        num_gpus=want.get("GPU", 0),
                        scheduling_strategy=PlacementGroupSchedulingStrategy(
                            group, placement_group_bundle_index=index
                        ),
                    ).remote()
                    for index in range(count)
                ]
                return
        finally:
            remove_placement_group(group)
    yield []


def _fits(config: Config, seats: list[Seat]) -> Row:
    """The forecast of `jobs/pretrain.py --plan` beside the devices."""
    try:
        drawn = forecast.draw(config)
        need = forecast.memory(config, drawn, gpu=seats[0].device != "cpu")
    except (InputError, OSError) as error:
        return Row("memory", "", "?", f"not foretold: {_said(error)}")
    on_cpu = seats[0].device == "cpu"
    tight = []
    for host in sorted({seat.host for seat in seats}):
        there = [seat for seat in seats if seat.host == host]
        room = min(seat.memory for seat in there)
        if need * (len(there) if on_cpu else 1) > forecast.ROOM * room:
            tight.append(f"{host} ({room / 1e9:.1f} GB{f' for {len(there)} workers' if on_cpu else ''})")
    detail = f"{need / 1e9:.1f} GB a worker is foretold"
    if tight:
        detail += (
            f", more than {forecast.ROOM:.0%} of {', '.join(tight)}. Lower --train.micro_batch, or "
            "--train.activation_checkpointing true, --train.zero 3, --train.offload true"
        )
        return Row("memory", "", "red", detail)
    return Row("memory", "", "ok", f"{detail}; there are {min(s.memory for s in seats) / 1e9:.0f} GB")


def _bandwidth(workers: list[Any], seats: list[Seat]) -> Row:
    if len(workers) == 1:
        return Row("network", "", "?", "one worker has nobody to talk to")
    try:
        port = ray.get(workers[0].port.remote(), timeout=ANSWER_S)
        joined = [
            worker.join.remote(rank, len(workers), seats[0].host, port) for rank, worker in enumerate(workers)
        ]
        ray.get(joined, timeout=ANSWER_S)
        speed = min(ray.get([worker.sum.remote() for worker in workers], timeout=ANSWER_S))
    except RayError as error:
        detail = f"the workers cannot sum together: {_said(error)}. Open all ports between the nodes"
        return Row("network", "", "red", detail)
    backend = "gloo" if seats[0].device == "cpu" else "NCCL"
    megabytes = probing.SUMMED >> 20
    return Row(
        "network", "", "ok", f"{backend}, all-reduce of {megabytes} MiB: {speed / 1e9:.2f} GB/s a link"
    )
