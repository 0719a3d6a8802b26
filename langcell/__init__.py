"""langcell: open, distributed pretraining of LangCell, the language-cell model (ICML 2024)."""

__version__ = "0.1.0"
