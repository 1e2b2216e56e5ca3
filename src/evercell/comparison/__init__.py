"""Other ways to annotate cells, behind one signature, and whether they differ from evercell by more than the folds do.

A method is called with a `Reference` (labelled cells), a `Query` (cells without labels) and a seed, both over the genes
that all studies share, and returns a `Prediction`. To add one: a new file here with a subclass of `Method`, and its
line in `METHODS`. No method's packages are imported before it is called.
"""

from evercell.comparison.base import Method, Prediction, Query, Reference, log_normalise
from evercell.comparison.figure import compared_figure
from evercell.comparison.significance import significance
from evercell.plugins import Registry

METHODS: Registry[Method] = Registry(
    "method",
    {
        "linear": "evercell.comparison.linear:LinearMethod",
        "knn": "evercell.comparison.knn:KnnMethod",
        "celltypist": "evercell.comparison.celltypist:CelltypistMethod",
        "scanvi": "evercell.comparison.scanvi:ScanviMethod",
        "singler": "evercell.comparison.singler:SinglerMethod",
    },
)


def available() -> list[str]:
    """Names of the methods whose packages are installed, in the order of `METHODS`; nothing of theirs is imported."""
    return [name for name in METHODS if METHODS[name].available()]


__all__ = [
    "METHODS", "Method", "Prediction", "Query", "Reference", "available", "compared_figure", "log_normalise",
    "significance",
]  # fmt: skip
