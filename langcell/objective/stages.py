"""The two stages: one forward that returns a dict of losses.

Stage 1 (cells only) is MGM + C-C; stage 2 adds C-T and CTM. Every loss is a sum over the *global*
batch divided by the *global* count, returned as this rank's share: the shares of all ranks add up
to the loss. `total` is scaled by the world size, so that DeepSpeed's averaging over ranks gives
exactly the gradient of that sum, and two ranks of B cells equal one rank of 2B.

Which pass feeds which loss: the first unmasked pass gives z_c to C-C (rows), C-T and CTM; a masked
pass feeds MGM; C-C's columns come from a second unmasked pass (`mgm_view: own`, three passes) or
from the masked one (`shared`, two passes).

Shape suffixes: B the lane's cells, G all lanes', T tokens, Z joint space, H text width, N rows of
the text table.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from langcell.batch import MicroBatch, TextTable
from langcell.model.langcell import LangCell
from langcell.objective.contrastive import Temperature, cell_cell, cell_text
from langcell.objective.gather import gather_rows, sum_over_ranks, world
from langcell.objective.masked_gene import gene_loss, mask_genes
from langcell.objective.matching import local_pairs, matching_loss
from langcell.objective.negatives import Relations, Rows, initiators, mine_pairs, relations
from langcell.objective.options import ObjectiveOptions

TEXT_MODULES = ("text_bert", "text_proj", "ctm_head")
LOSSES = {1: ("mgm", "cc"), 2: ("mgm", "cc", "ct", "ctm")}


class Stage(nn.Module):
    """The module that the engine runs: a LangCell, its objective, and what of it is frozen.

    stage: 1 or 2; texts: the corpus's text table (stage 2); cls: token id of `<cls>`;
    text_train: `all` or `projection`. Where text layers are locked, `pooled_NH` must hold the
    unimodal states of the whole text table (`pool_table`), computed before the first step.
    """

    pooled_NH: Tensor | None

    def __init__(
        self,
        model: LangCell,
        options: ObjectiveOptions,
        *,
        stage: int,
        cls: int,
        seed: int,
        text_train: str,
        texts: TextTable,
    ) -> None:
        super().__init__()
        self.model = model
        self.options = options
        self.stage, self.cls, self.seed = stage, cls, seed
        self.texts = texts
        self.weights = {name: getattr(options, f"w_{name}") for name in LOSSES[stage]}
        self.temperature = Temperature(options.tau, options.tau_learnt)
        self.register_buffer("pooled_NH", None, persistent=False)
        for name, parameter in model.named_parameters():
            module = name.split(".")[0]
            locked = text_train == "projection" and module == "text_bert" and "crossattention" not in name
            parameter.requires_grad_(not (locked or (stage == 1 and module in TEXT_MODULES)))
        self.text_locked = text_train == "projection"

    @torch.no_grad()
    def pool_table(self, chunk: int = 64) -> None:
        """Compute the locked unimodal states of every text, `chunk` texts a call, on every rank alike."""
        packed = self.texts.packed
        row_N = torch.arange(len(packed), device=packed.tokens_T.device)
        was_training = self.model.training
        self.model.eval()
        self.pooled_NH = torch.cat(
            [self.model.pool_texts(packed.select(row_K)) for row_K in row_N.split(chunk)]
        )
        self.model.train(was_training)

    def forward(self, batch: MicroBatch, step: int) -> dict[str, Tensor]:
        """This rank's share of each loss, and `total`, the scalar to run backward on.

        step: the global step, which runs on through both stages.
        """
        model, options, cells = self.model, self.options, batch.cells
        rank, ranks = world()
        tau = self.temperature(cells.tokens_T.device)
        row_B = torch.arange(len(batch), device=cells.tokens_T.device) + rank * len(batch)

        states_TW = model.cell_states(cells)
        z_BZ = model.project_cells(states_TW, cells)
        masked = mask_genes(
            cells, batch.soma_joinid_B, ratio=options.mask_ratio, seed=self.seed, step=step, cls=self.cls
        )
        masked_TW = model.cell_states(masked.cells)
        shares = {"mgm": gene_loss(model.gene_head, masked_TW, masked)}
        genes = sum_over_ranks(torch.tensor(float(masked.index_M.numel()), device=z_BZ.device)).clamp(min=1)
        counts = {"mgm": genes}

        second_TW = masked_TW if options.mgm_view == "shared" else model.cell_states(cells)
        second_GZ = gather_rows(model.project_cells(second_TW, cells))
        shares["cc"] = cell_cell(z_BZ, second_GZ, row_B, tau)
        counts["cc"] = torch.tensor(float(len(second_GZ)), device=z_BZ.device)

        if self.stage == 2:
            rows = _gather_ids(batch)
            relation = relations(rows, self.texts.related_CC, options.preset == "paper")
            text_BZ = self._texts(batch)
            cells_GZ, texts_GZ = gather_rows(z_BZ), gather_rows(text_BZ)
            shares["ct"] = _both_ways(z_BZ, text_BZ, cells_GZ, texts_GZ, relation, row_B, tau)
            counts["ct"] = counts["cc"]

            initiator_N = initiators(rows.soma_joinid_G, ranks, options.ctm_cells, seed=self.seed, step=step)
            logits_GG = ((cells_GZ @ texts_GZ.T) / tau).detach()
            pairs = mine_pairs(
                logits_GG, relation, rows.soma_joinid_G, initiator_N, seed=self.seed, step=step
            )
            mine = local_pairs(pairs, rank * len(batch), len(batch))
            shares["ctm"] = matching_loss(model, states_TW, cells, mine, rows, self.texts)
            counts["ctm"] = pairs.weight_P.sum()

        shares = {name: share / counts[name] for name, share in shares.items()}
        total = torch.stack([self.weights[name] * share for name, share in shares.items()]).sum()
        return {**shares, "total": total * ranks}

    def _texts(self, batch: MicroBatch) -> Tensor:
        """z_t of each cell's drawn text [B, Z]; a distinct text is encoded once."""
        row_K, index_B = batch.text_row_B.unique(return_inverse=True)
        if self.text_locked:
            assert self.pooled_NH is not None, "pool_table() comes before the first step"
            return self.model.project_pooled(self.pooled_NH[row_K])[index_B]
        return self.model.project_texts(self.texts.packed.select(row_K))[index_B]


def _both_ways(
    z_BZ: Tensor,
    text_BZ: Tensor,
    cells_GZ: Tensor,
    texts_GZ: Tensor,
    relation: Relations,
    row_B: Tensor,
    tau: Tensor,
) -> Tensor:
    """C-T: the mean of cells against texts and texts against cells, summed over the local rows."""
    positive_GG, excluded_GG = relation.positive_GG, relation.excluded_GG
    to_text = cell_text(z_BZ, texts_GZ, positive_GG[row_B], excluded_GG[row_B], tau)
    to_cell = cell_text(text_BZ, cells_GZ, positive_GG.T[row_B], excluded_GG.T[row_B], tau)
    return (to_text + to_cell) / 2


def _gather_ids(batch: MicroBatch) -> Rows:
    ids_BI = torch.stack(
        [batch.soma_joinid_B, batch.text_id_B, batch.term_B, batch.text_row_B, batch.short_B.long()], dim=1
    )
    joinid_G, text_id_G, term_G, text_row_G, short_G = gather_rows(ids_BI).unbind(dim=1)
    return Rows(joinid_G, text_id_G, term_G, text_row_G, short_G.bool())
