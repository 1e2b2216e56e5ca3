"""Labels as a data set or a user gives them: the column of cell types, and the file that says what a label means."""

from __future__ import annotations

import csv
import difflib
import importlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import ontology
from .errors import LabelsError

if TYPE_CHECKING:
    import anndata as ad

__all__ = ["is_unassigned", "listed", "read_labels", "read_mapping"]

UNASSIGNED = frozenset(
    {"", "nan", "na", "n/a", "none", "null", "<na>", "unknown", "unassigned", "not assigned", "unlabelled", "unlabeled"}
)


def is_unassigned(label: object) -> bool:
    """Whether a label says that the cell has none: missing, empty, "unknown", "unassigned" and their like."""
    if label is None or label is pd.NA or (isinstance(label, float) and np.isnan(label)):
        return True
    return str(label).strip().casefold() in UNASSIGNED


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names in backticks, the first `most` of them."""
    shown = [f"`{name}`" for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def read_labels(
    adata: ad.AnnData, key: str, *, name: str = "the data", min_cells: int = 1, least_types: int = 2
) -> pd.Series:
    """Labels of the cells from a column of `obs`.

    Parameters
    ----------
    adata
        Cells.
    key
        Column of `obs`.
    name
        File or data set, for messages.
    min_cells
        Types with fewer cells are reported in the notes; their cells keep their label.
    least_types
        As many types must be named: two for a first model, one for an update.

    Returns
    -------
    Series
        (cells,) strings, indexed by cell name; NA where the cell has no label (missing, empty, "unknown", "unassigned"
        and their like). `attrs["notes"]` holds a sentence for each thing worth telling the user.

    Raises
    ------
    LabelsError
        The column is not there, holds measurements, or names too few types.
    """
    obs = adata.obs
    if key not in obs.columns:
        alike = [column for column in label_columns(obs) if column != key]
        near = difflib.get_close_matches(key, [str(column) for column in obs.columns], n=3, cutoff=0.6)
        offered = list(dict.fromkeys(near + alike))
        raise LabelsError(
            f"`{name}` has no column `{key}` in obs; columns: {listed(map(str, obs.columns), 12) or 'none'}",
            hint=f"labels may be in {listed(offered, 5)}; name the column with --labels"
            if offered
            else "name the column that holds the cell types with --labels",
        )
    column = obs[key]
    if pd.api.types.is_float_dtype(column) and not (column.dropna() % 1 == 0).all():
        raise LabelsError(
            f"column `{key}` of `{name}` holds measurements such as {column.dropna().iloc[0]:g}, not cell types",
            hint=f"columns with labels: {listed(label_columns(obs), 5) or 'none found'}; name one with --labels",
        )
    if pd.api.types.is_float_dtype(column):  # cluster numbers that became floats because some cells have none
        column = column.astype("Int64")
    values = column.astype("object").map(lambda label: None if is_unassigned(label) else str(label).strip())
    labels = pd.Series(pd.array(values.tolist(), dtype="string"), index=obs.index, name=key)
    counts = labels.value_counts()
    if len(counts) < least_types:
        found = f"only `{counts.index[0]}`" if len(counts) else "no label"
        needed = "two cell types are" if least_types == 2 else "one cell type is"
        raise LabelsError(
            f"column `{key}` of `{name}` names {found}; at least {needed} needed",
            hint="name the column that holds the cell types with --labels",
        )
    notes = []
    without = int(labels.isna().sum())
    if without:
        notes.append(f"{without:,} of {len(labels):,} cells of `{name}` have no label in `{key}` and are set aside")
    rare = counts[counts < min_cells]
    if len(rare):
        counted = ", ".join(f"`{label}` ({cells})" for label, cells in rare.items())
        notes.append(f"types with fewer than {min_cells} cells in `{name}`: {counted}")
    labels.attrs["notes"] = notes
    return labels


def label_columns(obs: pd.DataFrame) -> list[str]:
    """Columns of text that repeat as labels do, those named like labels first."""
    found = []
    for column in obs.columns:
        values = obs[column]
        textual = isinstance(values.dtype, pd.CategoricalDtype) or not pd.api.types.is_numeric_dtype(values)
        kinds = values.nunique()
        if textual and 2 <= kinds <= max(2, min(300, len(obs) // 2)):
            named = bool(re.search(r"type|label|annot|ident|class|cluster", str(column), re.IGNORECASE))
            known = sum(ontology.find(str(label)) is not None for label in values.dropna().unique()[:300])
            # a column whose values the ontology knows holds cell types, whatever it is called
            found.append((-(named + 2 * (known >= kinds / 2)), str(column)))
    return [column for _, column in sorted(found)]


def read_mapping(path: str | Path) -> dict[str, str]:
    """Label -> name of a type, from the user's file.

    Parameters
    ----------
    path
        `.json` or `.yaml`: one object of label: name. `.csv` or `.tsv`: a header with the columns `label` and `name`,
        as `evercell reconcile` writes them; a line without a name leaves its label open.

    Raises
    ------
    LabelsError
        The file is not there, of another kind, not such a table, or names a label twice.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in {".json", ".yaml", ".yml", ".csv", ".tsv"}:
        raise LabelsError(f"`{path.name}` is not a mapping that can be read", hint="give a .yaml, .json or .csv file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LabelsError(
            f"mapping `{path.name}` cannot be read ({error})", hint="check the path that --mapping names"
        ) from error
    if kind in {".csv", ".tsv"}:
        pairs = _table_pairs(text, path.name, "\t" if kind == ".tsv" else ",")
    else:
        pairs = _object_pairs(text, path.name, kind)
    mapping: dict[str, str] = {}
    for label, name in pairs:
        for value in (label, name):
            if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
                raise LabelsError(
                    f"`{path.name}` maps `{label}` to `{name}`; both must be names",
                    hint="write names in quotation marks",
                )
        if str(label) in mapping and mapping[str(label)] != str(name).strip():
            raise LabelsError(f"`{path.name}` maps `{label}` to `{mapping[str(label)]}` and to `{name}`; keep one")
        mapping[str(label)] = str(name).strip()
    return mapping


def _table_pairs(text: str, name: str, delimiter: str) -> list[tuple[Any, Any]]:
    rows = csv.DictReader(text.splitlines(), delimiter=delimiter)
    if not {"label", "name"} <= set(rows.fieldnames or ()):
        raise LabelsError(
            f"`{name}` has the columns {listed(rows.fieldnames or ()) or 'none'}; expected `label` and `name`",
            hint="write a first line with the names of the columns",
        )
    return [(row["label"], row["name"]) for row in rows if (row["name"] or "").strip()]


def _object_pairs(text: str, name: str, kind: str) -> list[tuple[Any, Any]]:
    try:
        if kind == ".json":
            # pairs, not a dict: a label given twice must be seen
            stored = json.loads(text, object_pairs_hook=list)
            pairs = stored if isinstance(stored, list) and all(isinstance(one, tuple) for one in stored) else None
        else:
            loaded = importlib.import_module("yaml").safe_load(text)
            pairs = list(loaded.items()) if isinstance(loaded, dict) else None
    except ModuleNotFoundError:
        raise LabelsError(
            f"reading `{name}` needs PyYAML", hint="install PyYAML, or give a .json or .csv file"
        ) from None
    except Exception as error:
        raise LabelsError(f"`{name}` is not {kind.lstrip('.')}: {error}", hint="expected label: name") from error
    if pairs is None:
        raise LabelsError(f"`{name}` does not hold one object of label: name")
    return pairs
