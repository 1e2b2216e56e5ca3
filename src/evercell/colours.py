"""Colours of cell types: the same in every plot, page and file of a model.

The types of a model have codes that mean the same for ever, and the colour follows from the code: a type keeps it from
file to file, and after an update too.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

UNKNOWN, UNKNOWN_COLOUR = "Unknown", "#9aa0a6"
HETEROGENEOUS, HETEROGENEOUS_COLOUR = "Heterogeneous", "#c4c8cc"  # CellTypist's word for a cluster without majority

# Ten calm colours, then the colours farthest from all earlier ones in OKLab, with a lightness that reads on white and
# on near-black (0.5 to 0.8) and enough chroma not to be taken for the grey of unknown cells.
# fmt: off
PALETTE = (
    "#4c78c8", "#e8853a", "#3fa66b", "#d1495b", "#8c6bc8", "#2ba6b4", "#c9a227", "#d16ba5",
    "#8a6d4f", "#7fae3a", "#bbb2f1", "#a91097", "#10736a", "#10df8e", "#f1a0a9", "#d66af1",
    "#8ecdb2", "#5846d6", "#8e4f73", "#107c10", "#f197e8", "#a94610", "#61a9f1", "#8534bb",
    "#85d610", "#b21061", "#8e8519", "#10cdf1", "#c47c73", "#f14f10", "#106af1", "#df348e",
    "#10a910", "#dfb285", "#8e8ec4", "#616a22", "#3d6a8e", "#9758f1", "#bbc422", "#6a5897",
)
# fmt: on


def type_colours(types: Iterable[str], *, first: Sequence[str] = ()) -> dict[str, str]:
    """One colour for each cell type, the same in every plot.

    Parameters
    ----------
    types
        Types found in the data, in any order.
    first
        Types whose colours are given out first, in this order; the model's own types, so that two reports by one model
        agree in their colours.

    Returns
    -------
    dict
        Type to hexadecimal colour. Unknown is always grey.
    """
    order = [*dict.fromkeys(first), *sorted(set(types) - set(first))]
    order = [name for name in order if name != UNKNOWN]
    colours = dict(zip(order, PALETTE, strict=False))
    for index, name in enumerate(order[len(PALETTE) :]):
        # The golden angle spreads hues evenly however many types follow; three lightnesses part near neighbours.
        red, green, blue = colorsys.hls_to_rgb(index * 0.61803398875 % 1, (0.45, 0.6, 0.72)[index % 3], 0.6)
        colours[name] = f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
    return colours | {UNKNOWN: UNKNOWN_COLOUR}


def stored_colours(obs: pd.DataFrame, types: Sequence[str]) -> dict[str, list[str]]:
    """Colours of the columns that hold types of a model, as Scanpy keeps them in ``uns``.

    Parameters
    ----------
    obs
        Table of cells; columns whose categories are all types of the model, Unknown or Heterogeneous are coloured.
    types
        Types of the model, by code.

    Returns
    -------
    dict
        ``NAME_colors``: a colour for each category of column NAME, in their order.
    """
    colours = type_colours((), first=types) | {HETEROGENEOUS: HETEROGENEOUS_COLOUR}
    found = {}
    for name, column in obs.items():
        if column.dtype == "category" and set(column.cat.categories) <= colours.keys():
            found[f"{name}_colors"] = [colours[one] for one in column.cat.categories]
    return found
