"""The paper model of more GPUs: lines through measured bytes, and what follows from them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from langcell.bench.collectives import Collective
from langcell.bench.scaling import Cluster, Line, Step, lines, predict

STEP = Step(flops=1e13, cells=128, products=11, width=256)
SUM = Line("allreduce", "bfloat16", "deepspeed", 1, 80e6, 0, 0)
GATHER = Line("allgather", "float32", "langcell", 3, 0, 400e3, 0)


def collective(kind: str, handed: int, received: int, origin: str) -> Collective:
    return Collective(kind, "float32", ((handed // 4,),), handed, received, origin)


def test_a_line_goes_through_the_measured_bytes() -> None:
    def seen(workers: int) -> list[Collective]:
        rows = collective("allgather", 100, 100 * workers, "langcell.objective.gather")
        parameters = collective("allreduce", 7_000, 7_000, "deepspeed.comm.comm")
        return [parameters] + ([rows, rows] if workers > 1 else [])

    gather, total = lines({count: seen(count) for count in (1, 2, 4)})
    assert (gather.kind, gather.origin, gather.count) == ("allgather", "langcell", 2)
    assert gather.bytes_of(256) == pytest.approx(2 * 100 * 256)
    assert (total.origin, total.bytes_of(256)) == ("deepspeed", pytest.approx(7_000))
    assert max(gather.misfit, total.misfit) < 1e-6


def test_a_sum_moves_twice_what_a_gather_moves() -> None:
    cluster = replace(Cluster(), latency_s=0, network_latency_s=0, reached=1.0)
    total = SUM.seconds(8, cluster)
    assert total == pytest.approx(2 * 7 / 8 * 80e6 / 300e9)
    assert replace(SUM, kind="allgather").seconds(8, cluster) == pytest.approx(total / 2)
    assert replace(SUM, kind="reduce_scatter_base").seconds(8, cluster) == pytest.approx(total / 2)
    assert SUM.seconds(1, cluster) == 0
    # Between nodes all eight GPUs share the adapter.
    assert SUM.seconds(16, cluster) == pytest.approx(total + 2 * 1 / 2 * 80e6 / 50e9)


def test_more_gpus_are_faster_and_less_efficient() -> None:
    modelled = [predict(STEP, [SUM, GATHER], Cluster(), gpus, 0.4, 3_000.0) for gpus in (8, 64, 256)]
    rates = [each.cells_per_s for each in modelled]
    assert rates == sorted(rates)
    efficiencies = [each.efficiency for each in modelled]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert 0 < efficiencies[-1] < efficiencies[0] < 1
    for each in modelled:
        step_s = each.compute_s + each.contrast_s + each.collectives_s
        assert each.cells_per_s == pytest.approx(each.global_batch / step_s)
        # 12 CPUs a GPU, 3,000 cells a CPU second.
        assert each.cpu_share == pytest.approx(each.cells_per_s / each.gpus / 12 / 3_000)


def test_one_gpu_alone_has_nothing_to_wait_for() -> None:
    assert predict(STEP, [], Cluster(), 1, 0.4, 3_000.0).efficiency == pytest.approx(1)
