"""Cached gradients: a contrast over all lanes where a rank cannot keep the activations of its own.

Every lane's contrast needs the views of all. So they are made without gradient first (`Stage.forward` with
`look`), compared once (`global_batch.compare`), and then each lane runs its one forward and backward with the
gradients of the contrast with respect to its views given (`Turn`): the chain rule, cut at the views (Gao et
al. 2021, "GradCache"). Exact, because dropout is seeded anew before every pass. Two of three cell passes run
once more without gradient, a quarter more work (with the shared view both of two, a third more).

Shape suffixes: R rows of a rank's lanes, Z joint space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from langcell.objective.global_batch import Compared, Views
from langcell.objective.lanes import Lanes
from langcell.objective.matching import Pairs


@dataclass(frozen=True)
class Turn:
    """One lane's forward in a step of several. lane; weight: 0 where a lane is run again only to keep the
    ranks abreast; scale: of `total`; genes: masked genes of all lanes (float32 scalar); gradients: of the
    weighted contrast with respect to the lane's views; pairs: of all lanes that this rank knows of."""

    lane: int
    weight: float
    scale: float
    genes: Tensor
    gradients: Views
    pairs: Pairs | None


def views_of(looks: list[dict[str, Tensor | None]]) -> Views:
    """The views of a rank's lanes from what `look` returned of each, as leaves of a graph of their own."""

    def joined(name: str) -> Tensor | None:
        parts = [look[name] for look in looks if look[name] is not None]
        return torch.cat(parts).detach().requires_grad_() if parts else None  # type: ignore[arg-type]

    first_RZ, second_RZ = joined("first_RZ"), joined("second_RZ")
    assert first_RZ is not None
    assert second_RZ is not None
    tau_1 = looks[0]["tau_1"]
    assert tau_1 is not None
    return Views(first_RZ, second_RZ, joined("text_RZ"), tau_1.detach().requires_grad_())


def turns(
    views: Views, compared: Compared, weights: dict[str, float], genes: Tensor, lanes: Lanes
) -> list[Turn]:
    """What each lane that this rank runs is given for its turn.

    views: of the owned lanes (`views_of`), from which `compared` was made; weights: of the losses; genes:
    masked genes of all lanes.
    """
    count = len(views.first_RZ) // len(lanes.owned)
    contrast = torch.stack([weights[name] * share for name, share in compared.shares.items()]).sum()
    names = [name for name, view in vars(views).items() if view is not None]
    found = torch.autograd.grad(contrast, [getattr(views, name) for name in names])
    gradient = dict(zip(names, found, strict=True))

    def of_lane(place: int) -> Views:
        def rows(name: str) -> Tensor | None:
            whole = gradient.get(name)
            return None if whole is None else whole[place * count : (place + 1) * count]

        first_RZ, second_RZ = rows("first_RZ"), rows("second_RZ")
        assert first_RZ is not None
        assert second_RZ is not None
        tau_1 = gradient["tau_1"] if place == 0 else None  # the temperature is one for all lanes
        return Views(
            first_RZ, second_RZ, rows("text_RZ"), torch.zeros_like(views.tau_1) if tau_1 is None else tau_1
        )

    scale = lanes.ranks * lanes.each
    return [
        Turn(lanes.owned[place], weight, scale, genes, of_lane(place), compared.pairs)
        for place, weight in lanes.runs
    ]
