"""evercell: cell type annotation of single-cell RNA-seq data that keeps learning.

>>> import evercell as ec
>>> model = ec.train(adata, labels="cell_type")  # doctest: +SKIP
>>> result = ec.annotate(model, query)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module. Looked up when first asked for, so that importing evercell imports nothing heavy.
_PUBLIC = {
    "Annotation": "annotation",
    "Annotator": "annotator",
    "EvercellError": "errors",
    "ModelSettings": "finetuning",
    "annotate": "annotation",
    "embed": "annotation",
    "evaluate": "evaluation",
    "load": "checkpoint",
    "load_example": "examples",
    "pretrain": "pretraining",
    "read_cells": "cells",
    "save": "checkpoint",
    "train": "finetuning",
    "write_cells": "cells",
    "write_report": "reporting",
}

__all__ = sorted([*_PUBLIC, "__version__"])

if TYPE_CHECKING:
    from evercell.annotation import Annotation, annotate, embed
    from evercell.annotator import Annotator
    from evercell.cells import read_cells, write_cells
    from evercell.checkpoint import load, save
    from evercell.errors import EvercellError
    from evercell.evaluation import evaluate
    from evercell.examples import load_example
    from evercell.finetuning import ModelSettings, train
    from evercell.pretraining import pretrain
    from evercell.reporting import write_report


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'evercell' has no attribute '{name}'")
    return getattr(importlib.import_module(f"evercell.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
