"""Genes of another program's model: in which order they are, and which of evercell's genes each one is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evercell.errors import GenesError, words_of
from evercell.gene_names import canonical_genes
from evercell.genes import GeneVocabulary

LEAST_RECOGNISED = 0.2
"""Share of the names that must be known genes: of fewer, the list is of something else."""


def gene_order(path: str | os.PathLike[str]) -> list[str]:
    """Names of a list of genes: one a line, or the ``var_names`` of an ``.h5ad`` file, in their order.

    Raises
    ------
    GenesError
        If the file is not there or holds no such list.
    """
    path = Path(path)
    if not path.is_file():
        raise GenesError(f"there is no list of genes `{path}`", hint="give a text file with one gene a line, or .h5ad")
    try:
        names = _names_in_h5ad(path) if path.suffix == ".h5ad" else path.read_text(encoding="utf-8").splitlines()
    except Exception as error:  # every format has errors of its own; to the user they are one
        what = words_of(error)
        raise GenesError(
            f"`{path}` cannot be read as a list of genes: {what}",
            hint="give a text file with one gene a line, or .h5ad",
        ) from error
    names = [name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    if bad := next((n for n, name in enumerate(names, 1) if not name or "\t" in name or "," in name), None):
        raise GenesError(f"line {bad} of `{path}` is `{names[bad - 1][:60]}`", hint="one gene a line was expected")
    return names


def _names_in_h5ad(path: Path) -> list[str]:
    import h5py
    from anndata.io import read_elem

    # Not `read_cells`: such files hold values in bins or on a scale of their own, and only their genes are asked for.
    with h5py.File(path) as file:
        return [str(name) for name in read_elem(file["var"]).index]


def vocabulary_of(names: Sequence[str], *, species: str = "auto") -> tuple[GeneVocabulary, np.ndarray, list[str]]:
    """Vocabulary of named genes.

    Returns
    -------
    vocabulary, rows, dropped
        Genes under their canonical names; the place of each in `names` (G,); names that mean a gene which is there
        under another name, its current one if there is one.

    Raises
    ------
    GenesError
        If hardly any of the names is known.
    """
    found = canonical_genes(list(names), species=species)
    if found.recognised < LEAST_RECOGNISED:
        raise GenesError(
            f"{found.recognised:.0%} of the {len(names):,} names are {found.species} genes; the first is `{names[0]}`",
            hint="give symbols or Ensembl ids, and --species human or mouse if it was told wrongly",
        )
    canonical: list[str] = found.names.tolist()
    symbols: list[str] = found.symbols.tolist()
    current = [
        name.upper() in (symbol.upper(), gene) for name, symbol, gene in zip(names, symbols, canonical, strict=True)
    ]
    place: dict[str, int] = {}
    for row, gene in enumerate(canonical):
        if gene not in place or (current[row] and not current[place[gene]]):
            place[gene] = row
    rows = np.sort(np.fromiter(place.values(), dtype=np.int64, count=len(place)))
    kept = set(rows.tolist())
    vocabulary = GeneVocabulary(tuple(canonical[r] for r in rows), tuple(symbols[r] for r in rows), found.species)
    return vocabulary, rows, [name for row, name in enumerate(names) if row not in kept]
