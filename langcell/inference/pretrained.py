"""A trained model with everything that belongs to its weights.

Weights alone annotate nothing: a cell is the sentence that *this* vocabulary and *these* medians make of it,
and a candidate text is cut and pooled as it was in training. So they travel together, in one folder that
`save_pretrained` writes and `from_pretrained` reads, and nothing of it is computed anew from the data at
hand: medians of a cohort of T cells alone would call every T-cell gene unremarkable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from langcell.cells.beta import Beta
from langcell.cells.vocabulary import Vocabulary
from langcell.errors import InputError
from langcell.model.interop import load_export, save_export
from langcell.model.langcell import LangCell
from langcell.text.ontology import Ontology
from langcell.text.options import TextOptions

TYPES = pa.schema(
    [
        pa.field("term", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("tissue", pa.string(), nullable=False),
        pa.field("tissue_general", pa.string(), nullable=False),
        pa.field("cells", pa.int64(), nullable=False),
    ]
)
"""types.parquet: each cell type (CL id, label) that training cells had, in each tissue (UBERON ids, '' where
the texts say none), and how many of them."""
CARD = "README.md"


@dataclass(frozen=True, eq=False)
class Pretrained:
    """What an export directory holds.

    model: in evaluation mode; config: `config.json`; types: rows of `TYPES`, none where it is not known what
    the model was trained on; card: the model card (Markdown).
    """

    model: LangCell
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    beta: Beta
    config: dict[str, Any]
    types: pa.Table
    name: str
    card: str = ""

    @classmethod
    def from_pretrained(cls, directory: str | Path, device: str | None = None) -> Pretrained:
        """The model that `save_pretrained`, or the end of a training, wrote.

        device: where the weights go; None: the GPU where there is one. Raises InputError where the folder is
        no whole export, or vocabulary or medians are not those that the weights were trained with.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise InputError(
                f"model: there is no folder {directory}. A trained model is the `export/` of a run (make "
                "demo trains one), or made of LangCell's released weights by jobs/convert.py"
            )
        model, config = load_export(directory)
        vocabulary = Vocabulary.read(str(directory / "vocabulary.json"))
        beta = Beta.read(str(directory / "beta.parquet"))
        for name, found in (("vocabulary", vocabulary.hash), ("beta", beta.hash)):
            stated = config.get(f"{name}_hash", found)
            if stated != found:
                raise InputError(
                    f"{directory}: its {name} ({found}) is not the one that the weights were trained with "
                    f"({stated}); the folder was put together of two models"
                )
        embeddings = model.cell_bert.config.vocab_size
        if vocabulary.size != embeddings:
            raise InputError(
                f"{directory}: its vocabulary has {vocabulary.size} tokens, its cell encoder {embeddings}"
            )
        types, card = directory / "types.parquet", directory / CARD
        return cls(
            model=model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(),
            tokenizer=_tokenizer(directory),
            vocabulary=vocabulary,
            beta=beta,
            config=config,
            types=pq.read_table(types).cast(TYPES) if types.exists() else TYPES.empty_table(),
            name=_name(directory),
            card=card.read_text() if card.exists() else "",
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write everything into `directory`, as `from_pretrained` reads it.

        Raises InputError where something stands there: parts of two models would pass for one.
        """
        directory = Path(directory)
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise InputError(f"{directory} is not empty; a model is saved into a folder of its own")
        save_export(self.model, directory, self.tokenizer, self.config)
        (directory / "vocabulary.json").write_text(self.vocabulary.to_json())
        self.beta.write(str(directory / "beta.parquet"))
        pq.write_table(self.types, directory / "types.parquet")
        (directory / CARD).write_text(self.card)

    def refuse_classifier(self) -> None:
        """Raises InputError for a LangCell-CE, whose cells have left the space of the texts."""
        tuned = self.config.get("finetuned", {"kind": "few_shot"})
        if tuned["kind"] != "few_shot":
            raise InputError(
                f"model: {self.name} was fine-tuned for {tuned['kind']} of {tuned['target']}: its cells have "
                "left the space of the texts. Use langcell.predict, or the model it was made from"
            )

    @property
    def tau(self) -> float:
        """Temperature of the contrast."""
        return float(self.config["tau"])

    @property
    def organism(self) -> str:
        """Whose genes it knows, such as `homo_sapiens`."""
        return str(self.config["organism"])

    @property
    def max_length(self) -> int:
        """Most tokens of a cell's sentence, `<cls>` included."""
        return int(self.config["max_length"])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @cached_property
    def text(self) -> TextOptions:
        """How its texts were made. Releases of ontologies that the training read from files are left out: the
        packaged ones stand in for them."""
        known = {field.name for field in fields(TextOptions)}
        given = {name: value for name, value in self.config["text"].items() if name in known}
        return TextOptions(**given | {"ontologies": []})

    @cached_property
    def ontology(self) -> Ontology:
        """Where names, ids and definitions of candidates are looked up."""
        return Ontology.load(self.text, self.organism)

    def known_types(self, tissues: Sequence[str] = ()) -> list[str]:
        """CL ids of the cell types that it was trained on, sorted.

        tissues: names or UBERON ids; types of these tissues and of their parts alone. Raises InputError for a
        tissue that is no term or has no type.
        """
        rows = self.types.to_pylist()
        if not tissues:
            return sorted({row["term"] for row in rows})
        wanted = []
        for tissue in tissues:
            term = self.ontology.find(tissue, ["UBERON", "CL"])
            if term is None:
                raise InputError(f"tissue: {tissue!r} is no name or id of a tissue (UBERON)")
            wanted.append(term)
        ids = {term.id for term in wanted}
        found = {
            row["term"]
            for row in rows
            if any(
                place in ids or not ids.isdisjoint(self.ontology.ancestors(place))
                for place in (row["tissue"], row["tissue_general"])
                if place
            )
        }
        if not found:
            places = sorted(
                {term.label for row in rows if (term := self.ontology.get(row["tissue"])) is not None}
            )
            raise InputError(
                f"tissue: the model was trained on no cell type of {', '.join(t.label for t in wanted)}. It "
                f"knows: {', '.join(places[:20]) or 'no tissue'}; or name the candidates"
            )
        return sorted(found)


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(directory, use_fast=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{directory} is not a whole export: no tokenizer: {error}") from error


def _name(directory: Path) -> str:
    """The run's name, for an export is called `export` in every run."""
    directory = directory.absolute()
    return directory.parent.name if directory.name == "export" else directory.name
