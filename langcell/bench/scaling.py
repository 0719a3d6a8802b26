"""A paper model of more GPUs than are at hand: what a step costs as their number grows.

Weak scaling: every GPU runs micro-batches of the same size, the global batch grows with the workers. The
bytes of each collective are measured at a few workers and are affine in their number W: parameters and
gradients stay, gathered rows grow with W. Everything else is assumed, and said:

    step        = compute + contrast + collectives            (nothing overlaps)
    compute     = FLOPs of the packed micro-batch / (peak x MFU)
    contrast    = products of B local rows with W B gathered ones, in float32
    collectives = sum over kinds of  f m ((g - 1) / g / link + (n - 1) / n / network) + count x latency

with m the bytes of the whole message, f = 2 for a sum over ranks (ring: scatter, then gather) and 1 for a
gather or scatter, g GPUs of a node joined by `link`, n nodes whose GPUs share one `network` adapter. What is
not in it: slow nodes, congestion, ranks that wait for the one with the longest cells.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from langcell.bench.collectives import Collective

GATHERED, SUMMED = 1, 2


@dataclass(frozen=True)
class Cluster:
    """Nodes of eight A100-SXM4-40GB with NVLink 3 and four 100 Gb/s adapters (AWS p4d.24xlarge).

    flops, float32_flops: dense bf16 and plain float32 peaks of a GPU (1/s); node: GPUs; link: bytes/s that
    a GPU sends over NVLink; network: bytes/s that a node sends; reached: share of both that NCCL gets;
    latency_s, network_latency_s: of a collective, for each doubling of GPUs in a node and of nodes; cpus:
    logical CPUs of a node.
    """

    flops: float = 312e12
    float32_flops: float = 19.5e12
    node: int = 8
    link: float = 300e9
    network: float = 50e9
    reached: float = 0.8
    latency_s: float = 10e-6
    network_latency_s: float = 25e-6
    cpus: int = 96


@dataclass(frozen=True)
class Line:
    """Collectives of one kind in a step: `count` of them, `constant + slope W` bytes in all.

    origin: `langcell` or `deepspeed`; misfit: bytes by which a measurement lies off the line at most.
    """

    kind: str
    dtype: str
    origin: str
    count: int
    constant: float
    slope: float
    misfit: float

    def bytes_of(self, workers: int) -> float:
        """Bytes of the whole messages of a step."""
        return self.constant + self.slope * workers

    def seconds(self, workers: int, cluster: Cluster) -> float:
        """Time of a step's collectives of this kind."""
        in_node = min(workers, cluster.node)
        nodes = math.ceil(workers / cluster.node)
        factor = SUMMED if "reduce" in self.kind and "scatter" not in self.kind else GATHERED
        per_byte = (in_node - 1) / in_node / cluster.link + (nodes - 1) / nodes / cluster.network
        latency = cluster.latency_s * math.log2(in_node) + cluster.network_latency_s * math.log2(nodes)
        return factor * self.bytes_of(workers) * per_byte / cluster.reached + self.count * latency


def lines(seen: Mapping[int, Sequence[Collective]]) -> list[Line]:
    """The lines through the measured collectives of a step, by number of workers (two or more points).

    One worker is left out: it has nobody to gather from, and skips what it would gather.
    """
    workers = sorted(count for count in seen if count > 1)
    totals: dict[tuple[str, str, str], dict[int, list[int]]] = defaultdict(dict)
    for count in workers:
        for one in seen[count]:
            name = (one.kind, one.dtype, one.origin.split(".")[0])
            totals[name].setdefault(count, []).append(max(one.handed, one.received))
    fitted = []
    for (kind, dtype, origin), sizes in sorted(totals.items()):
        measured = [sum(sizes.get(count, [])) for count in workers]
        slope, constant = np.polyfit(workers, measured, 1)
        misfit = max(abs(slope * w + constant - m) for w, m in zip(workers, measured, strict=True))
        most = max(len(each) for each in sizes.values())
        fitted.append(Line(kind, dtype, origin, most, float(constant), float(slope), float(misfit)))
    return fitted


@dataclass(frozen=True)
class Step:
    """What a GPU computes in a step: FLOPs of the packed micro-batch of `cells`; `products` of rows with
    gathered rows, each 2 `cells` G `width` operations."""

    flops: float
    cells: int
    products: int
    width: int


@dataclass(frozen=True)
class Predicted:
    """A step at so many GPUs (seconds), its rate, and what it asks of the CPUs.

    efficiency: the rate over that of as many GPUs alone; cpu_share: CPUs that the data road needs over those
    that the nodes have.
    """

    gpus: int
    global_batch: int
    compute_s: float
    contrast_s: float
    collectives_s: float
    cells_per_s: float
    efficiency: float
    cpu_share: float


def predict(
    step: Step, fitted: Sequence[Line], cluster: Cluster, gpus: int, mfu: float, cells_per_cpu_s: float
) -> Predicted:
    """The step at so many GPUs. cells_per_cpu_s: cells that the data road makes ready in a CPU second."""
    compute = step.flops / (cluster.flops * mfu)

    def contrast(workers: int) -> float:
        operations = step.products * 2 * step.cells**2 * workers * step.width
        return operations / (cluster.float32_flops * mfu)

    collectives = sum(line.seconds(gpus, cluster) for line in fitted)
    rate = gpus * step.cells / (compute + contrast(gpus) + collectives)
    alone = step.cells / (compute + contrast(1))
    return Predicted(
        gpus=gpus,
        global_batch=gpus * step.cells,
        compute_s=compute,
        contrast_s=contrast(gpus),
        collectives_s=collectives,
        cells_per_s=rate,
        efficiency=rate / (gpus * alone),
        cpu_share=rate / cells_per_cpu_s / (gpus / cluster.node * cluster.cpus),
    )
