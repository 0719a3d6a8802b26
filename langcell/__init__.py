"""langcell: open, distributed pretraining of LangCell, the language-cell model (ICML 2024).

For a trained model, in scanpy's manner: `langcell.annotate(adata, model, candidates)`,
`langcell.embed(adata, model)`, `langcell.Pretrained.from_pretrained(directory)`; `langcell.predict(adata,
model)` for a fine-tuned one. They load no ray, deepspeed or tiledbsoma, and PyTorch only when one of them is
asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langcell.inference.annotate import annotate, embed
    from langcell.inference.predict import predict
    from langcell.inference.pretrained import Pretrained

__version__ = "0.1.0"
__all__ = ["Pretrained", "annotate", "embed", "predict"]
_HOME = {
    "annotate": "langcell.inference.annotate",
    "embed": "langcell.inference.annotate",
    "predict": "langcell.inference.predict",
    "Pretrained": "langcell.inference.pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
