"""LangCell-CE: the cell encoder alone, with a head on the state of `<cls>`.

Dropout and one linear map, on the state that the joint space is projected from. BERT's own classifier has a
fresh dense layer with tanh in between (its pooler); none of our layouts holds one, and a second fresh layer
only learns slower from few cells.

What trains is one of three. `full`: everything. `frozen`: the head alone; states of `<cls>` are then a fixed
function, computed once, and the head reads them instead of sentences. `lora`: beside the head, low-rank
updates of the query and value maps (Hu et al. 2021, by peft), which `merge` adds to the weights, so that what
is saved is an ordinary encoder.

Shape suffixes: B cells, W hidden width of the cell encoder, O outputs.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import BertModel

from langcell.batch import Packed
from langcell.errors import InputError
from langcell.model.cell_encoder import cell_encoder
from langcell.model.interop import load_cell_checkpoint
from langcell.model.langcell import LangCell
from langcell.model.packed import encode
from langcell.model.weights import load_config

Kind = Literal["classification", "regression", "multilabel"]
Mode = Literal["full", "frozen", "lora"]
LORA_TARGETS = ["query", "value"]
"""Maps of each layer that get a low-rank update: those of the original paper."""


class CellClassifier(nn.Module):
    """A cell encoder and a head of `outputs` values: logits of classes or labels, or a standardised
    number."""

    def __init__(self, cell_bert: BertModel, outputs: int) -> None:
        super().__init__()
        self.cell_bert: nn.Module = cell_bert
        self.dropout = nn.Dropout(cell_bert.config.hidden_dropout_prob)
        self.head = nn.Linear(cell_bert.config.hidden_size, outputs)
        nn.init.normal_(self.head.weight, std=0.02)  # as BERT's classifiers start
        nn.init.zeros_(self.head.bias)

    def states(self, cells: Packed) -> Tensor:
        """State of `<cls>` of each cell [B, W]."""
        return encode(self.cell_bert, cells)[cells.starts_B]  # type: ignore[arg-type]

    def forward(self, cells: Packed | Tensor) -> Tensor:
        """Outputs [B, O], float32. cells: sentences, or their states [B, W] where the encoder is frozen."""
        states_BW = self.states(cells) if isinstance(cells, Packed) else cells
        return self.head(self.dropout(states_BW)).float()


def classifier(
    cell_bert: BertModel, outputs: int, mode: Mode, *, lora_rank: int, seed: int
) -> CellClassifier:
    """A classifier over a copy of `cell_bert` whose parameters train as `mode` says; fresh weights from
    `seed`.

    lora_rank: rank of the updates in mode `lora`; their scale is 2, that is alpha = 2 * rank.
    """
    torch.manual_seed(seed)
    made = CellClassifier(copy.deepcopy(cell_bert), outputs)
    if mode == "lora":
        from peft import LoraConfig, get_peft_model  # seconds to import, for this mode alone

        config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=LORA_TARGETS)
        made.cell_bert = get_peft_model(made.cell_bert, config)  # type: ignore[arg-type]
    else:
        made.cell_bert.requires_grad_(mode == "full")
    return made


def merge(made: CellClassifier) -> CellClassifier:
    """The same function with its low-rank updates, if any, in the encoder's own weights; in evaluation
    mode."""
    made.eval()
    if hasattr(made.cell_bert, "merge_and_unload"):
        made.cell_bert = made.cell_bert.merge_and_unload()  # type: ignore[operator]
    made.requires_grad_(True)
    return made


def with_cells(model: LangCell, cell_bert: BertModel) -> LangCell:
    """A copy of `model` around another cell encoder of the same shape; in evaluation mode."""
    # Whatever the copy would copy of these, it takes the others instead: the gene head is tied to one.
    words, new_words = (bert.embeddings.word_embeddings.weight for bert in (model.cell_bert, cell_bert))
    return copy.deepcopy(model, {id(model.cell_bert): cell_bert, id(words): new_words}).eval()


def started(model: LangCell, start: str, seed: int, option: str = "finetune.init") -> LangCell:
    """A copy of `model` whose cell encoder has other weights to start from.

    start: `random`, fresh ones from `seed`; or a Geneformer-style folder or Hub id, of the same vocabulary
    and shape (a token that it lacks keeps a fresh row); option: by which it was asked for. Raises InputError
    where it does not fit.
    """
    config = model.cell_bert.config
    torch.manual_seed(seed)
    fresh = cell_encoder(copy.deepcopy(config))
    other = with_cells(model, fresh).to(model.cell_proj.weight.device)
    if start == "random":
        return other
    theirs = load_config(start, option)
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "hidden_act"):
        if getattr(theirs, name) != getattr(config, name):
            raise InputError(
                f"{option}: {start} has {name} {getattr(theirs, name)}, the model "
                f"{getattr(config, name)}; a start must have the model's shape"
            )
    load_cell_checkpoint(other, start, option)
    return other
