"""One optimiser step of one rank: the engine calls, whatever the number of lanes that the rank owns.

One lane: one forward, one backward. Several: every lane is looked at without gradient, the views of all
lanes are compared, then each lane has its turn, one engine call and one backward, whose gradients DeepSpeed
accumulates (`gradient_accumulation_steps` is the number of lanes a rank runs, and `engine.step()` only counts
until the last). The calls of modules depend on nothing but V and W, so that ZeRO-3 never waits.

With several lanes ZeRO 1 reduces gradients once a step, ZeRO 2 and 3 once a lane. Validation takes the same
calls, without the backwards of lanes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from langcell.batch import MicroBatch
from langcell.objective.cached import turns, views_of
from langcell.objective.gather import sum_over_ranks
from langcell.objective.lanes import Lanes


def run_step(
    engine: DeepSpeedEngine,
    lanes: Lanes,
    batches: list[MicroBatch],
    step: int,
    *,
    learn: bool = True,
    before_update: Callable[[dict[str, Tensor]], None] | None = None,
) -> dict[str, Tensor]:
    """One optimiser step (with `learn`; else the losses alone); this rank's share of each loss, detached.

    engine: around a `Stage`; batches: of the owned lanes, in order; step: the global step; before_update:
    called with what is returned when all gradients are there and the weights not moved yet. Beside the losses
    `empty`: the CTM draws of all lanes that found no partner, the same on every rank; `work`; and in stage 2
    `drawn`: joinid of each of this rank's cells that start pairs and the row of its hard text (int64 [N, 2]).
    """

    def update(shares: dict[str, Tensor]) -> None:
        if before_update is not None:
            before_update(shares)
        engine.step()

    if lanes.each == 1:
        with torch.set_grad_enabled(learn):
            shares = engine(batches[0], step)
        told = {name: share.detach() for name, share in shares.items()}
        if learn:
            engine.backward(shares["total"])
            update(told)
        return told

    stage = engine.module
    with torch.no_grad():
        looks = [engine(batches[place], step, look=lanes.owned[place]) for place, _ in lanes.runs]
        genes = torch.tensor(
            float(sum(stage.mask(batch, step).index_M.numel() for batch in batches)),
            device=batches[0].cells.tokens_T.device,
        )
    views = views_of(looks[: len(batches)])
    with torch.enable_grad():
        compared = stage.compare(views, batches, lanes, step)
        taken = turns(views, compared, stage.weights, sum_over_ranks(genes).clamp(min=1), lanes)
    summed = {name: share.detach() for name, share in compared.told.items()}
    for run, ((place, _), turn) in enumerate(zip(lanes.runs, taken, strict=True), 1):
        with torch.set_grad_enabled(learn):
            shares = engine(batches[place], step, turn=turn)
        for name, share in shares.items():
            if name != "total":
                summed[name] = summed.get(name, 0) + share.detach()
        if learn:
            engine.backward(shares["total"])
            if run == len(taken):
                update(summed)
            else:
                engine.step()
    return summed
