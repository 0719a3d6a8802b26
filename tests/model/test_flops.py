"""The formula of a step's work against what PyTorch counts, operator by operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from langcell.batch import Packed
from langcell.model.flops import Work, count_work, mfu, peak_flops, step_flops
from langcell.model.langcell import LangCell
from tests.objective import toy

CELLS = [9, 5, 5, 12]
TEXTS = [6, 3, 8]
PAIR_TEXTS, CELL_OF_PAIR = [6, 3, 3, 8, 6], [0, 0, 1, 2, 3]
GENES = 7


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    return 2 * sdpa_flop_count(query, key, value)  # without the scores that the kernel computes again


# PyTorch knows no formula for its attention on CPUs.
MAPPING = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def packed(lengths: list[int]) -> Packed:
    return Packed.from_sequences([[2] * length for length in lengths])


def run(model: LangCell, cells: Packed, stage: int) -> torch.Tensor:
    """Three cell passes, and in stage 2 both roads of texts; a number that everything contributes to."""
    first, second, masked = (model.cell_states(cells) for _ in range(3))
    parts = [model.project_cells(first, cells), model.project_cells(second, cells)]
    parts.append(model.gene_head(masked[:GENES]))
    if stage == 2:
        if model.text_bert.embeddings.word_embeddings.weight.requires_grad:
            parts.append(model.project_texts(packed(TEXTS)))
        else:
            parts.append(model.project_pooled(torch.ones(len(TEXTS), 24)))
        parts.append(model.match(first, cells, packed(PAIR_TEXTS), torch.tensor(CELL_OF_PAIR)))
    return torch.stack([part.sum() for part in parts]).sum()


@pytest.mark.parametrize(("stage", "text_train"), [(1, "all"), (2, "all"), (2, "projection")])
def test_the_formula_counts_what_is_computed(stage: int, text_train: str) -> None:
    model = toy.stage(stage, text_train=text_train).model
    cells = packed(CELLS)
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as forward:
        total = run(model, cells, stage)
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as backward:
        total.backward()

    texts = (torch.tensor(TEXTS), torch.tensor(PAIR_TEXTS), torch.tensor(CELL_OF_PAIR)) if stage == 2 else ()
    counts = count_work(cells.lengths_B, GENES, 3, *texts)
    found = step_flops(
        Work(*counts.tolist()),
        model.cell_bert.config,
        model.text_bert.config,
        model.cell_proj.out_features,
        locked=text_train == "projection",
    )
    assert found.forward == forward.get_total_flops()
    assert found.backward == backward.get_total_flops()
    assert found.total == found.forward + found.backward


def test_the_work_of_two_lanes_is_their_sum() -> None:
    both = torch.tensor([3, 7, 5, 5])
    pairs, cell_of_pair = torch.tensor([4, 6, 2, 9]), torch.tensor([0, 1, 2, 2])
    lanes = [
        count_work(both[:2], 2, 3, pairs[:2], pairs[:2], cell_of_pair[:2]),
        count_work(both[2:], 5, 3, pairs[2:], pairs[2:], cell_of_pair[2:] - 2),
    ]
    whole = count_work(both, 7, 3, pairs, pairs, cell_of_pair)
    assert torch.equal(lanes[0] + lanes[1], whole)
    assert Work(*whole.tolist()).keys == 3 + 7 + 5


def test_peaks_are_found_by_name() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA GeForce RTX 3090") is None
    assert mfu(312e12, seconds=2.0, peak=312e12) == 0.5
