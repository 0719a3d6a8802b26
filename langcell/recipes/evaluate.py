"""What a trained model is good for: jobs/evaluate.py.

Seven parts, each of which can be left out, on one cohort of at most some thousand cells. Every figure stands
beside what needs no such model: chance and the best constant answer, logistic regression and principal
components of the same counts, the same head on a cell encoder that has not read LangCell's corpus. A part
that cannot be measured on these cells says why and costs the others nothing.

The tables of a training run itself, which know what was held out of it, are `recipes.tables`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from langcell.config import EvaluateConfig
from langcell.errors import InputError
from langcell.files import write_whole
from langcell.inference.clustering import clustering
from langcell.inference.curves import few_shot_curves
from langcell.inference.embed import embed_texts
from langcell.inference.facets import Facet, zero_shot_facets
from langcell.inference.figures import tables_bar
from langcell.inference.integration import check_installed, integration
from langcell.inference.predict import Head
from langcell.inference.pretrained import Pretrained
from langcell.inference.prototypes import taking_part
from langcell.inference.retrieval import retrieval
from langcell.inference.tables import Table
from langcell.recipes.benchmarks import pathways, sections
from langcell.recipes.benchmarks.data import Cohort, read_cohort
from langcell.recipes.benchmarks.few_shot import all_data, few_shot
from langcell.recipes.benchmarks.methods import Methods
from langcell.recipes.labels import Labels, Split, split_cells
from langcell.recipes.report import png
from langcell.storage import absolute
from langcell.train.options import FitOptions

TITLES = {
    "zero_shot": "Zero-shot: the candidates are the terms that the cells have",
    "few_shot": "Few-shot: the same shots and the same test cells for every method",
    "finetuning": "Fine-tuning on all training cells",
    "retrieval": "Retrieval in the joint space",
    "integration": "Batch integration (scib-metrics)",
    "clustering": "Clusters against cell types",
    "pathways": "Pathways, several labels at once",
}
FEW_SHOT = "few_shot"
TEST_SHARE = 0.2
"""Share of the cells that fine-tuning and pathways are tested on, where the file has no split of its own."""


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure the parts that are asked for; their results, which also stand in summary.json and tables.md of
    `run.dir`, beside the figures.

    Raises InputError for what the user can mend.
    """
    asked, started = config.evaluate, time.monotonic()
    _check(config)
    directory = Path(absolute(config.run.dir))
    directory.mkdir(parents=True, exist_ok=True)
    model = Pretrained.from_pretrained(absolute(asked.model))
    model.refuse_classifier()
    cohort = read_cohort(asked, model)
    for option in ("batch", "split"):
        if (column := getattr(asked, option)) is not None:
            cohort.column(column, option)
    about = cohort.about
    print(
        f"model    {model.name}: {len(model.vocabulary.gene_ids):,} genes of {model.organism}\n"
        f"cells    {about['cells']:,} of {about['cells_given']:,} of {about['data']}; left out "
        f"{about['left_out_cells']:,}: {about['left_out']}"
        + f"; without a count in the model's genes: {about['silent_cells']:,}"
        * (about["silent_cells"] > 0),
        flush=True,
    )
    parts = _Parts(config, model, cohort, directory)
    results: dict[str, Any] = {}
    written = [f"# {model.name}: evaluation\n"]
    for name in TITLES:
        if name in asked.parts:
            results[name] = getattr(parts, name)()
            show: Callable[[dict[str, Any]], str] = getattr(sections, name)
            written.append(f"## {TITLES[name]}\n\n{show(results[name])}\n")
            print("", written[-1], sep="\n", flush=True)
            # After every part: what fails in a later one costs none of these.
            summary = {"model": model.name, **about, **results, "seconds": time.monotonic() - started}
            write_whole(directory / "summary.json", json.dumps(summary, indent=2))
            write_whole(directory / "tables.md", "\n".join(written))
    for what, name in (("tables", "tables.md"), ("summary", "summary.json")):
        print(f"{what:<8} {directory / name}", flush=True)
    return summary


def _check(config: EvaluateConfig) -> None:
    """What a type cannot say."""
    asked = config.evaluate
    for name in ("shots", "recall"):
        values = getattr(asked, name)
        if not values or sorted(set(values)) != values or values[0] < 1:
            raise InputError(f"evaluate.{name}: {values} must be counts of at least 1 in rising order")
    if "cell_type" in asked.facets:
        raise InputError("evaluate.facets: the column of cell_type is given by evaluate.label")
    if asked.pathways and asked.pathway_columns:
        raise InputError(
            "evaluate.pathways and evaluate.pathway_columns: give one of them (--evaluate.pathways null "
            "where the configuration names gene sets)"
        )
    if config.fit.seed != FitOptions().seed:
        raise InputError("fit.seed: the seeds of an evaluation are evaluate.seed and those after it")
    if not asked.parts:
        raise InputError(f"evaluate.parts: none is asked for, of {', '.join(TITLES)}")
    if asked.batch is not None and "integration" in asked.parts:
        check_installed()


class _Parts:
    """The parts, each a method that gives its result; what several of them need is made once."""

    def __init__(self, config: EvaluateConfig, model: Pretrained, cohort: Cohort, directory: Path) -> None:
        self.asked, self.model, self.cohort, self.directory = config.evaluate, model, cohort, directory
        self.methods = Methods(config.evaluate, config.fit, model, cohort)
        self.seeds = range(self.asked.seed, self.asked.seed + self.asked.seeds)
        self.unsplit = ""
        """Why the cells cannot be split, where nobody asked for how."""
        # What is wrong with a start, or with a split, is said before any part takes its time.
        if self.asked.geneformer is not None and {"finetuning", "few_shot"} & set(self.asked.parts):
            self.methods.exchanged(self.asked.seed)
        if {"finetuning", "pathways"} & set(self.asked.parts):
            try:
                self.labels, self.split = self._split()
            except InputError as error:
                if self.asked.split is not None:
                    raise
                self.unsplit = str(error)
        if "pathways" in self.asked.parts and not self.unsplit:
            self.pathway_labels = self._pathway_labels()
        self.types: Facet = cohort.facets["cell_type"]

    @cached_property
    def terms(self) -> list[str]:
        """Cell types (CL ids) of the cells."""
        return sorted(self.types.texts)

    @cached_property
    def class_N(self) -> np.ndarray:
        """Index of each cell's type among `terms`, -1 for none."""
        place = {term: i for i, term in enumerate(self.terms)}
        return np.array([place.get(term, -1) for term in self.types.term_N], np.int64)

    @cached_property
    def shown_terms(self) -> list[str]:
        """Types with cells enough for the few-shot curves."""
        return [self.terms[c] for c in taking_part(self.class_N, max(self.asked.shots))]

    @cached_property
    def zero_shot_tables(self) -> dict[str, Table]:
        """The facets, and the types of the few-shot curves, asked about at once."""
        asked = dict(self.cohort.facets) if "zero_shot" in self.asked.parts else {}
        if "few_shot" in self.asked.parts:
            asked[FEW_SHOT] = self.types.only(self.shown_terms)
        return zero_shot_facets(
            self.model,
            self.cohort.packed,
            asked,
            a=self.asked.a,
            top_k=self.asked.top_k,
            batch_tokens=self.asked.batch_tokens,
        )

    def zero_shot(self) -> dict[str, Any]:
        tables = {name: table for name, table in self.zero_shot_tables.items() if name != FEW_SHOT}
        write_whole(self.directory / "zero_shot.png", png(tables_bar(tables)))
        spoken = self.model.text.facets
        return {
            name: {**table.to_dict(), "in_training_texts": name in spoken} for name, table in tables.items()
        }

    def few_shot(self) -> dict[str, Any]:
        table = self.zero_shot_tables[FEW_SHOT]
        counts = np.bincount(self.class_N[self.class_N >= 0], minlength=len(self.terms))
        answers = {}
        for method, predicted in table.predicted.items():
            answer_N = np.full(len(self.class_N), -1)
            answer_N[table.rows] = [self.terms.index(table.candidates[i]) for i in predicted]
            answers[method] = answer_N
        texts = [self.types.texts[term] for term in self.terms]
        result = few_shot(
            self.class_N,
            self.methods.of_texts(self.class_N, texts) | self.methods.of_labels(self.class_N),
            self.asked.shots,
            self.seeds,
            answers,
            told=partial(print, flush=True),
        )
        if "empty" not in result:
            result["classes"] = {term: self.types.labels[term] for term in self.shown_terms}
            write_whole(self.directory / "few_shot.png", png(few_shot_curves(result)))
        return result | {
            "types_left_out": {
                self.types.labels[term]: int(n)
                for term, n in zip(self.terms, counts, strict=True)
                if term not in self.shown_terms
            }
        }

    def _split(self) -> tuple[Labels, Split]:
        """Types of all cells, and cells to learn from and to test; those without a type, and types of one
        cell, are in neither."""
        label_N = self.cohort.label_N
        labels, counts = np.unique(label_N, return_counts=True)
        rows = np.flatnonzero(np.isin(label_N, labels[(counts > 1) & (labels != "")]))
        classes, value = np.unique(label_N, return_inverse=True)
        types = Labels(Head(self.asked.label, "classification", tuple(classes)), value)
        split = split_cells(
            replace(types, value=value[rows]),
            self.cohort.obs.iloc[rows],
            self.asked.split,
            test_share=TEST_SHARE,
            val_share=0.0,
            seed=self.asked.seed,
            option="evaluate.split",
        )
        left_out = {"no type, or the only cell of its type": len(label_N) - len(rows), **split.left_out}
        if len(split.val):
            left_out[f"obs[{self.asked.split!r}] says val"] = len(split.val)
        none = rows[:0]
        return types, replace(
            split, train=rows[split.train], val=none, test=rows[split.test], left_out=left_out
        )

    def finetuning(self) -> dict[str, Any]:
        if self.unsplit:
            return {"empty": self.unsplit}
        class_N = self.labels.value
        try:
            _, split = self.labels.learnt(self.split)  # test cells of types that no cell teaches are no test
        except InputError as error:
            return {"empty": str(error)}
        return all_data(class_N, split, self.methods.of_labels(class_N), self.seeds)

    def retrieval(self) -> dict[str, Any]:
        if len(self.terms) < 2:
            return {"empty": f"{len(self.terms)} type has a term, at least two are needed"}
        texts = [self.types.texts[term] for term in self.terms]
        z_CP = embed_texts(self.model.model, self.model.tokenizer, texts, self.model.text.max_length).numpy()
        has = self.class_N >= 0
        return retrieval(self.cohort.z_NP[has], z_CP, self.class_N[has], self.asked.recall)

    def integration(self) -> dict[str, Any]:
        if self.asked.batch is None:
            return {"empty": "no column of batches is named (evaluate.batch)"}
        batches = self.cohort.column(self.asked.batch, "batch")
        batch_N, known = batches.astype(str).to_numpy(str), batches.notna().to_numpy()
        has = (self.cohort.label_N != "") & known
        spaces = {name: x_NP[has] for name, x_NP in self.cohort.spaces.items()}
        try:
            found = integration(spaces, self.cohort.label_N[has], batch_N[has], unintegrated="X_pca")
        except InputError as error:  # one batch, or few cells: no reason to lose the other parts
            return {"empty": str(error)}
        about = {"n": int(has.sum()), "batches": len(set(batch_N[has])), "without_batch": int((~known).sum())}
        return {**about, "spaces": found}

    def clustering(self) -> dict[str, Any]:
        has = self.cohort.label_N != ""
        labels = self.cohort.label_N[has]
        if len(set(labels)) < 2:
            return {"empty": f"{len(set(labels))} type in obs[{self.asked.label!r}], at least two are needed"}
        spaces = {name: x_NP[has] for name, x_NP in self.cohort.spaces.items()}
        found = clustering(spaces, labels, self.seeds)
        return {"n": len(labels), "clusters": len(set(labels)), "spaces": found}

    def pathways(self) -> dict[str, Any]:
        if self.unsplit:
            return {"empty": self.unsplit}
        label_NL, about = self.pathway_labels
        if label_NL is None:
            return about
        methods = {
            "langcell_ce": self.methods.multi_label,
            "X_langcell": pathways.heads(self.cohort.z_NP, self.asked.seed),
            "X_pca": pathways.heads(self.cohort.spaces["X_pca"], self.asked.seed),
            "logistic_regression": pathways.heads(self.cohort.features_NG, self.asked.seed),
        }
        found = pathways.multi_label(methods, label_NL, self.split.train, self.split.test)
        return found | about | {"rule": self.split.rule}

    def _pathway_labels(self) -> tuple[np.ndarray | None, dict[str, Any]]:
        """Which pathways are high in which cells (bool [N, L]), and what to say of it; None where there are
        none."""
        if self.asked.pathway_columns:
            label_NL = pathways.stated_NL(self.cohort.obs, self.asked.pathway_columns)
            return label_NL, {"label": "Labels: columns of obs."}
        if self.asked.pathways is None:
            return None, {"empty": "neither gene sets nor columns are named (evaluate.pathways)"}
        sets = pathways.read_gmt(absolute(self.asked.pathways))
        columns = pathways.set_columns(sets, self.cohort.var)
        if not columns:
            return None, {"empty": f"no set has {pathways.FEWEST_GENES} genes of the data"}
        about = {
            "label": "A label says that the mean z-score of the set's genes, in these very counts, is above "
            "the training cells' upper quartile: what is measured is how much of it a method keeps.",
            "too_few_genes": sorted(set(sets) - set(columns)),
        }
        return pathways.high_NL(self.cohort.features_NG, list(columns.values()), self.split.train), about
