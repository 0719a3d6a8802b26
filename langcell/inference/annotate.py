"""Cell types of an AnnData without labels, in scanpy's manner.

    langcell.annotate(adata, "runs/demo/export", ["B cell", "natural killer cell", "CL:0000624"])
    langcell.embed(adata, "runs/demo/export")

Counts become sentences under the model's own medians, chunk by chunk, so that a backed file of any size fits;
candidate texts are encoded once; each cell is read once and matched with its best candidates only. A cell is
called unassigned where its best score is too low, and where it has no count in the model's genes.

Shape suffixes: N cells, C candidates, P width of the joint space.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from langcell.batch import Packed
from langcell.errors import InputError
from langcell.inference.candidates import Candidate, of_term, read_candidates, read_file
from langcell.inference.counts import Counts
from langcell.inference.embed import embed_cells, project_texts, tokenize
from langcell.inference.options import AnnotateOptions
from langcell.inference.pretrained import Pretrained
from langcell.inference.roll_up import roll_up
from langcell.inference.scoring import Scores, zero_shot

if TYPE_CHECKING:
    from anndata import AnnData

UNASSIGNED = "unassigned"
EMBEDDING = "X_langcell"
KEY = "langcell"
COLUMNS = ("label", "id", "score", "runner_up", "logits1", "logits2", "rolled_up", "majority")
"""What columns of obs are called after their key."""


@dataclass(frozen=True)
class Calls:
    """What some cells were called.

    label, runner_up: int64 [N], index of the best candidate and of the second, -1 for unassigned; score: of
    the best, 0 to 1; logits1, logits2: contrast and matching of the best (`scoring.Scores`; NaN where nothing
    was matched); term: CL id of the deepest term that is sure enough, '' for none (object); z_NP: embeddings.
    Scores, logits and embeddings are float32.
    """

    label: np.ndarray
    runner_up: np.ndarray
    score: np.ndarray
    logits1: np.ndarray
    logits2: np.ndarray
    term: np.ndarray
    z_NP: np.ndarray

    @classmethod
    def gathered(cls, parts: Iterable[Calls], n: int) -> Calls:
        """The calls of n cells (one at least), part after part."""
        names = cls.__annotations__
        return cls(*gather((tuple(getattr(part, name) for name in names) for part in parts), n))


class Annotator:
    """A model that has read the candidates."""

    def __init__(self, model: Pretrained, candidates: Sequence[Candidate], options: AnnotateOptions) -> None:
        model.refuse_classifier()
        _check(options)
        self.model, self.candidates, self.options = model, list(candidates), options
        self.texts = tokenize(
            model.tokenizer, [one.text for one in self.candidates], model.text.max_length
        ).to(model.device)
        self.z_CP = project_texts(model.model, self.texts, options.batch_tokens)

    def __call__(self, cells: Packed) -> Calls:
        """Calls of some sentences."""
        options, rows = self.options, np.arange(len(cells))
        scores = zero_shot(
            self.model.model,
            cells,
            self.texts,
            tau=self.model.tau,
            # What would weigh nothing, or has nothing to choose from, costs nothing.
            a=options.a if options.a < 1 and options.top_k > 1 else None,
            top_k=options.top_k,
            batch_tokens=options.batch_tokens,
            z_KP=self.z_CP,
        )
        ct_NC = scores.ct_NC.numpy()
        if scores.match_NC is None or scores.two_step_NC is None:
            match_NC, ranked_NC = np.full_like(ct_NC, np.nan), ct_NC
        else:
            match_NC, ranked_NC = scores.match_NC.numpy(), scores.two_step_NC.numpy()
        order_NC = np.argsort(-ranked_NC, axis=1, kind="stable")
        best, second = order_NC[:, 0], order_NC[:, 1]
        # Of all candidates, the pruned ones with their contrast alone: rows sum to 1.
        share_NC = ct_NC if scores.match_NC is None else options.a * ct_NC + (1 - options.a) * match_NC
        score = share_NC[rows, best]
        silent = cells.lengths_B.cpu().numpy() < 2  # <cls> alone
        unsure = silent | (score < options.min_score)
        term = np.full(len(cells), "", object)
        if options.roll_up is not None:
            terms = [one.term for one in self.candidates]
            term = roll_up(_belief(scores, options.a), terms, self.model.ontology, options.roll_up)
            term[silent] = ""
        return Calls(
            label=np.where(unsure, -1, best),
            runner_up=np.where(silent, -1, second),
            score=np.where(silent, 0, score).astype(np.float32),
            logits1=ct_NC[rows, best],
            logits2=match_NC[rows, best],
            term=term,
            z_NP=scores.z_NP.numpy(),
        )


def choose(
    model: Pretrained,
    candidates: Iterable[str] | Mapping[str, str] | Path | None,
    tissue: Sequence[str],
) -> list[Candidate]:
    """The candidates asked for; None: the cell types that the model was trained on, of these tissues (all
    where none is named). A path is a file of candidates. Warns of free text, which a misspelt name is, too.
    Raises InputError (see `read_candidates`, `Pretrained.known_types`)."""
    tissue = [tissue] if isinstance(tissue, str) else tissue
    if candidates is not None:
        if tissue:
            raise InputError("tissue narrows the model's own cell types; it has no use beside candidates")
        if isinstance(candidates, str | Path):
            candidates = read_file(candidates)
        found = read_candidates(candidates, model.ontology)
        if any(one.label == UNASSIGNED for one in found):
            raise InputError(f"candidates: {UNASSIGNED!r} is what cells without an answer are called")
        warn_of_free_text(found, stacklevel=4)
        return found
    known = [model.ontology.get(term) for term in model.known_types(tissue)]
    if len(known) < 2:
        says = (
            f"was trained on {', '.join(term.label for term in known if term)} alone"
            if known
            else "does not say what cell types it was trained on"
        )
        raise InputError(f"candidates: {model.name} {says}{' there' * bool(tissue)}; name the candidates")
    return [of_term(term) for term in known if term is not None]


def warn_of_free_text(candidates: Sequence[Candidate], stacklevel: int = 2) -> None:
    """Warns of candidates that are free text, as a misspelt name is, too."""
    if free := [one.label for one in candidates if not one.term]:
        warnings.warn(
            "langcell: no name or id of the cell ontology, and so taken at their word, without a "
            f"definition: {', '.join(map(repr, free))}",
            stacklevel=stacklevel,
        )


def _check(options: AnnotateOptions) -> None:
    """Raises InputError for a value out of range."""
    shares = {name: getattr(options, name) for name in ("a", "min_score", "roll_up")}
    for name, value in shares.items():
        if value is not None and not 0 <= value <= 1:
            raise InputError(f"{name} is {value}; it must lie between 0 and 1")
    for name in ("top_k", "batch_tokens"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} is {getattr(options, name)}; it must be at least 1")


def _belief(scores: Scores, a: float) -> np.ndarray:
    """What roll-up gathers, float32 [N, C], rows sum to 1: contrast, and P(match) relative to the other
    candidates'. (logits2, a softmax of probabilities, is nearly flat: of five it gives a sure one 0.40.)"""
    if scores.p_NC is None:
        return scores.ct_NC.numpy()
    total_N1 = scores.p_NC.sum(1, keepdim=True).clamp(min=1e-9)
    return (a * scores.ct_NC + (1 - a) * scores.p_NC / total_N1).numpy()


def columns(
    calls: Calls, annotator: Annotator, cluster: pd.Series | None = None, key: str = KEY
) -> pd.DataFrame:
    """The columns of obs (`annotate`) for all cells, without an index of their own."""
    names = [one.label for one in annotator.candidates]
    terms = [one.term for one in annotator.candidates]
    found = {
        "label": _named(calls.label, names),
        "id": pd.Categorical.from_codes(*_codes(calls.label, terms)),
        "score": calls.score,
        "runner_up": _named(calls.runner_up, names),
        "logits1": calls.logits1,
        "logits2": calls.logits2,
    }
    if annotator.options.roll_up is not None:
        ontology = annotator.model.ontology
        label = {i: t.label for i in set(calls.term) if i and (t := ontology.get(i)) is not None}
        found["rolled_up"] = pd.Categorical([label.get(i, UNASSIGNED) for i in calls.term])
    table = pd.DataFrame({f"{key}_{name}": values for name, values in found.items()})
    if cluster is not None:
        table[f"{key}_majority"] = majority(table[f"{key}_label"], cluster)
    return table


def majority(label: pd.Series, cluster: pd.Series) -> pd.Categorical:
    """The most frequent label of each cell's cluster: of equally frequent ones the first in the alphabet,
    `unassigned` only where no cell of the cluster has a label or the cell has no cluster."""
    frame = pd.DataFrame({"label": label.astype(str).to_numpy(), "cluster": cluster.to_numpy()})
    votes = frame[frame["label"] != UNASSIGNED]
    counts = votes.groupby("cluster", observed=True)["label"].agg(lambda own: own.mode().iloc[0])
    return pd.Categorical(frame["cluster"].map(counts.to_dict()).fillna(UNASSIGNED).astype(str))


def annotate(
    adata: AnnData,
    model: Pretrained | str | Path,
    candidates: Iterable[str] | Mapping[str, str] | Path | None = None,
    *,
    tissue: Sequence[str] = (),
    cluster: str | None = None,
    layer: str | None = None,
    symbols: Mapping[str, str] | None = None,
    key: str = KEY,
    chunk: int = 512,
    progress: bool = True,
    **options: Any,
) -> None:
    """Name the cell type of every cell, in place.

    Args:
        adata: raw counts; genes by Ensembl ids or symbols; in memory or backed. Other medians, or another
            selection of cells, change no cell's sentence.
        model: a trained model, or its directory.
        candidates: names, CL ids or descriptions; label -> any of these; or the path of a file of them (one a
            line, or label, tab, candidate). None: the cell types that the model was trained on.
        tissue: with no candidates, those of these tissues alone (names or UBERON ids).
        cluster: column of obs; each of its clusters also votes (`KEY_majority`).
        layer: where the raw counts are: None: X; `raw`; or the name of a layer.
        symbols: Ensembl id of each gene symbol, where the model's own names do not suffice.
        key: what the columns begin with.
        chunk: cells that are held in memory as counts at a time.
        options: fields of `AnnotateOptions`: top_k, a, min_score, roll_up, batch_tokens.

    Writes obs[`KEY_label`], `KEY_id` (CL id), `KEY_score` (0 to 1), `KEY_runner_up`, `KEY_logits1`
    (contrast), `KEY_logits2` (matching), and with `roll_up` `KEY_rolled_up`; obsm["X_langcell"], float32 [N,
    P]; and uns[KEY], how it was done, by how many genes of the model among the rest. What an earlier call
    wrote is replaced. Raises InputError for counts, genes or candidates that cannot be used, for columns of
    these names that are somebody else's, and for a view of a backed file.
    """
    model = _load(model)
    if cluster is not None and cluster not in adata.obs:
        raise InputError(f"cluster: obs has no column {cluster}; it has {', '.join(adata.obs) or 'none'}")
    refuse_backed_view(adata)
    stale = earlier(adata.obs, adata.uns.get(key), key)
    annotator = Annotator(model, choose(model, candidates, tissue), AnnotateOptions(**options))
    counts = counts_of(adata, model, layer, symbols)
    parts = (annotator(sentences) for _, sentences in _bar(counts, chunk, progress))
    calls = Calls.gathered(parts, counts.n)
    table = columns(calls, annotator, None if cluster is None else adata.obs[cluster], key)
    adata.obs.drop(columns=stale, inplace=True)
    for name in table:
        adata.obs[name] = table[name].to_numpy() if table[name].dtype != "category" else table[name].array
    adata.obsm[EMBEDDING] = calls.z_NP
    adata.uns[key] = how(annotator) | {"genes": counts.genes, "naming": counts.naming}


def embed(
    adata: AnnData,
    model: Pretrained | str | Path,
    *,
    layer: str | None = None,
    symbols: Mapping[str, str] | None = None,
    chunk: int = 512,
    batch_tokens: int = AnnotateOptions().batch_tokens,
    progress: bool = True,
) -> None:
    """Write the joint-space embedding of every cell into obsm["X_langcell"] (float32 [N, P], unit length).

    Arguments and errors as of `annotate`.
    """
    model = _load(model)
    model.refuse_classifier()
    refuse_backed_view(adata)
    counts = counts_of(adata, model, layer, symbols)
    parts = _bar(counts, chunk, progress)
    (adata.obsm[EMBEDDING],) = gather(
        ((embed_cells(model.model, cells, batch_tokens).numpy(),) for _, cells in parts), counts.n
    )


def refuse_backed_view(adata: AnnData) -> None:
    """Raises InputError for what can be read and not be written to, before hours are spent on it."""
    if adata.isbacked and adata.is_view:
        raise InputError(
            "adata is a selection of a backed file, which anndata cannot write to: give adata.to_memory(), "
            "or the whole file"
        )


def earlier(obs: pd.DataFrame, made: Any, key: str) -> list[str]:
    """Columns of an earlier annotation, which those of another replace.

    made: uns[key], or None. Raises InputError where there is something else under these names.
    """
    stale = [f"{key}_{name}" for name in COLUMNS if f"{key}_{name}" in obs]
    ours = isinstance(made, Mapping) and "beta_hash" in made
    if not ours and (stale or made is not None):
        there = [f"obs[{name!r}]" for name in stale] + [f"uns[{key!r}]"] * (made is not None)
        raise InputError(
            f"{', '.join(there)} would be overwritten, and no record in uns[{key!r}] says that langcell "
            "wrote it. Take it out, or call langcell.annotate with another key"
        )
    return stale


def gather(parts: Iterable[tuple[np.ndarray, ...]], n: int) -> tuple[np.ndarray, ...]:
    """Arrays of n rows (one at least) from those of consecutive parts. Each part is copied to its place as it
    comes: of 200,000 embeddings of 256, 205 MB are held, and not twice that."""
    whole: tuple[np.ndarray, ...] = ()
    end = 0
    for part in parts:
        whole = whole or tuple(np.empty((n, *values.shape[1:]), values.dtype) for values in part)
        start, end = end, end + len(part[0])
        for gathered, values in zip(whole, part, strict=True):
            gathered[start:end] = values
    return whole


def counts_of(
    adata: AnnData, model: Pretrained, layer: str | None = None, symbols: Mapping[str, str] | None = None
) -> Counts:
    """The counts of `adata` under the vocabulary and medians of `model`. Raises InputError."""
    return Counts.of(
        adata,
        model.vocabulary,
        model.beta,
        organism=model.organism,
        max_length=model.max_length,
        layer=layer,
        symbols=None if symbols is None else dict(symbols),
    )


def how(annotator: Annotator) -> dict[str, Any]:
    """For `uns[KEY]`: model, its vocabulary and medians, candidates, options, in types that .h5ad holds."""
    model = annotator.model
    given = {name: value for name, value in asdict(annotator.options).items() if value is not None}
    return {
        "model": model.name,
        "beta_hash": model.beta.hash,
        "vocabulary_hash": model.vocabulary.hash,
        "candidates": np.array([one.label for one in annotator.candidates], object),
        "texts": np.array([one.text for one in annotator.candidates], object),
        "options": given,
    }


def _load(model: Pretrained | str | Path) -> Pretrained:
    return model if isinstance(model, Pretrained) else Pretrained.from_pretrained(model)


def _bar(counts: Counts, chunk: int, progress: bool) -> Iterable[tuple[int, Packed]]:
    total = -(-counts.n // chunk)
    return tqdm(counts.chunks(chunk), total=total, unit="chunk", disable=not progress or total < 2)


def _codes(index: np.ndarray, terms: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Codes and categories of the terms of some candidates; -1 for those without one."""
    ids = sorted({term for term in terms if term})
    code = np.array([ids.index(term) if term else -1 for term in terms] + [-1])
    return code[index], ids


def _named(index: np.ndarray, names: Sequence[str]) -> pd.Categorical:
    return pd.Categorical.from_codes(
        np.where(index < 0, len(names), index), [*names, UNASSIGNED]
    ).remove_unused_categories()
