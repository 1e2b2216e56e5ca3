"""evercell: cell type annotation of single-cell RNA-seq data that keeps learning.

>>> import evercell as ec
>>> model = ec.train(adata, labels="cell_type")  # doctest: +SKIP
>>> result = ec.annotate(model, query)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evercell import celltypist as celltypist
    from evercell import tl as tl
    from evercell.annotation import Annotation as Annotation
    from evercell.annotation import annotate as annotate
    from evercell.annotation import embed as embed
    from evercell.annotator import Annotator as Annotator
    from evercell.cells import read_cells as read_cells
    from evercell.cells import write_cells as write_cells
    from evercell.checkpoint import save as save
    from evercell.discovery import Discovery as Discovery
    from evercell.discovery import accepted as accepted
    from evercell.discovery import discover as discover
    from evercell.discovery import select as select
    from evercell.errors import EvercellError as EvercellError
    from evercell.estimator import EvercellClassifier as EvercellClassifier
    from evercell.evaluation import evaluate as evaluate
    from evercell.examples import load_example as load_example
    from evercell.explaining import Explanation as Explanation
    from evercell.explaining import explain as explain
    from evercell.finetuning import ModelSettings as ModelSettings
    from evercell.finetuning import train as train
    from evercell.merging import merge as merge
    from evercell.preprocessing import Preprocessing as Preprocessing
    from evercell.preprocessing import PreprocessingSettings as PreprocessingSettings
    from evercell.preprocessing import preprocess as preprocess
    from evercell.pretraining import pretrain as pretrain
    from evercell.registry import load as load
    from evercell.reporting import write_report as write_report
    from evercell.updating import UpdateSettings as UpdateSettings
    from evercell.updating.update import update as update

__version__ = "0.1.0"

# Public name -> module. Looked up when first asked for, so that importing evercell imports nothing heavy.
_PUBLIC = {
    "Annotation": "annotation",
    "Annotator": "annotator",
    "Discovery": "discovery",
    "EvercellClassifier": "estimator",
    "EvercellError": "errors",
    "Explanation": "explaining",
    "ModelSettings": "finetuning",
    "Preprocessing": "preprocessing",
    "PreprocessingSettings": "preprocessing",
    "UpdateSettings": "updating",
    "accepted": "discovery",
    "annotate": "annotation",
    "discover": "discovery",
    "embed": "annotation",
    "evaluate": "evaluation",
    "explain": "explaining",
    "load": "registry",
    "load_example": "examples",
    "merge": "merging",
    "preprocess": "preprocessing",
    "pretrain": "pretraining",
    "read_cells": "cells",
    "save": "checkpoint",
    "select": "discovery",
    "train": "finetuning",
    "update": "updating.update",
    "write_cells": "cells",
    "write_report": "reporting",
}

_SUBMODULES = ("celltypist", "tl")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"evercell.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'evercell' has no attribute '{name}'")
    return getattr(importlib.import_module(f"evercell.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, *_SUBMODULES, "__version__"])
