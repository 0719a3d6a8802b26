"""Zero-shot annotation: which of the candidate texts is true of a cell.

Contrast is one product of embeddings and matching one pass of the text encoder *per pair*
(about 33 ms on a laptop core at 64 tokens), so a cell is matched with its `top_k` candidates by
contrast only:

    logits1 = softmax over the candidates of z_c . z_t / tau
    logits2 = softmax over the top k of P(match)
    answer  = the largest a * logits1 + (1 - a) * logits2 among the top k

At k = N this is the released form of LangCell. Every other cost is paid once: texts are encoded
once in all, a cell once however many questions are asked about it, and a (cell, text) pair that
several questions share is matched once. Of a cell of the Census's length (1,300 tokens; 6 layers of 256,
MiniLM-size text) the states cost 0.21 s on a core and five pairs 0.13 s, over half of it attention at its
kernel's rate: forwards of 1,024 to 16,384 tokens take the same to 10%.

Shape suffixes: N cells, C candidates of a question, K texts, T tokens, D hidden width, P width of
the joint space (of z) or pairs (of indices and logits), B cells of one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from langcell.batch import Packed
from langcell.inference.embed import batches, inferring, project_texts, spans

if TYPE_CHECKING:
    from langcell.model.langcell import LangCell


@dataclass(frozen=True)
class Question:
    """Which of these candidates is true of each of these cells?

    rows_N: int64, ascending, indices of cells; columns_C: int64, indices of texts.
    """

    rows_N: Tensor
    columns_C: Tensor


@dataclass(frozen=True)
class Scores:
    """Scores of the candidates of each cell, float32 on the CPU; the largest of a row is the answer.

    z_NP: the cells' embeddings, of unit length. ct_NC: logits1, rows sum to 1. match_NC: logits2, whose rows
    sum to 1 over the top k; 0 for a pruned candidate. p_NC: P(match) of the top k, 0 for a pruned one.
    two_step_NC: in [0, 1] for the top k; a pruned candidate has log(logits1) <= 0 instead, so that it ranks
    below every matched one and pruned ones keep their order down to the smallest probability. None where
    matching was not asked for.
    """

    z_NP: Tensor
    ct_NC: Tensor
    match_NC: Tensor | None
    p_NC: Tensor | None
    two_step_NC: Tensor | None


def zero_shot(
    model: LangCell,
    cells: Packed,
    texts: Packed,
    *,
    tau: float,
    a: float | None,
    top_k: int,
    batch_tokens: int,
    z_KP: Tensor | None = None,
) -> Scores:
    """Scores of every text for every cell.

    texts: the candidates, tokenised. z_KP: their embeddings (`embed.project_texts`) where they are known
    already, so that they are encoded once for any number of calls. tau: temperature of the contrast. a:
    weight of the contrast among the `top_k` candidates that are matched (0.1 in the released code); None:
    contrast alone. batch_tokens: most cell tokens, and most text tokens of matched pairs, of one forward.
    """
    everything = Question(torch.arange(len(cells)), torch.arange(len(texts)))
    return answer(
        model, cells, texts, [everything], tau=tau, a=a, top_k=top_k, batch_tokens=batch_tokens, z_KP=z_KP
    )[0]


def answer(
    model: LangCell,
    cells: Packed,
    texts: Packed,
    questions: Sequence[Question],
    *,
    tau: float,
    a: float | None,
    top_k: int,
    batch_tokens: int,
    z_KP: Tensor | None = None,
) -> list[Scores]:
    """As `zero_shot`, for several questions about the same cells and texts: one `Scores` a question."""
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    found: list[list[Scores]] = [[] for _ in questions]
    with inferring(model) as device:
        z_KP = project_texts(model, texts, batch_tokens) if z_KP is None else z_KP.to(device)
        texts = texts.to(device)
        for first, batch in batches(cells, batch_tokens):
            batch = batch.to(device)
            states_TD = model.cell_states(batch)
            z_BP = model.project_cells(states_TD, batch).float()
            logit_BK = z_BP @ z_KP.T / tau
            match_BK = torch.zeros_like(logit_BK, dtype=torch.bool)
            asked = []
            for question in questions:
                inside = (question.rows_N >= first) & (question.rows_N < first + len(batch))
                rows = (question.rows_N[inside] - first).to(device)
                columns = question.columns_C.to(device)
                logit_NC = logit_BK[rows[:, None], columns]
                top_NC = _top(logit_NC, top_k)
                match_BK[rows[:, None], columns] |= top_NC
                asked.append((rows, columns, logit_NC, top_NC))
            if a is not None:
                p_BK = _p_match(model, states_TD, batch, texts, match_BK, batch_tokens)
            for parts, (rows, columns, logit_NC, top_NC) in zip(found, asked, strict=True):
                p_NC = None if a is None else p_BK[rows[:, None], columns]
                parts.append(_scores(z_BP[rows], logit_NC, p_NC, top_NC, a))
    width = z_KP.shape[1]
    return [
        _joined(parts, width, len(question.columns_C), a)
        for parts, question in zip(found, questions, strict=True)
    ]


def _top(logit_NC: Tensor, k: int) -> Tensor:
    """Where the k largest of each row stand (bool); of equal ones the first."""
    order_NC = logit_NC.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(logit_NC, dtype=torch.bool).scatter_(1, order_NC[:, :k], True)


def _p_match(
    model: LangCell, states_TD: Tensor, cells: Packed, texts: Packed, match_BK: Tensor, batch_tokens: int
) -> Tensor:
    """P(match) of the pairs marked in `match_BK` (0 elsewhere), `batch_tokens` text tokens at a time.

    A forward gets the states of its own cells only, since their keys and values are projected anew.
    """
    p_BK = torch.zeros(match_BK.shape, device=match_BK.device)
    cell_P, text_P = match_BK.nonzero(as_tuple=True)  # row by row, so sorted by cell
    tokens_T = cells.with_tokens(torch.arange(cells.tokens_T.numel(), device=cells.tokens_T.device))
    for start, stop in spans(texts.lengths_B[text_P].cpu().numpy(), batch_tokens):
        cell, text = cell_P[start:stop], text_P[start:stop]
        own, cell_of_pair = torch.unique_consecutive(cell, return_inverse=True)
        states = states_TD[tokens_T.select(own).tokens_T]
        logits_P2 = model.match(states, cells.select(own), texts.select(text), cell_of_pair)
        p_BK[cell, text] = logits_P2.float().softmax(1)[:, 1]
    return p_BK


def _scores(z_NP: Tensor, logit_NC: Tensor, p_NC: Tensor | None, top_NC: Tensor, a: float | None) -> Scores:
    """`Scores` from embeddings, contrast, P(match) and where the top k stand."""
    ct_NC = logit_NC.softmax(1)
    if p_NC is None or a is None:
        return Scores(z_NP.cpu(), ct_NC.cpu(), None, None, None)
    match_NC = p_NC.masked_fill(~top_NC, -torch.inf).softmax(1)
    two_step_NC = torch.where(top_NC, a * ct_NC + (1 - a) * match_NC, logit_NC.log_softmax(1))
    p_NC = p_NC.masked_fill(~top_NC, 0.0)
    return Scores(*(each.cpu() for each in (z_NP, ct_NC, match_NC, p_NC, two_step_NC)))


def _joined(parts: list[Scores], width: int, candidates: int, a: float | None) -> Scores:
    """The scores of all batches, one after the other; no rows where there were none."""
    nothing = torch.empty(0, candidates)
    second = None if a is None else nothing
    parts = [Scores(torch.empty(0, width), nothing, second, second, second), *parts]

    def join(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    if a is None:
        return Scores(join("z_NP"), join("ct_NC"), None, None, None)
    return Scores(*(join(name) for name in ("z_NP", "ct_NC", "match_NC", "p_NC", "two_step_NC")))
