"""CellTypist models: logistic regression on scaled log-normalised expression (Dominguez Conde et al., Science 2022).

A CellTypist file is a pickle of a dict: ``Model``, a scikit-learn classifier with the names of its genes
(``features``); ``Scaler_``, a StandardScaler; and a ``description``. It is read as `inert` records. The label of a cell
is the type with the largest decision value ``w_k z + b_k`` over the genes that model and query share, where z is the
log-normalised expression (10^4 counts a cell, over all genes), less the mean, divided by the standard deviation, 10 at
most.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evercell.annotator import Annotator, empty_bank
from evercell.backbones import BACKBONES
from evercell.celltypes import CellTypes
from evercell.errors import ModelError
from evercell.gene_names import known_genes
from evercell.heads import GrowingHead
from evercell.importing.genes import vocabulary_of
from evercell.importing.inert import Classifier, Model, Scaler, array, read_records
from evercell.labels import is_unassigned
from evercell.ledger import Ledger
from evercell.linear import LinearModel
from evercell.rejection.base import QUANTILES
from evercell.rejection.confidence import ConfidenceRejector
from evercell.tokenizers.values import ValuesTokenizer
from evercell.training import seeded
from evercell.updating.linear import MEAN, SPREAD

MOST = 10.0  # standard deviations above the mean at which CellTypist cuts expression off
BACKBONE = {"members": 1, "member_width": 64, "n_latents": 8, "depth": 1}
"""Of the untrained network that only makes representations; drawn at random, gated sums keep what parts cells."""
WARNING = (
    "a pickle can run code when it is read; only numpy, the classifier and the scaler were admitted, as records that "
    "run nothing"
)


def import_celltypist(path: str | os.PathLike[str], *, trust_pickle: bool = False, species: str = "auto") -> Annotator:
    """Read a CellTypist model (``.pkl``).

    Parameters
    ----------
    path
        File of a CellTypist model.
    trust_pickle
        A pickle is a program, so it is read only where this says that its source is trusted; and even then only known
        names are admitted, as records that run nothing.
    species
        ``human``, ``mouse`` or ``auto``.

    Returns
    -------
    Annotator
        A model whose linear member alone tells the types, with the weights, the scaling and the cut of the file: its
        labels are CellTypist's ("best match"). Its genes are those of the file and, without weights, all others that
        evercell knows, so that a cell's total is taken over the whole transcriptome as CellTypist takes it.

        No cell comes with such a file. So there is no threshold for unknown cells until an update has set one: every
        cell is labelled. Probabilities are a softmax over the decision values, not CellTypist's one-against-rest ones,
        and not calibrated either. The representation is that of an untrained network. `update` teaches the linear
        member alone and keeps the rows of types without cells as they are (`evercell.updating.linear`).

    Raises
    ------
    ModelError
        If the file is not trusted, names anything that is not known, or holds another kind of model.
    GenesError
        If its genes are not known.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"there is no CellTypist model `{path}`", hint="check the path")
    if not trust_pickle:
        raise ModelError(
            f"`{path}` is a pickle, and a pickle can run code when it is read",
            hint="pass --trust-pickle if you trust its source; only the classifier and the scaler are then read",
        )
    warnings.warn(f"`{path}`: {WARNING}", stacklevel=2)
    found = _read(path)
    vocabulary, rows, dropped = vocabulary_of(found.genes, species=species)
    n_own = len(vocabulary)
    vocabulary = vocabulary.extended(known_genes(vocabulary.species))
    weight = (found.coefficients[:, rows] / found.spread[rows]).T.astype(np.float32)
    centre = (found.mean if found.centred else np.zeros_like(found.mean))[rows].astype(np.float32)
    ceiling = (centre + MOST * found.spread[rows]).astype(np.float32)
    linear = LinearModel(weight, found.intercepts.astype(np.float32), centre, ceiling).widened(len(vocabulary))
    names = [f"{name} (CellTypist)" if is_unassigned(name) else name for name in found.types]
    tokenizer = ValuesTokenizer()
    with seeded(0):
        backbone = BACKBONES["latent"](len(vocabulary), n_bins=tokenizer.n_bins, **BACKBONE).half().float()
        head = GrowingHead(backbone.width, len(names))
    with torch.no_grad():
        head.classifier.weight.zero_()
        head.classifier.bias.zero_()
    more = (0, len(vocabulary) - n_own)
    facts = {
        "verb": "import",
        "source": {"format": "celltypist", "name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        "description": found.description,
        "data": [],
        "types_added": names,
        "settings": {},
        "genes": n_own,
        "notes": _notes(n_own, dropped, found, names),
    }
    return Annotator(
        vocabulary=vocabulary,
        types=CellTypes(tuple(names)),
        tokenizer=tokenizer,
        backbone=backbone.eval(),
        head=head.eval(),
        linear=linear,
        temperature=1.0,
        rejector=ConfidenceRejector({"known_quantiles": np.full(QUANTILES, np.inf)}),
        bank=empty_bank(len(vocabulary)),
        ledger=Ledger().appended(facts),
        linear_share=1.0,
        strategy_state={
            MEAN: np.pad(found.mean[rows], more).astype(np.float32),
            SPREAD: np.pad(found.spread[rows], more).astype(np.float32),
        },
    )


@dataclass(frozen=True)
class _Found:
    """What a file holds: types (K), genes (F), coefficients (K, F), intercepts (K,); mean and spread of genes (F,)."""

    types: list[str]
    genes: list[str]
    coefficients: np.ndarray
    intercepts: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    centred: bool
    description: dict[str, str]


def _read(path: Path) -> _Found:
    records = read_records(path)
    if isinstance(records, Model):
        parts = {"Model": records.fields.get("classifier"), "Scaler_": records.fields.get("scaler")}
        records = {**parts, "description": records.fields.get("description")}
    if not isinstance(records, Mapping):
        records = {}
    classifier, scaler = records.get("Model"), records.get("Scaler_")
    if not isinstance(classifier, Classifier) or not isinstance(scaler, Scaler):
        raise ModelError(
            f"`{path}` is no CellTypist model: a dict with a classifier `Model` and a scaler `Scaler_` was expected",
            hint="give the .pkl file of a (flat) CellTypist model",
        )

    def numbers(record: Classifier | Scaler, name: str) -> np.ndarray:
        found = array(record.fields.get(name))
        if found is None or found.dtype.kind not in "fiu" or not np.isfinite(found).all():
            raise ModelError(f"`{path}` has no numbers `{name}`", hint="take the file from its source again")
        return found.astype(np.float64)

    types, genes = (array(classifier.fields.get(name)) for name in ("classes_", "features"))
    if types is None or genes is None:
        raise ModelError(
            f"`{path}` does not name its {'types' if types is None else 'genes'}",
            hint="models of CellTypist 0.1 lack the genes; take a newer one",
        )
    coefficients, intercepts = numbers(classifier, "coef_"), numbers(classifier, "intercept_").ravel()
    spread = numbers(scaler, "scale_") if scaler.fields.get("scale_") is not None else np.ones(len(genes))
    mean = numbers(scaler, "mean_") if scaler.fields.get("mean_") is not None else np.zeros(len(genes))
    if len(types) == 2 and len(coefficients) == 1:  # one row for two types, taken for and against
        coefficients, intercepts = np.vstack([-coefficients, coefficients]), np.concatenate([-intercepts, intercepts])
    if (
        coefficients.shape != (len(types), len(genes))
        or len(intercepts) != len(types)
        or len(mean) != len(genes)
        or len(spread) != len(genes)
        or not (spread > 0).all()
    ):
        raise ModelError(
            f"the parts of `{path}` do not fit: {len(types):,} types, {len(genes):,} genes, coefficients "
            f"{coefficients.shape}, {len(mean):,} means",
            hint="take the file from its source again",
        )
    description = records.get("description")
    told = description.items() if isinstance(description, Mapping) else ()
    return _Found(
        types=[str(name) for name in types],
        genes=[str(name) for name in genes],
        coefficients=coefficients,
        intercepts=intercepts,
        mean=mean,
        spread=spread,
        centred=bool(scaler.fields.get("with_mean", True)),
        description={str(key): str(value) for key, value in told if isinstance(value, str | int | float)},
    )


def _notes(n_own: int, dropped: list[str], found: _Found, names: list[str]) -> list[str]:
    """What the user is to be told of the import."""
    notes = [f"{n_own:,} genes have weights; a cell's total is taken over all genes that evercell knows"]
    if dropped:
        shown = ", ".join(dropped[:5]) + (" and others" if len(dropped) > 5 else "")
        notes.append(f"{len(dropped):,} genes are there under another name and were left out: {shown}")
    if renamed := [new for new, old in zip(names, found.types, strict=True) if new != old]:
        notes.append(f"types that cannot be a name were renamed: {', '.join(renamed)}")
    return [
        *notes,
        "no cell comes with the file: confidence is not calibrated and no cell is called Unknown until an update",
        "the linear member alone tells the types; the representation is that of an untrained network",
    ]
