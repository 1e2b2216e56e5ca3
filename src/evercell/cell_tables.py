"""Tables of cells: those of several sources as one, and what a table beside raw counts says of each cell."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evercell.errors import LabelsError, words_of
from evercell.labels import listed
from evercell.sources import BARCODE, SOURCE, Source

BATCH = "batch"
TABLES = (".csv", ".tsv", ".txt")


def with_table(
    sources: Sequence[Source], table: pd.DataFrame | str | os.PathLike[str]
) -> tuple[list[Source], list[str]]:
    """Sources with the columns of a table joined to their cells.

    Parameters
    ----------
    sources
        Cells of several sources.
    table
        A row a cell: ``barcode``, its name in its file, or the first column where none is called so; ``source``, the
        name of the file without folder and suffix, unless barcodes are unique over all files; further columns.

    Returns
    -------
    sources, notes
        A column that a source has already is replaced for the cells that the table tells. Cells without a row keep
        missing values; the notes say how many.

    Raises
    ------
    LabelsError
        The table cannot be read, names a cell twice or an unknown source, or none of its cells is there.
    """
    called = "the table of cells" if isinstance(table, pd.DataFrame) else f"`{table}`"
    rows = table.copy() if isinstance(table, pd.DataFrame) else _read(Path(table))
    if BARCODE not in rows:
        rows = rows.rename(columns={rows.columns[0]: BARCODE})
    names = [source.name for source in sources]
    if SOURCE in rows and (unknown := sorted(set(rows[SOURCE].astype(str)) - set(names))):
        raise LabelsError(
            f"{called} names the source {listed(unknown)}; the files are {listed(names)}",
            hint="write the name of the file or folder, without suffix, into the column `source`",
        )
    key = [SOURCE, BARCODE] if SOURCE in rows else [BARCODE]
    rows[BARCODE] = rows[BARCODE].astype(str)
    twice = rows[rows.duplicated(key)]
    if len(twice):
        raise LabelsError(
            f"{called} has two rows of cell `{twice[BARCODE].iloc[0]}` ({len(twice):,} rows repeat another)",
            hint="leave one row a cell, or add a column `source` where barcodes are those of several files",
        )
    told, found = 0, []
    for source in sources:
        own = rows[rows[SOURCE].astype(str) == source.name] if SOURCE in rows else rows
        own = own.set_index(BARCODE).drop(columns=SOURCE, errors="ignore")
        place = own.index.get_indexer(source.obs.index.astype(str))
        told += int((place >= 0).sum())
        obs = source.obs.copy()
        for column in own:
            new = own[column].astype(object).reindex(source.obs.index.astype(str)).to_numpy()
            before = obs[column].astype(object).to_numpy() if column in obs else None
            obs[column] = new if before is None else pd.Series(new).where(place >= 0, before).to_numpy()
        found.append(replace(source, obs=obs))
    if not told:
        have = listed(sources[0].obs.index[:2].astype(str))
        raise LabelsError(
            f"no cell of {called} is in the files: its cells are named like {listed(rows[BARCODE][:2])}, theirs {have}",
            hint="bring the column `barcode` to the names that the cells have in their files",
        )
    n_cells = sum(map(len, sources))
    notes = []
    if told < n_cells:
        notes.append(f"{called} tells nothing of {n_cells - told:,} of {n_cells:,} cells")
    if told < len(rows):
        notes.append(f"{len(rows) - told:,} rows of {called} are of no cell in the files")
    return found, notes


def joined_obs(
    sources: Sequence[Source], rows: Sequence[np.ndarray], batch: str | None
) -> tuple[pd.DataFrame, list[str]]:
    """Tables of the cells of all sources one below the other, and what had to be changed."""
    if batch is not None and not any(batch in source.obs for source in sources):
        raise LabelsError(f"no file has a column `{batch}` in obs", hint="name the column of batches with --batch")
    key = batch or BATCH
    batches = any(key in source.obs for source in sources)
    ours = {SOURCE, BARCODE} | ({BATCH} if batches and key != BATCH else set())
    tables, named = [], []
    for source, kept in zip(sources, rows, strict=True):
        table = source.obs.iloc[kept].rename(columns={one: f"original_{one}" for one in ours})
        if batches:
            # The column itself is in the table or, where it was named `batch` and is not asked for, under its new name.
            own = source.obs[key].iloc[kept] if key in source.obs else pd.Series(None, index=table.index, dtype=object)
            named.append(_batches(source.name, own))
            table = table.drop(columns=BATCH, errors="ignore")
        tables.append(table)
    found, notes = joined(tables, [source.name for source in sources])
    if batches:
        found[BATCH] = pd.Categorical(np.concatenate(named))
    sizes = [len(kept) for kept in rows]
    whose = np.repeat(np.arange(len(sources)), sizes)
    found[SOURCE] = pd.Categorical.from_codes(whose, pd.Index([source.name for source in sources]))
    barcodes = np.concatenate([table.index.to_numpy(dtype=object) for table in tables])
    found[BARCODE] = barcodes
    found.index = pd.Index(barcodes + np.array([f"-{source.name}" for source in sources], dtype=object)[whose])
    if not found.index.is_unique:
        from anndata.utils import make_index_unique

        found.index = make_index_unique(found.index)
    return found, notes


def _batches(name: str, column: pd.Series) -> np.ndarray:
    """Batches that name their source; a merged file's do so already."""
    words = ["" if missing else str(one) for one, missing in zip(column, column.isna(), strict=True)]
    whole = [one if one == name or one.startswith(f"{name}/") else f"{name}/{one}" if one else name for one in words]
    return np.array(whole, dtype=object)


def joined(tables: Sequence[pd.DataFrame], names: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Tables one below the other with the columns of all of them; a column that is of two kinds becomes words."""
    found: dict[str, Any] = {}
    notes = []
    for key in dict.fromkeys(str(one) for table in tables for one in table.columns):
        kinds = [_kind(table[key]) if key in table else None for table in tables]
        if set(kinds) == {"truth"} or set(kinds) - {None} == {"numbers"}:
            found[key] = np.concatenate(
                [
                    table[key].to_numpy() if kind else np.full(len(table), np.nan)
                    for table, kind in zip(tables, kinds, strict=True)
                ]
            )
            continue
        if len(set(kinds) - {None}) > 1:
            told = ", ".join(f"{kind} in `{name}`" for name, kind in zip(names, kinds, strict=True) if kind)
            notes.append(f"column `{key}` of obs holds {told}: it is kept as words")
        categories: dict[str, int] = {}
        codes = [_coded(table.get(key), len(table), categories) for table in tables]
        column = pd.Categorical.from_codes(np.concatenate(codes), pd.Index(list(categories), dtype=object))
        plain = len(categories) > len(column) / 2 and not (column.codes < 0).any()
        found[key] = np.asarray(column, dtype=object) if plain else column.remove_unused_categories()
    n_cells = sum(map(len, tables))
    return pd.DataFrame(found, index=pd.RangeIndex(n_cells)), notes


def _kind(column: pd.Series) -> str:
    if isinstance(column.dtype, pd.CategoricalDtype) or column.dtype == object:
        return "words"
    return "truth" if column.dtype == bool else "numbers"


def _coded(column: pd.Series | None, n_cells: int, categories: dict[str, int]) -> np.ndarray:
    """Codes of a column among categories, to which new ones are added; -1 where it has no value."""
    if column is None:
        return np.full(n_cells, -1)
    plain = column.astype("category")
    words = [format(one, ".15g") if isinstance(one, float) else str(one) for one in plain.cat.categories]
    places = np.array([categories.setdefault(word, len(categories)) for word in words] + [-1])
    found: np.ndarray = places[plain.cat.codes.to_numpy()]
    return found


def _read(path: Path) -> pd.DataFrame:
    if not path.name.lower().removesuffix(".gz").endswith(TABLES):
        raise LabelsError(f"`{path}` is no table", hint=f"give a file that ends in {', '.join(TABLES)} (also .gz)")
    try:
        # The separator is told by the file: tables of published data come with either, whatever the suffix.
        found = pd.read_csv(path, sep=None, engine="python", dtype=str)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise LabelsError(f"`{path}` cannot be read ({words_of(error)})", hint="check the path") from error
    if found.shape[1] < 2:
        raise LabelsError(f"`{path}` has one column only", hint="give the barcode and what is to be said of the cell")
    return found
