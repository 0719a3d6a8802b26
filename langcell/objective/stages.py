"""The two stages: one forward that returns a dict of losses.

Stage 1 (cells only) is MGM + C-C; stage 2 adds C-T and CTM. Every loss is a sum over the *global*
batch divided by the *global* count, returned as this lane's share: the shares of all lanes add up
to the loss. `total` is scaled so that DeepSpeed's averaging over ranks and lanes gives exactly the
gradient of that sum: two ranks of B cells, or two lanes of one rank, equal one rank of 2B.

Which pass feeds which loss: the first unmasked pass gives z_c to C-C (rows), C-T and CTM; a masked
pass feeds MGM; C-C's columns come from a second unmasked pass (`mgm_view: own`, three passes) or
from the masked one (`shared`, two passes).

A rank of one lane needs one forward; of several (gradient accumulation) see `cached`.

Shape suffixes: B the lane's cells, T tokens, Z joint space, H text width, N rows of the text table, K
distinct texts, R rows of the lanes whose views these are, C counts of work.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from langcell.batch import MicroBatch, TextTable
from langcell.model.flops import count_work
from langcell.model.langcell import LangCell
from langcell.objective.cached import Turn
from langcell.objective.contrastive import Temperature
from langcell.objective.draws import key
from langcell.objective.gather import sum_over_ranks, world
from langcell.objective.global_batch import Compared, Views, compare
from langcell.objective.lanes import Lanes
from langcell.objective.masked_gene import Masked, gene_loss, mask_genes
from langcell.objective.matching import DistinctPairs, Pairs, distinct_pairs, matching_loss
from langcell.objective.options import ObjectiveOptions

TEXT_MODULES = ("text_bert", "text_proj", "ctm_head")
LOSSES = {1: ("mgm", "cc"), 2: ("mgm", "cc", "ct", "ctm")}
DROPOUT = 21  # purpose of the seeds
FIRST, SECOND, MASKED, TEXT, MATCHING = range(5)  # passes, each with a seed of its own


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

    def forward(
        self, batch: MicroBatch, step: int, *, look: int | None = None, turn: Turn | None = None
    ) -> dict[str, Tensor]:
        """This lane's share of each loss, and `total`, the scalar to run backward on.

        step: the global step, which runs on through both stages. With one lane a rank nothing else is
        given. With several, `look` names the lane whose views are asked for (`cached.views_of` reads the
        result, meant to be made without gradient), and `turn` what came of comparing them: then `mgm` and
        `ctm` alone are told, weighted, and `total` holds all losses.

        Beside the losses: `empty` and `drawn` as `Compared.told` gives them (one lane a rank), and `work`,
        the lane's counts as `model.flops.count_work` gives them.
        """
        if look is not None:
            return self._look(batch, step, look)
        if turn is not None:
            return self._turn(batch, step, turn)
        rank, ranks = world()
        masked = self.mask(batch, step)
        states_TW, masked_TW, views = self._passes(batch, step, rank, masked)
        compared = self.compare(views, [batch], Lanes.here(), step)
        genes = sum_over_ranks(views.tau_1.new_tensor(float(masked.index_M.numel()))).clamp(min=1)
        shares = {"mgm": self._genes(masked_TW, masked) / genes, **compared.shares}
        pairs = self._pairs(compared.pairs, rank, len(batch))
        if pairs is not None:
            shares["ctm"] = self._match(batch, step, rank, states_TW, pairs)
        total = torch.stack([self.weights[name] * share for name, share in shares.items()]).sum()
        return {**compared.told, **shares, "work": self._work(batch, masked, pairs), "total": total * ranks}

    def mask(self, batch: MicroBatch, step: int) -> Masked:
        """The lane's cells with masked genes, the same whenever they are asked for."""
        return mask_genes(
            batch.cells,
            batch.soma_joinid_B,
            ratio=self.options.mask_ratio,
            seed=self.seed,
            step=step,
            cls=self.cls,
        )

    def compare(self, views: Views, batches: list[MicroBatch], lanes: Lanes, step: int) -> Compared:
        """The losses over all lanes, from the views of this rank's (`global_batch.compare`)."""
        return compare(views, batches, lanes, self.options, self.texts.related_CC, seed=self.seed, step=step)

    def _look(self, batch: MicroBatch, step: int, lane: int) -> dict[str, Tensor]:
        masked = self.mask(batch, step) if self.options.mgm_view == "shared" else None
        return vars(self._passes(batch, step, lane, masked)[2])

    def _turn(self, batch: MicroBatch, step: int, turn: Turn) -> dict[str, Tensor]:
        masked = self.mask(batch, step)
        states_TW, masked_TW, views = self._passes(batch, step, turn.lane, masked)
        shares = {"mgm": self._genes(masked_TW, masked) / turn.genes}
        pairs = self._pairs(turn.pairs, turn.lane, len(batch))
        if pairs is not None:
            shares["ctm"] = self._match(batch, step, turn.lane, states_TW, pairs)
        shares = {name: turn.weight * share for name, share in shares.items()}
        parts = [self.weights[name] * share for name, share in shares.items()]
        for name, view in vars(views).items():
            if view is not None:
                parts.append(turn.weight * (view * getattr(turn.gradients, name)).sum())
        work_C = turn.weight * self._work(batch, masked, pairs)
        return {**shares, "work": work_C, "total": torch.stack(parts).sum() * turn.scale}

    def _passes(
        self, batch: MicroBatch, step: int, lane: int, masked: Masked | None
    ) -> tuple[Tensor, Tensor | None, Views]:
        """States of the first pass and of the masked one (if there is one), and the lane's views."""
        model, cells = self.model, batch.cells
        self._seed(step, lane, FIRST)
        states_TW = model.cell_states(cells)
        masked_TW = None
        if masked is not None:
            self._seed(step, lane, MASKED)
            masked_TW = model.cell_states(masked.cells)
        if self.options.mgm_view == "shared":
            assert masked_TW is not None
            second_TW = masked_TW
        else:
            self._seed(step, lane, SECOND)
            second_TW = model.cell_states(cells)
        views = Views(
            first_RZ=model.project_cells(states_TW, cells),
            second_RZ=model.project_cells(second_TW, cells),
            text_RZ=self._texts(batch, step, lane) if self.stage == 2 else None,
            tau_1=self.temperature(states_TW.device),
        )
        return states_TW, masked_TW, views

    def _texts(self, batch: MicroBatch, step: int, lane: int) -> Tensor:
        """z_t of each cell's drawn text [B, Z]; a distinct text is encoded once."""
        row_K, index_B = batch.distinct_texts
        if self.text_locked:
            assert self.pooled_NH is not None, "pool_table() comes before the first step"
            return self.model.project_pooled(self.pooled_NH[row_K])[index_B]
        self._seed(step, lane, TEXT)
        return self.model.project_texts(self.texts.packed.select(row_K))[index_B]

    def _genes(self, masked_TW: Tensor | None, masked: Masked) -> Tensor:
        assert masked_TW is not None
        return gene_loss(self.model.gene_head, masked_TW, masked, self.options.mgm_chunk)

    def _pairs(self, pairs: Pairs | None, lane: int, count: int) -> DistinctPairs | None:
        """Those of a lane of `count` cells, each once."""
        if pairs is None:
            return None
        return distinct_pairs(pairs.of_rows(lane * count, count), len(self.texts.packed))

    def _match(
        self, batch: MicroBatch, step: int, lane: int, states_TW: Tensor, pairs: DistinctPairs
    ) -> Tensor:
        self._seed(step, lane, MATCHING)
        return matching_loss(self.model, states_TW, batch.cells, pairs, self.texts)

    @torch.no_grad()
    def _work(self, batch: MicroBatch, masked: Masked, pairs: DistinctPairs | None) -> Tensor:
        passes = 2 if self.options.mgm_view == "shared" else 3
        lengths_N, reads_texts = self.texts.packed.lengths_B, self.stage == 2 and not self.text_locked
        return count_work(
            batch.cells.lengths_B,
            masked.index_M.numel(),
            passes,
            lengths_N[batch.distinct_texts[0]] if reads_texts else None,
            None if pairs is None else lengths_N[pairs.text_row_U],
            None if pairs is None else pairs.cell_U,
        )

    def _seed(self, step: int, lane: int, which: int) -> None:
        """Seed the dropout of one pass by (seed, step, lane, pass), so that a pass can be repeated."""
        if self.training:
            torch.manual_seed(key(self.seed, step, DROPOUT, lane, which))
