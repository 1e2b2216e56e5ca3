"""Accept clusters of unknown cells as cell types: the table that the user edited is read, checked and applied."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from evercell.errors import LabelsError, words_of
from evercell.labels import is_unassigned, listed

if TYPE_CHECKING:
    from anndata import AnnData

YES = frozenset({"yes", "y", "true", "1", "x"})
NO = frozenset({"no", "n", "false", "0", "", "nan"})
NEEDED = ("cluster", "name", "accept")


def accepted(
    adata: AnnData,
    table: pd.DataFrame | str | Path,
    *,
    labels: str = "cell_type",
    key: str = "evercell",
    name: str = "the data",
) -> AnnData:
    """The cells of accepted clusters, with the names that the user gave as their labels, to `update` a model with.

    Clusters that are given one name become one type. The name of a type that the model has means that the cells are of
    that type.

    Parameters
    ----------
    adata
        Cells with the clusters of `discover` in ``obs``.
    table
        Table of `discover` with ``name`` and ``accept`` filled in, or the path of one (``.csv``, ``.tsv``; separated by
        commas, semicolons or tabs). Rows that were removed are not accepted.
    labels
        Column of ``obs`` that the names are written to.
    key
        Prefix of the names that `discover` wrote.
    name
        What messages call the data.

    Returns
    -------
    anndata.AnnData
        A copy of the accepted cells, all columns kept.

    Raises
    ------
    LabelsError
        The table cannot be used: a row names no cluster of the data, is there twice, was accepted without a name, or
        none was accepted.

    Examples
    --------
    >>> import evercell as ec
    >>> from evercell.finetuning import quick_settings
    >>> from evercell.testing import synthetic_cells
    >>> model = ec.train(synthetic_cells(seed=1), groups="donor", settings=quick_settings())
    >>> query = synthetic_cells(300, n_types=6, seed=2)
    >>> found = ec.discover(model, query, reject=0.1)
    >>> found.write_into(query)
    >>> found.table.loc[0, ["name", "accept"]] = "acinar", "yes"
    >>> cells = ec.accepted(query, found.table)
    >>> cells.obs["cell_type"].unique().tolist()
    ['acinar']
    >>> new = ec.update(model, cells, strategy="analytic", mapping={"acinar": "acinar"})
    >>> new.types.names[-1]
    'acinar'
    """
    column = f"{key}_cluster"
    if column not in adata.obs:
        raise LabelsError(f"`{name}` has no column `{column}` in obs", hint="give the file that `discover` wrote")
    source = "the table" if isinstance(table, pd.DataFrame) else f"`{Path(table)}`"
    rows = table if isinstance(table, pd.DataFrame) else _read(Path(table))
    missing = [one for one in NEEDED if one not in rows]
    if missing:
        raise LabelsError(
            f"{source} has no column {listed(missing)}; columns: {listed(map(str, rows.columns)) or 'none'}",
            hint="edit the table that `discover` wrote, and keep its first line",
        )
    cells = adata.obs[column].astype(object).where(adata.obs[column].notna(), "").astype(str)
    names = _names(rows, cells.value_counts().drop("", errors="ignore").to_dict(), source, name)
    keep = cells.isin(list(names)).to_numpy()
    chosen = adata[keep].copy()
    chosen.obs[labels] = pd.Categorical(cells[keep].map(names))
    return chosen


def _names(rows: pd.DataFrame, sizes: dict[str, int], source: str, name: str) -> dict[str, str]:
    """Accepted cluster -> name of its type; every row is checked, accepted or not."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    for number, row in enumerate(rows.to_dict(orient="records"), start=2):
        cluster, given, word = (_text(row[one]) for one in NEEDED)
        if not any(map(_text, row.values())):
            continue  # an empty line, as a spreadsheet leaves it
        where = f"line {number} of {source}"
        if cluster not in sizes:
            raise LabelsError(
                f"{where}: `{name}` has no cluster `{cluster}`; it has {listed(sizes) or 'none'}",
                hint="give the file and the table of one run of `discover`, and leave its column `cluster` as it is",
            )
        if cluster in seen:
            raise LabelsError(f"{where}: `{cluster}` is there twice", hint="keep one row for each cluster")
        seen.add(cluster)
        size = _text(row.get("cells", ""))
        if size.isdigit() and int(size) != sizes[cluster]:
            raise LabelsError(
                f"{where}: `{cluster}` has {int(size):,} cells, in `{name}` it has {sizes[cluster]:,}",
                hint="give the file and the table of one run of `discover`",
            )
        if word.casefold() not in YES | NO:
            raise LabelsError(f"{where}: accept is `{word}` for `{cluster}`", hint="write yes or no, or leave it empty")
        if word.casefold() in NO:
            continue
        if is_unassigned(given):
            what = f"the name `{given}` says that cells have no type" if given else "it has no name"
            raise LabelsError(
                f"{where}: `{cluster}` is accepted, but {what}", hint="write the name of the cell type into `name`"
            )
        found[cluster] = given
    if not found:
        raise LabelsError(
            f"{source} accepts none of the {len(seen):,} clusters",
            hint="write a type's name into `name` and yes into `accept`, for each cluster that you recognise",
        )
    return found


def _text(value: Any) -> str:
    return "" if pd.isna(value) else str(value).strip()


def _read(path: Path) -> pd.DataFrame:
    """Table as text; spreadsheets of some countries separate by semicolons."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        return pd.read_csv(
            path, sep=max(",;\t", key=first.count), dtype=str, keep_default_na=False, encoding="utf-8-sig"
        )
    except FileNotFoundError:
        raise LabelsError(f"there is no table `{path}`", hint="give the table that `discover --table` wrote") from None
    except (OSError, ValueError) as error:  # what is no text and what is no table
        what = words_of(error)
        raise LabelsError(f"`{path}` cannot be read as a table: {what}", hint="save it as .csv or .tsv") from error
