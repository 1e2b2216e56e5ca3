"""The sources of a merge: a file as counts over canonical genes in a folder, and merged cells told apart again."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from evercell.cells import Counts, find_counts, read_cells
from evercell.errors import CellsError
from evercell.gene_names import CanonicalGenes, orthologue_table
from evercell.genes import GeneVocabulary, brought_over, canonical_genes
from evercell.h5_files import write_h5ad
from evercell.outputs import atomic_path
from evercell.progress import progress

if TYPE_CHECKING:
    from anndata import AnnData

MERGE = "evercell_merge"  # in uns: the sources and the manifest
MEASURED = "measured"  # in varm: genes (rows) that each source (columns) measured
SOURCE, BARCODE = "source", "barcode"  # in obs
ROWS = 4096  # cells brought over at a time
FORMAT = 1  # of the folder of a source; one of another format is made again


@dataclass(frozen=True)
class Part:
    """One source within an AnnData.

    Parameters
    ----------
    name
        Name of the source; "" where the AnnData was not merged.
    rows
        Its cells, sorted.
    measured
        Genes of ``var`` that it measured (G,), bool.
    measured_raw
        The same of ``raw.var``; None where that is not known.
    """

    name: str
    rows: np.ndarray
    measured: np.ndarray
    measured_raw: np.ndarray | None

    def genes_of(self, counts: Counts, *, name: str) -> np.ndarray:
        """Which genes of the counts it measured, bool."""
        if counts.source != "raw.X":
            return self.measured
        if self.measured_raw is None and not self.name:
            return np.ones(counts.shape[1], dtype=bool)
        if self.measured_raw is None:
            raise _lost(f"`raw.varm` of `{name}` does not say which genes each source measured")
        return self.measured_raw

    def blocks(self, counts: Counts, genes: np.ndarray) -> Iterator[csr_matrix]:
        """Its counts over the genes it measured, at most `ROWS` cells at a time; other rows are read, not kept."""
        for start in range(int(self.rows[0]), int(self.rows[-1]) + 1, ROWS):
            stop = min(start + ROWS, int(self.rows[-1]) + 1)
            block = counts.rows(start, stop)
            inside = self.rows[np.searchsorted(self.rows, start) : np.searchsorted(self.rows, stop)] - start
            if len(inside) < stop - start:
                block = block[inside]
            if len(inside):
                yield block if genes.all() else block[:, genes].tocsr()


def _lost(what: str) -> CellsError:
    return CellsError(
        f"{what}: a gene that was not measured cannot be told from one without a count",
        hint=f"give the file as `evercell merge` wrote it, or delete uns['{MERGE}'] to take all zeros as counts",
    )


def parts_of(adata: AnnData, name: str = "the data") -> list[Part]:
    """The sources of an AnnData that has cells of them; one part without a name where it was not merged.

    Where it was not merged, a column ``measured`` of ``var``, as `preprocess` with earlier genes writes it, tells the
    genes that were measured.

    Raises
    ------
    CellsError
        It was merged, but does not say any more which source a cell is from, or which genes a source measured.
    """
    if MERGE not in adata.uns:
        measured = np.ones(adata.n_vars, dtype=bool)
        if MEASURED in adata.var and pd.api.types.is_bool_dtype(adata.var[MEASURED]):
            measured = adata.var[MEASURED].to_numpy()
        return [Part("", np.arange(adata.n_obs), measured, None)]
    sources = [str(one) for one in adata.uns[MERGE]["sources"]]
    if MEASURED not in adata.varm or np.shape(adata.varm[MEASURED]) != (adata.n_vars, len(sources)):
        raise _lost(
            f"`{name}` was merged of {len(sources)} sources, but varm['{MEASURED}'] is gone or not of its shape"
        )
    if SOURCE not in adata.obs or not set(adata.obs[SOURCE].astype(object)) <= set(sources):
        raise _lost(f"`{name}` was merged of {len(sources)} sources, but obs['{SOURCE}'] does not name them")
    measured = np.asarray(adata.varm[MEASURED], dtype=bool)
    raw = None
    if adata.raw is not None and MEASURED in adata.raw.varm:
        raw = np.asarray(adata.raw.varm[MEASURED], dtype=bool)
    code = pd.Categorical(adata.obs[SOURCE], categories=sources).codes
    found = []
    for number, source in enumerate(sources):
        rows = np.flatnonzero(code == number)
        if not len(rows):
            continue
        if not measured[:, number].any():
            raise CellsError(
                f"`{name}` holds {len(rows):,} cells of `{source}`, which measured none of its {adata.n_vars:,} genes",
                hint="leave these cells out, or keep genes that their source measured",
            )
        found.append(Part(source, rows, measured[:, number], None if raw is None else raw[:, number]))
    return found


def unmerged(adata: AnnData, name: str = "the data") -> list[tuple[str, AnnData]]:
    """Split merged cells into their sources, each with only the genes that it measured.

    In a merged file a gene that a source did not measure has no counts, but is not a gene without counts. Genes and
    cells may have been left out since; other matrices (``raw``, layers) are split in the same way.

    Parameters
    ----------
    adata
        Cells; what `merge` did not write comes back as it is. It is not changed.
    name
        What messages and the names of the parts call it.

    Returns
    -------
    list
        ``(name/source, cells)`` of every source that has cells, in the order in which they were merged. Cells are
        views where there is no ``raw``: nothing is copied before it is looked at.

    Raises
    ------
    CellsError
        It was merged, but ``obs['source']`` or ``varm['measured']`` are no longer what they were.

    Examples
    --------
    >>> from evercell.testing import synthetic_cells
    >>> [name for name, _ in unmerged(synthetic_cells(20), "lung.h5ad")]
    ['lung.h5ad']
    """
    from anndata import AnnData as Cells

    found = []
    for part in parts_of(adata, name):
        if not part.name and part.measured.all():
            return [(name, adata)]
        cells = adata[part.rows, part.measured]
        if adata.raw is not None:
            cells = cells.to_memory()
            raw, cells.raw = adata.raw, None
            if part.measured_raw is not None:
                counts = csr_matrix(raw.X[part.rows])[:, part.measured_raw]
                cells.raw = Cells(counts, obs=cells.obs[[]], var=raw.var[part.measured_raw])
        found.append((f"{name}/{part.name}" if part.name else name, cells))
    return found


@dataclass(frozen=True)
class Source:
    """Cells of one source over canonical genes.

    Parameters
    ----------
    name
        What the merged file calls it.
    path
        File that it was read from, as given.
    genes
        Its genes (G_own), each once.
    counts
        Counts (N, G_own), CSR, float32, mapped from files: rows are read when they are asked for.
    obs
        Table of its cells; the index is their names.
    facts
        What the manifest says of it.
    """

    name: str
    path: Path
    genes: CanonicalGenes
    counts: csr_matrix
    obs: pd.DataFrame
    facts: dict[str, Any]

    def __len__(self) -> int:
        return int(self.counts.shape[0])

    def named(self, name: str) -> Source:
        """The same cells under another name."""
        return replace(self, name=name)

    def columns_in(self, vocabulary: GeneVocabulary) -> np.ndarray:
        """Code of each of its genes in a vocabulary or -1, int32, (G_own,)."""
        other = self.genes.species != vocabulary.species
        table = orthologue_table(vocabulary.species) if other else {}
        codes = (
            next((vocabulary.code(one) for one in (table.get(name, name), name) if one in vocabulary), -1)
            for name in self.genes.names.tolist()
        )
        return np.fromiter(codes, dtype=np.int32, count=len(self.genes))


def gene_table(vocabulary: GeneVocabulary) -> pd.DataFrame:
    """Variable table that is read back as the same genes: symbols where they name one gene alone, else its name.

    Of mouse genes beside human ones some are known by nothing but a symbol, which may be that of a human gene: the
    assembly before it says that it is not.
    """

    def read_back(words: np.ndarray) -> np.ndarray:
        return canonical_genes(words.tolist(), species=vocabulary.species, column=None).names

    names, symbols = (np.array(one, dtype=object) for one in (vocabulary.names, vocabulary.symbols))
    fine = read_back(symbols) == names
    marked = "mm10___" + names
    names = np.where(~fine & (read_back(names) != names) & (read_back(marked) == marked), marked, names)
    unlike = pd.Series(symbols).isin(set(names)).to_numpy() & (symbols != names)
    good = fine & ~pd.Series(symbols).duplicated(keep=False).to_numpy() & ~unlike
    return pd.DataFrame({"gene_ids": names}, index=pd.Index(np.where(good, symbols, names)))


def read_sources(
    paths: list[Path],
    folder: Path,
    names: Sequence[str] | None,
    *,
    layer: str | None,
    species: str,
    column: str | None,
    shown: bool | None,
) -> list[Source]:
    """All sources of all files, each with a name of its own."""
    read: list[tuple[str, Source]] = []
    with progress("reading", shown=shown) as step:
        for number, (path, name) in enumerate(zip(paths, names or file_stems(paths), strict=True), start=1):
            found, _ = stored_sources(path, folder, layer=layer, species=species, column=column)
            read += [(name, source) for source in found]
            step(number, len(paths), None)
    inner = [source.name or name for name, source in read]
    called: list[str] = []
    for one, (name, _) in zip(inner, read, strict=True):
        word = one if inner.count(one) == 1 else f"{name}_{one}"
        called.append(word if word not in called else f"{word}_{len(called) + 1}")
    return [source.named(name) for name, (_, source) in zip(called, read, strict=True)]


def file_stems(paths: Sequence[Path]) -> list[str]:
    """A short name of each file, without suffix; with as many folders before it as tell it from the others."""
    stems = []
    for path in paths:
        whole = path.resolve()
        folders, name = [*whole.parts[1:-1]], whole.name.removesuffix(".gz")
        if name.endswith("matrix.mtx"):
            name = name.removesuffix("matrix.mtx")
        elif path.is_file() or path.suffix == ".zarr":
            name = Path(name).stem
        stems.append([*folders, name.rstrip("_-.")] if name.rstrip("_-.") else folders)
    deepest = max(map(len, stems))
    choices = [["_".join(parts[-depth:]) for parts in stems] for depth in range(1, deepest + 1)]
    return next((found for found in choices if len(set(found)) == len(found)), choices[-1])


def stored_sources(
    path: Path, folder: Path, *, layer: str | None = None, species: str = "auto", column: str | None = None
) -> tuple[list[Source], bool]:
    """Sources of a file, brought into a folder unless they are there from an earlier run.

    A file has one source, a merged file those that it was merged of. The file is read a block of cells at a time where
    it is an .h5ad; what is left in the folder by a killed run is whole or absent.

    Returns
    -------
    list
        Sources; their names are those within the file, "" where it was not merged.
    bool
        Whether the file was read now.
    """
    settings = [FORMAT, layer, species, column]
    place = folder / _digest(path, settings)
    fresh = not place.is_dir()
    if fresh:
        with atomic_path(place) as unfinished:
            unfinished.mkdir()
            _bring_over(path, unfinished, layer, species, column)
            if folder / _digest(path, settings) != place:
                raise CellsError(
                    f"`{path}` has changed while it was read", hint="wait until it is written, then run it again"
                )
    return [_opened(one, path) for one in sorted(place.iterdir())], fresh


def _digest(path: Path, settings: list[Any]) -> str:
    """Name for a file in the state it is in, read with these settings."""
    prefix = path.name.split("matrix.mtx")[0]
    if path.is_dir():
        files = sorted(path.rglob("*"))
    elif path.exists() and prefix == path.name:
        files = [path]
    else:  # a 10x matrix has its lists of cells and genes beside it
        files = sorted(path.parent.glob(f"{glob.escape(prefix)}*"))
    seen = [[str(one), one.stat().st_size, one.stat().st_mtime_ns] for one in files if one.is_file()]
    text = json.dumps([os.path.realpath(path), seen, settings])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _bring_over(path: Path, place: Path, layer: str | None, species: str, column: str | None) -> None:
    adata = read_cells(path, layer=layer, backed=path.suffix == ".h5ad")
    try:
        counts = find_counts(adata, layer=layer, name=str(path), empty_cells="keep")
        for number, part in enumerate(parts_of(adata, str(path))):
            _store(adata, counts, part, place / f"{number:04}", path, species, column)
    finally:
        if adata.isbacked:
            adata.file.close()


def _store(
    adata: AnnData, counts: Counts, part: Part, place: Path, path: Path, species: str, column: str | None
) -> None:
    from anndata import AnnData as Cells

    kept = part.genes_of(counts, name=str(path))
    table = counts.genes[kept]
    genes = canonical_genes(table, species=species, column=column)
    own = GeneVocabulary.from_genes([genes])
    codes = np.array([own.code(name) for name in genes.names.tolist()], dtype=np.int32)
    place.mkdir()
    digest = hashlib.sha256("\n".join(map(str, table.index)).encode())
    sizes, most, whole = [np.zeros(1, dtype=np.int64)], 0.0, True
    with (place / "values").open("wb") as values, (place / "columns").open("wb") as columns:
        for given in part.blocks(counts, kept):
            for array in (given.data, given.indices.astype(np.int32), np.diff(given.indptr).astype(np.int64)):
                digest.update(np.ascontiguousarray(array).data)
            block = brought_over(given, codes, len(own))  # rows of one gene are summed up
            most = max(most, float(block.data.max(initial=0)))
            whole = whole and bool((block.data == np.floor(block.data)).all())
            values.write(np.ascontiguousarray(block.data, dtype=np.float32).data)
            columns.write(np.ascontiguousarray(block.indices, dtype=np.int32).data)
            sizes.append(np.diff(block.indptr).astype(np.int64))
    np.save(place / "indptr.npy", np.cumsum(np.concatenate(sizes)))
    (place / "genes.txt").write_text(own.to_text(), encoding="utf-8")
    obs = adata.obs.iloc[part.rows].copy()
    if part.name and BARCODE in obs and obs[BARCODE].is_unique:  # merged once more: their names are their first ones
        obs.index = pd.Index(obs[BARCODE].astype(str).to_numpy())
    if part.name:
        obs = obs.drop(columns=[SOURCE, BARCODE], errors="ignore").dropna(axis=1, how="all")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_h5ad(place / "obs.h5ad", Cells(obs=_plain(obs)))
    facts = {
        "within": part.name,
        "cells": len(part.rows),
        "genes": len(table),
        "canonical_genes": len(own),
        "species": genes.species,
        "gene_column": genes.column,
        "recognised": round(genes.recognised, 4),
        "counts": counts.source,
        "transform": counts.transform,
        "sha256": digest.hexdigest(),
        "most": most,
        "whole": whole,
        "notes": list(counts.notes),
    }
    (place / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _plain(obs: pd.DataFrame) -> pd.DataFrame:
    """The table with columns of numbers, of truth values and of categories that are words: every format holds these."""
    found: dict[str, Any] = {}
    for key, column in obs.items():
        kind = column.dtype
        if pd.api.types.is_numeric_dtype(kind) and isinstance(kind, np.dtype):
            found[str(key)] = column.to_numpy()
        elif pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind):
            found[str(key)] = column.to_numpy(dtype=np.float64, na_value=np.nan)
        elif isinstance(kind, pd.CategoricalDtype) and kind.categories.astype(str).is_unique:
            found[str(key)] = pd.Categorical.from_codes(column.cat.codes.to_numpy(), kind.categories.astype(str))
        else:
            words = [str(one) if there else None for one, there in zip(column, column.notna(), strict=True)]
            found[str(key)] = pd.Categorical(words)
    names = obs.index.astype(str).to_numpy()
    return pd.DataFrame({key.replace("/", "_"): value for key, value in found.items() if key != "_index"}, index=names)


def _opened(place: Path, path: Path) -> Source:
    from anndata.io import read_h5ad

    facts = json.loads((place / "facts.json").read_text(encoding="utf-8"))
    own = GeneVocabulary.from_text((place / "genes.txt").read_text(encoding="utf-8"))
    indptr = np.load(place / "indptr.npy", allow_pickle=False)
    counts = csr_matrix((len(indptr) - 1, len(own)), dtype=np.float32)
    if indptr[-1] > 0:  # nothing else can be mapped
        if indptr[-1] < np.iinfo(np.int32).max:
            indptr = indptr.astype(np.int32)  # or SciPy would make the columns as wide, in memory
        kinds = (("values", np.float32), ("columns", np.int32))
        counts.data, counts.indices = (np.memmap(place / name, kind, "r") for name, kind in kinds)
        counts.indptr = indptr
    genes = CanonicalGenes(
        np.array(own.names, dtype=str),
        np.array(own.symbols, dtype=str),
        own.species,
        facts["gene_column"],
        facts["recognised"],
    )
    return Source(facts["within"], path, genes, counts, read_h5ad(place / "obs.h5ad").obs, facts)
