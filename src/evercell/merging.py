"""`merge`: files of cells brought into one, with what each of them measured, and without a cell twice."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from evercell import __version__
from evercell.cell_tables import joined_obs, with_table
from evercell.cells import READABLE, write_table
from evercell.duplicates import ONE_CELL, Duplicates, find_duplicates
from evercell.errors import CellsError, EvercellError, GenesError, SettingsError
from evercell.genes import GeneVocabulary, brought_over
from evercell.h5_files import h5_file, write_tables
from evercell.locking import locked
from evercell.outputs import atomic_path, check_folder, full_disk_told, remove_whole
from evercell.progress import progress
from evercell.sources import (
    MEASURED,
    MERGE,
    ROWS,
    Source,
    gene_table,
    read_sources,
    unmerged,
)

__all__ = ["Merge", "merge", "unmerged"]

SUFFIXES = (".h5ad", ".zarr")
STORED = 1 << 16  # values of the output compressed together
LEAST_SHARED = 0.05  # of the genes of a source, or of all others where they are fewer


@dataclass(frozen=True)
class Merge:
    """What `merge` made.

    Parameters
    ----------
    path
        The merged file.
    manifest
        What is in it and where it is from, also written beside it.
    duplicates
        A row for each pair of cells that are one cell or have one barcode, also written beside it.
    """

    path: Path
    manifest: dict[str, Any]
    duplicates: pd.DataFrame


def merge(
    files: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    genes: Literal["union", "intersection"] = "union",
    duplicates: Literal["drop", "keep", "error"] = "drop",
    species: str = "auto",
    layer: str | None = None,
    gene_column: str | None = None,
    batch: str | None = None,
    names: Sequence[str] | None = None,
    cells: pd.DataFrame | str | os.PathLike[str] | None = None,
    shown: bool | None = None,
) -> Merge:
    """Bring files of cells into one file of raw counts, in constant memory.

    Genes are matched by what they are, not by how they are written; mouse genes beside human ones go through one-to-one
    orthologues. Of a cell that several files hold, or one file twice, the copy given first is kept. In a union, genes
    that a source did not measure have no counts in the file; `train`, `update` and `pretrain` know them from
    ``varm["measured"]`` and take each source as a data set of its own (see `unmerged`).

    A call that was killed goes on where it was when it is made again: what has been read lies in a hidden folder beside
    the output, which is removed at the end. It takes about eight bytes a count.

    Parameters
    ----------
    files
        Files in any format of `read_cells`; a merged file counts as the sources that it was merged of.
    output
        ``.h5ad`` or ``.zarr``; ``.manifest.json`` and, where there are any, ``.duplicates.csv`` are written beside it.
    genes
        ``"union"``: all genes that a file measured; ``"intersection"``: those that all of them did.
    duplicates
        ``"drop"`` all copies of a cell but the first; ``"keep"`` them; ``"error"``: write nothing if there are any.
        Cells with one barcode but other counts are different cells: they are reported and kept.
    species, layer, gene_column
        As `train` takes them, for all files.
    batch
        Column of ``obs`` with batches: the column ``batch`` of the output is the source and that. By default a column
        of this name is made to name its source too.
    names
        Names of the files in the output; by default without folder and suffix.
    cells
        Table with a row a cell: ``barcode``, ``source`` and columns for ``obs`` (see `cell_tables.with_table`).
    shown
        Show progress; by default in a terminal.

    Returns
    -------
    Merge
        ``obs`` of the file holds all columns of the sources, ``source`` and ``barcode``, the name of the cell there;
        cells are named ``<barcode>-<source>``. Other matrices, embeddings and ``uns`` of the sources are left behind.

    Raises
    ------
    CellsError, GenesError, LabelsError, SettingsError
        A file cannot be used, files share no genes, cells are there twice and that is an error, or a setting is wrong.

    Examples
    --------
    >>> import evercell as ec, tempfile
    >>> from evercell.testing import synthetic_cells
    >>> folder = Path(tempfile.mkdtemp())
    >>> synthetic_cells(50, seed=1).write_h5ad(folder / "human.h5ad")
    >>> synthetic_cells(40, seed=2, species="mouse").write_h5ad(folder / "mouse.h5ad")
    >>> found = ec.merge([folder / "human.h5ad", folder / "mouse.h5ad"], folder / "both.h5ad")
    >>> found.manifest["cells"], found.manifest["genes"], found.manifest["genes_measured_by_all"]
    (90, 300, 300)
    """
    paths, output = [Path(file) for file in files], Path(output)
    _check(paths, output, genes, duplicates, names)
    target = Path(os.path.realpath(output))
    folder = target.with_name(f".{target.name}.parts")
    with locked(output):
        try:
            with full_disk_told(output, folder):
                folder.mkdir(exist_ok=True)
                sources = read_sources(
                    paths, folder, names, layer=layer, species=species, column=gene_column, shown=shown
                )
                told: list[str] = []
                if cells is not None:
                    sources, told = with_table(sources, cells)
                read_as = [layer, species, gene_column]
                found = _merged(sources, (output, folder), genes, duplicates, batch, read_as, told, shown)
        except EvercellError:  # this call would fail again: nothing of it is of use
            remove_whole(folder)
            raise
        remove_whole(folder)
    return found


def beside(output: Path, ending: str) -> Path:
    """A file that is written beside the output, such as ``.manifest.json``."""
    return output.with_name(output.stem + ending)


def _check(paths: list[Path], output: Path, genes: str, duplicates: str, names: Sequence[str] | None) -> None:
    """Everything that can be said before a file is read."""
    if output.suffix not in SUFFIXES:
        raise CellsError(f"`{output}` does not end in .h5ad or .zarr", hint="give the output one of these suffixes")
    check_folder(output)
    if genes not in ("union", "intersection"):
        raise SettingsError(f"genes is `{genes}`", hint="pass --genes union or --genes intersection")
    if duplicates not in ("drop", "keep", "error"):
        raise SettingsError(f"duplicates is `{duplicates}`", hint="pass --duplicates drop, keep or error")
    if not paths:
        raise SettingsError("no files were given", hint="name the files to be merged")
    if names is not None and (len(names) != len(paths) or len(set(names)) < len(names) or not all(names)):
        raise SettingsError(f"{len(paths)} files with the names {list(names)}", hint="give each file a name of its own")
    seen: set[str] = set()
    for path in paths:
        place = os.path.realpath(path)
        if place in seen:
            raise SettingsError(f"`{path}` is given twice", hint="give each file once")
        seen.add(place)
        if not path.exists() and not any(path.parent.glob(f"{path.name}*matrix.mtx*")):
            raise CellsError(f"`{path}` does not exist", hint="check the path")
        if path.is_dir() and path.suffix != ".zarr" and not any(path.glob("*matrix.mtx*")):
            raise CellsError(f"the folder `{path}` holds no 10x matrix", hint=f"name the files: {READABLE}")
    if os.path.realpath(output) in seen:
        raise SettingsError(f"`{output}` is one of the files to be merged", hint="choose another --output")


def _merged(
    sources: list[Source],
    places: tuple[Path, Path],
    genes: Literal["union", "intersection"],
    how: str,
    batch: str | None,
    read_as: list[Any],
    told: list[str],
    shown: bool | None,
) -> Merge:
    output, folder = places
    vocabulary = _vocabulary(sources, genes)
    columns = [source.columns_in(vocabulary) for source in sources]
    measured = np.zeros((len(vocabulary), len(sources)), dtype=bool)
    for number, codes in enumerate(columns):
        measured[codes[codes >= 0], number] = True
    twice = find_duplicates(sources, shown=shown)
    _refuse(twice, how)
    filled = [_filled(source, codes, len(vocabulary)) for source, codes in zip(sources, columns, strict=True)]
    left_out = [mask & (how == "drop") for mask in twice.twice]
    rows = [np.flatnonzero(has & ~out) for has, out in zip(filled, left_out, strict=True)]
    if not sum(map(len, rows)):
        raise CellsError("no cell is left: none has a count of a gene that all files measured", hint="--genes union")
    obs, notes = joined_obs(sources, rows, batch)
    # Two genes of a source that are one of the output are summed up: rare, and at most doubles a count.
    most = max(
        s.facts["most"] * np.unique(c, return_counts=True)[1].max() for s, c in zip(sources, columns, strict=True)
    )
    whole = all(source.facts["whole"] for source in sources) and most < 2**32
    manifest = {
        "evercell": __version__,
        "genes_of": genes,
        "duplicates_are": {"drop": "dropped", "keep": "kept"}.get(how, "an error"),
        "batch": batch,
        **dict(zip(("layer", "species_given", "gene_column"), read_as, strict=True)),
        "species": vocabulary.species,
        "cells": len(obs),
        "genes": len(vocabulary),
        "genes_measured_by_all": int(measured.all(axis=1).sum()),
        "duplicates": {**twice.counted(), "expected by chance of `same barcode only`": round(twice.by_chance, 1)},
        "notes": [*twice.notes, *(twice.poorer(sources) if how == "drop" else ()), *notes, *told],
        "sources": [
            _facts(*one, n_matched=int(measured[:, number].sum()))
            for number, one in enumerate(zip(sources, filled, left_out, rows, strict=True))
        ],
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    var = gene_table(vocabulary)
    var["sources"] = measured.sum(axis=1)
    blocks = _blocks(sources, rows, columns, len(vocabulary), np.min_scalar_type(int(most)) if whole else np.float32)
    n_values = sum(int(np.diff(s.counts.indptr)[r].sum()) for s, r in zip(sources, rows, strict=True))
    uns = {MERGE: {"sources": np.array([s.name for s in sources], dtype=object), "manifest": text}}
    half = folder / output.name  # what a killed run leaves of it goes with the folder
    shutil.rmtree(half, ignore_errors=True)
    with progress("writing", shown=shown) as step:
        _write(half, blocks, obs=obs, var=var, measured=measured, uns=uns, wide=n_values >= 2**31, step=step)
    with atomic_path(output) as unfinished:
        half.rename(unfinished)
        # Before the file itself appears: where it is new, the others are.
        table = beside(output, ".duplicates.csv")
        table.unlink(missing_ok=True)
        if len(twice.table):
            write_table(twice.table.set_index("kind"), table)
        with atomic_path(beside(output, ".manifest.json")) as manifest_file:
            manifest_file.write_text(text + "\n", encoding="utf-8")
    return Merge(output, manifest, twice.table)


def _vocabulary(sources: Sequence[Source], how: Literal["union", "intersection"]) -> GeneVocabulary:
    """Genes of the output, once every source is seen to share enough of them with the others."""
    species = GeneVocabulary.from_genes([source.genes for source in sources])
    codes = [source.columns_in(species) for source in sources]
    measured = np.zeros((len(sources), len(species)), dtype=bool)
    for number, own in enumerate(codes):
        measured[number, own] = True
    n_sources = measured.sum(axis=0)
    for number, source in enumerate(sources if len(sources) > 1 else ()):
        shared = int((measured[number] & (n_sources > 1)).sum())
        others = int((n_sources - measured[number] > 0).sum())
        if shared < max(LEAST_SHARED * min(len(source.genes), others), 1):
            like = ", ".join(f"`{name}`" for name in source.genes.symbols[:2])
            raise GenesError(
                f"`{source.path}` shares {shared:,} of its {len(source.genes):,} genes with the other files: they are "
                f"named like {like}; {source.genes.recognised:.0%} are {source.genes.species} genes that are known",
                hint="pass --gene-column with the column that holds symbols or Ensembl ids, --species, or leave it out",
            )
    found = GeneVocabulary.from_genes([source.genes for source in sources], how=how)
    if not len(found):
        raise GenesError(f"the {len(sources)} sources have no gene in common", hint="pass --genes union")
    return found


def _refuse(found: Duplicates, how: str) -> None:
    if how != "error" or not any(mask.any() for mask in found.twice):
        return
    first = found.table[found.table["kind"].isin(ONE_CELL)].iloc[0]
    raise CellsError(
        f"{sum(int(mask.sum()) for mask in found.twice):,} cells are there twice; the first is `{first['later_cell']}` "
        f"of `{first['later_source']}`, which is `{first['cell']}` of `{first['source']}` ({first['kind']})",
        hint="pass --duplicates drop to keep the first of each, or --duplicates keep",
    )


def _filled(source: Source, columns: np.ndarray, n_genes: int) -> np.ndarray:
    """Cells with a count of a gene of the output (N,), bool."""
    if (columns >= 0).all():
        return np.diff(source.counts.indptr) > 0
    sizes = [
        np.diff(brought_over(source.counts[start : start + ROWS], columns, n_genes).indptr)
        for start in range(0, len(source), ROWS)
    ]
    return np.concatenate(sizes) > 0


def _facts(
    source: Source, filled: np.ndarray, left_out: np.ndarray, rows: np.ndarray, *, n_matched: int
) -> dict[str, Any]:
    facts = {key: value for key, value in source.facts.items() if key not in ("most", "whole", "canonical_genes")}
    return {
        "name": source.name,
        "path": str(source.path),
        **facts,
        "genes_in_output": n_matched,
        "empty_cells_left_out": int((~filled).sum()),
        "duplicates_left_out": int((left_out & filled).sum()),
        "cells_written": len(rows),
    }


def _blocks(
    sources: Sequence[Source], rows: Sequence[np.ndarray], columns: Sequence[np.ndarray], n_genes: int, kind: Any
) -> Iterator[csr_matrix]:
    for source, kept, codes in zip(sources, rows, columns, strict=True):
        for start in range(0, len(kept), ROWS):
            yield brought_over(source.counts[kept[start : start + ROWS]], codes, n_genes).astype(kind)


def _write(
    path: Path,
    blocks: Iterator[csr_matrix],
    *,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    measured: np.ndarray,
    uns: dict[str, Any],
    wide: bool,
    step: Any,
) -> None:
    """Write tables, then counts block by block."""
    import warnings

    from anndata import AnnData
    from anndata.io import sparse_dataset, write_elem, write_zarr

    settings: dict[str, Any] = {"chunks": (STORED,), "indptr_dtype": np.dtype(np.int64 if wide else np.int32)}
    tables = AnnData(obs=obs, var=var, varm={MEASURED: measured}, uns=uns)
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        if path.suffix == ".h5ad":
            store: Any = stack.enter_context(h5_file(path))
            write_tables(store, tables, compression="gzip")
            settings["compression"] = "gzip"
        else:
            import zarr

            write_zarr(path, tables, convert_strings_to_categoricals=False)
            store = zarr.open_group(str(path), mode="r+", use_consolidated=False)
        if "X" in store:
            del store["X"]
        done, matrix = 0, None
        for block in blocks:
            if matrix is None:
                write_elem(store, "X", block, dataset_kwargs=settings)
                matrix = sparse_dataset(store["X"])
            else:
                matrix.append(block)
            done += block.shape[0]
            step(done, len(obs), None)
        if path.suffix == ".zarr":
            zarr.consolidate_metadata(store.store)
