"""The small modules on top of the encoders.

Shape suffixes: M masked positions, W hidden width, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertLMPredictionHead


class GeneHead(nn.Module):
    """BERT's prediction head over genes, its output weights tied to the gene embeddings.

    Named as in `BertForMaskedLM` (`predictions.*`), so that Geneformer's head loads by name. It is
    called on masked positions alone: the vocabulary is 25k wide and 85% of the positions have no
    target.
    """

    def __init__(self, config: BertConfig, cell_bert: BertModel) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.predictions.decoder.weight = cell_bert.embeddings.word_embeddings.weight
        self.predictions.decoder.bias = self.predictions.bias

    def forward(self, states_MW: Tensor) -> Tensor:
        """Logits over the vocabulary [M, V]."""
        return self.predictions(states_MW)
