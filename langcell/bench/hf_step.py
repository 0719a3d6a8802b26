"""The straightforward step with Hugging Face's BERT: what ours is measured against.

The same parameters, masks and mined pairs, and the same losses, written as one would without thinking of
cost: cells and texts padded to the longest and masked by `attention_mask` (transformers' SDPA), one text a
cell, logits over the whole vocabulary at every position with `ignore_index`, and for every (cell, text) pair
the states of its cell once more, from which each layer projects keys and values. Each saving of the real
step can be switched on alone (`Savings`); that of the shared view is `objective.mgm_view`. What is compared
with what, and the pairs, are the stage's own (`Stage.compare`): 1e-4 of the work.

One rank, text layers trained, `cls` pooling.

Shape suffixes: B cells, T their tokens, N rows of states (T packed, or B x L padded to L), P pairs, U those
that are run, K texts, R tokens of the texts, M masked positions, W, H hidden widths, Z joint space.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, BertModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.bert.modeling_bert import BertCrossAttention

from langcell.batch import MicroBatch, Packed
from langcell.model.flops import Work, count_work
from langcell.model.langcell import MATCH
from langcell.model.packed import encode
from langcell.objective.global_batch import Views
from langcell.objective.lanes import Lanes
from langcell.objective.masked_gene import Masked
from langcell.objective.matching import DistinctPairs, Pairs, distinct_pairs
from langcell.objective.stages import Stage

SHARED_KEYS = "langcell_bench_shared_keys"
IGNORED = -100


@dataclass(frozen=True)
class Savings:
    """What of the real step is taken over.

    packing: no padding, of cells and of texts; masked: logits at masked positions only; keys: keys and
    values projected once a cell; texts: one encoding a distinct text, and a distinct pair.
    """

    packing: bool = False
    masked: bool = False
    keys: bool = False
    texts: bool = False


NONE = Savings()
ALL = Savings(packing=True, masked=True, keys=True, texts=True)


def _shared_keys(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA; where keys stand once a cell, each pair is given those of its cell."""
    cell_U = options.pop("cell_U", None)
    if cell_U is not None and isinstance(module, BertCrossAttention):
        key, value = key[cell_U], value[cell_U]
    out: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
    return out, None


AttentionInterface.register(SHARED_KEYS, _shared_keys)
AttentionMaskInterface.register(SHARED_KEYS, sdpa_mask)


@dataclass(frozen=True)
class States:
    """states_NW of sequences, and slot_T, the row of each of their tokens; mask_BL where they are padded."""

    states_NW: Tensor
    slot_T: Tensor
    mask_BL: Tensor | None


class HfStep(nn.Module):
    """The losses of `stage`, computed in the straightforward way; takes over its model.

    Called like a `Stage`: (batch, global step) -> the losses, and `total` to run backward on.
    """

    def __init__(self, stage: Stage, savings: Savings = NONE) -> None:
        super().__init__()
        if stage.text_locked or stage.model.pooling != "cls":
            raise ValueError("the straightforward step trains all text layers and pools by `cls`")
        self.stage, self.savings = stage, savings
        if not savings.packing:
            for bert in (stage.model.cell_bert, stage.model.text_bert):
                bert.config._attn_implementation = SHARED_KEYS if savings.keys else "sdpa"

    def forward(self, batch: MicroBatch, step: int) -> dict[str, Tensor]:
        stage, model, cells = self.stage, self.stage.model, batch.cells
        states = self._encode(model.cell_bert, cells)
        masked = stage.mask(batch, step)
        corrupted = self._encode(model.cell_bert, masked.cells)
        shared = stage.options.mgm_view == "shared"
        second = corrupted if shared else self._encode(model.cell_bert, cells)
        views = Views(
            first_RZ=self._project(states, cells),
            second_RZ=self._project(second, cells),
            text_RZ=self._texts(batch) if stage.stage == 2 else None,
            tau_1=stage.temperature(cells.tokens_T.device),
        )
        compared = stage.compare(views, [batch], Lanes.here(), step)
        losses = {"mgm": self._genes(corrupted, masked), **compared.shares}
        if compared.pairs is not None:
            losses["ctm"] = self._match(states, cells, compared.pairs)
        total = torch.stack([stage.weights[name] * loss for name, loss in losses.items()]).sum()
        return {**losses, "total": total}

    def _encode(self, bert: BertModel, packed: Packed) -> States:
        if self.savings.packing:
            slot_T = torch.arange(packed.tokens_T.numel(), device=packed.tokens_T.device)
            return States(encode(bert, packed), slot_T, None)
        tokens_BL, mask_BL, slot_T = pad(packed)
        states_BLW = bert(input_ids=tokens_BL, attention_mask=mask_BL).last_hidden_state
        return States(states_BLW.flatten(0, 1), slot_T, mask_BL)

    def _project(self, states: States, cells: Packed) -> Tensor:
        first_BW = states.states_NW[states.slot_T[cells.starts_B]]
        return F.normalize(self.stage.model.cell_proj(first_BW).float(), dim=-1)

    def _genes(self, states: States, masked: Masked) -> Tensor:
        """Mean cross-entropy at the masked positions."""
        index_M = states.slot_T[masked.index_M]
        if self.savings.masked:
            return F.cross_entropy(self.stage.model.gene_head(states.states_NW[index_M]), masked.target_M)
        labels_N = torch.full_like(states.states_NW[:, 0], IGNORED, dtype=torch.int64)
        labels_N[index_M] = masked.target_M
        logits_NV = self.stage.model.gene_head(states.states_NW)
        return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED)

    def _texts(self, batch: MicroBatch) -> Tensor:
        """z_t of each cell's drawn text [B, Z]."""
        model = self.stage.model
        row_K, index_B = batch.text_row_B, torch.arange(len(batch), device=batch.text_row_B.device)
        if self.savings.texts:
            row_K, index_B = row_K.unique(return_inverse=True)
        texts = self.stage.texts.packed.select(row_K)
        states = self._encode(model.text_bert, texts)
        return model.project_pooled(states.states_NW[states.slot_T[texts.starts_B]])[index_B]

    def _match(self, states: States, cells: Packed, pairs: Pairs) -> Tensor:
        """Weighted sum of the pairs' cross-entropies."""
        texts = self.stage.texts.packed
        run = pairs_run(pairs, len(texts), self.savings)
        drawn = texts.select(run.text_row_U)
        if self.savings.packing:
            logits_U2 = self._match_packed(states, cells, drawn, run.cell_U)
        else:
            logits_U2 = self._match_padded(states, drawn, run.cell_U)
        return -(F.log_softmax(logits_U2.float(), dim=1) * run.weight_U2).sum()

    def _match_packed(self, states: States, cells: Packed, texts: Packed, cell_U: Tensor) -> Tensor:
        states_TW = states.states_NW
        if not self.savings.keys:
            cells, states_TW = cells.select_with(cell_U, states_TW)
            cell_U = torch.arange(len(cell_U), device=cell_U.device)
        return self.stage.model.match(states_TW, cells, texts, cell_U)

    def _match_padded(self, states: States, texts: Packed, cell_U: Tensor) -> Tensor:
        model, shared = self.stage.model, self.savings.keys
        assert states.mask_BL is not None
        context_BLW, mask_UL = states.states_NW.unflatten(0, states.mask_BL.shape), states.mask_BL[cell_U]
        tokens_UR, text_mask_UR, _ = pad(texts)
        states_URH = model.text_bert(
            input_ids=tokens_UR,
            attention_mask=text_mask_UR,
            encoder_hidden_states=context_BLW if shared else context_BLW[cell_U],
            # transformers makes no mask of U rows for keys of B cells; four axes are taken as they are.
            encoder_attention_mask=mask_UL[:, None, None] if shared else mask_UL,
            **({"cell_U": cell_U} if shared else {}),
        ).last_hidden_state
        return model.ctm_head(states_URH[:, 0])


def pad(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, L] padded with 0, their mask (bool), and the place of each token in the B x L (int64)."""
    shape = (len(packed), packed.max_seqlen)
    slot_T = packed.sequence_T * packed.max_seqlen + packed.position_T
    tokens_N = packed.tokens_T.new_zeros(shape[0] * shape[1])
    mask_N = torch.zeros_like(tokens_N, dtype=torch.bool)
    tokens_N[slot_T], mask_N[slot_T] = packed.tokens_T, True
    return tokens_N.view(shape), mask_N.view(shape), slot_T


def pairs_run(pairs: Pairs, n_texts: int, savings: Savings) -> DistinctPairs:
    """What g2 is run on: every pair, or every distinct one with the weights of all that are it."""
    if savings.texts:
        return distinct_pairs(pairs, n_texts)
    order_P = (pairs.cell_P * n_texts + pairs.text_row_P).argsort(stable=True)
    answer_P = torch.where(pairs.match_P, MATCH, 1 - MATCH)[order_P]
    weight_P2 = F.one_hot(answer_P, 2) * pairs.weight_P[order_P, None]
    return DistinctPairs(pairs.cell_P[order_P], pairs.text_row_P[order_P], weight_P2)


def work_of(stage: Stage, batch: MicroBatch, masked: Masked, pairs: Pairs | None, savings: Savings) -> Work:
    """What a step with these savings computes; with `ALL`, what the real step does."""
    passes = 2 if stage.options.mgm_view == "shared" else 3
    cell_B = _lengths(batch.cells, savings)
    genes = masked.index_M.numel() if savings.masked else int(cell_B.sum())
    if pairs is None:
        return Work(*count_work(cell_B, genes, passes).tolist())
    texts = stage.texts.packed
    run = pairs_run(pairs, len(texts), savings)
    row_K = batch.text_row_B.unique() if savings.texts else batch.text_row_B
    text_K, pair_U = (_lengths(texts.select(row), savings) for row in (row_K, run.text_row_U))
    work = Work(*count_work(cell_B, genes, passes, text_K, pair_U, run.cell_U).tolist())
    return work if savings.keys else replace(work, keys=float(cell_B[run.cell_U].sum()))


def _lengths(packed: Packed, savings: Savings) -> Tensor:
    lengths_B = packed.lengths_B.long()
    return lengths_B if savings.packing else torch.full_like(lengths_B, packed.max_seqlen)
