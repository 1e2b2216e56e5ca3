"""A type has one colour: in every file of a model, after updates, in Scanpy's figures and in files written by parts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from evercell.annotation import annotate
from evercell.annotator import Annotator
from evercell.checkpoint import save
from evercell.colours import HETEROGENEOUS, PALETTE, UNKNOWN, UNKNOWN_COLOUR, stored_colours, type_colours


def oklab(colour: str) -> np.ndarray:
    """Lightness and two axes of colour, in which a distance is about what an eye sees (Ottosson 2020)."""
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_cones) @ linear)


def test_colours_can_be_told_apart() -> None:
    assert len(PALETTE) >= 30
    shades = [oklab(one) for one in (*PALETTE, UNKNOWN_COLOUR)]
    nearest = min(np.linalg.norm(one - other) for one, other in itertools.combinations(shades, 2))
    assert nearest > 0.05  # 0.02 is about the least that is seen side by side


def test_colours_are_distinct_and_follow_the_model() -> None:
    names = [f"type {i:03d}" for i in range(300)]
    colours = type_colours(names)
    assert len(set(colours.values())) == 301 and colours[UNKNOWN] == UNKNOWN_COLOUR
    # A second sample, in which half the types are missing, is coloured as the first where the model names its types.
    assert type_colours(names[30:], first=names)["type 040"] == colours["type 040"]


def test_types_of_an_update_leave_the_colours_of_the_old_ones() -> None:
    before, after = type_colours((), first=["t", "b"]), type_colours((), first=["t", "b", "a"])
    assert before.items() <= after.items()
    assert after["a"] == PALETTE[2]


def test_columns_of_types_get_colours_and_others_do_not() -> None:
    obs = pd.DataFrame(
        {
            "label": pd.Categorical(["b", UNKNOWN], categories=["b", UNKNOWN]),
            "voted": pd.Categorical(["b", HETEROGENEOUS]),
            "donor": pd.Categorical(["d1", "d2"]),
            "text": ["b", "b"],
        }
    )
    found = stored_colours(obs, ["t", "b"])
    assert found["label_colors"] == [PALETTE[1], UNKNOWN_COLOUR]
    assert list(found) == ["label_colors", "voted_colors"]
    assert len(set(found["voted_colors"]) | {UNKNOWN_COLOUR}) == 3


def test_two_samples_agree_whatever_types_they_hold(model: Annotator, query: ad.AnnData) -> None:
    of: dict[str, set[str]] = {}
    for cells in (query, query[query.obs["cell_type"] != query.obs["cell_type"].iloc[0]]):
        annotated = cells.copy()
        annotate(model, annotated, reject=0.2, majority=True, inplace=True)
        for column in ("evercell", "evercell_majority"):
            names, colours = annotated.obs[column].cat.categories, annotated.uns[f"{column}_colors"]
            assert set(names) == set(annotated.obs[column])  # none that has no cell
            for name, colour in zip(names, colours, strict=True):
                of.setdefault(name, set()).add(colour)
    assert of[UNKNOWN] == {UNKNOWN_COLOUR}
    assert all(len(colours) == 1 for colours in of.values()) and len(of) == len(model.types) + 1


@pytest.mark.parametrize("compat", [[], ["--compat", "celltypist"]])
def test_a_file_written_by_parts_has_the_colours_too(
    model: Annotator, query: ad.AnnData, tmp_path: Path, run: Callable[..., tuple[int, str, str]], compat: list[str]
) -> None:
    save(model, tmp_path / "model")
    query.uns["cell_type_colors"] = ["#000000"] * 4
    query.uns["evercell_colors"] = ["#ffffff"]  # of an earlier annotation
    query.write_h5ad(tmp_path / "query.h5ad")
    call = ["annotate", tmp_path / "query.h5ad", "--model", tmp_path / "model", "--output", tmp_path / "found.h5ad"]
    code, _, err = run(*call, "--majority", "--reject", "0.2", *compat)
    assert code == 0, err
    found = ad.read_h5ad(tmp_path / "found.h5ad")
    annotate(model, query, reject=0.2, majority=True, inplace=True)
    assert list(found.uns["cell_type_colors"]) == ["#000000"] * 4
    columns = ["evercell", "evercell_majority", *(["predicted_labels", "majority_voting"] if compat else [])]
    for column in columns:
        assert len(found.uns[f"{column}_colors"]) == len(found.obs[column].cat.categories)
    for column in columns[:2]:
        assert list(found.uns[f"{column}_colors"]) == query.uns[f"{column}_colors"]


def test_scanpy_draws_a_type_in_its_colour(model: Annotator, query: ad.AnnData) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import scanpy as sc

    some = query[query.obs["cell_type"].isin(query.obs["cell_type"].cat.categories[[1, 3]])].copy()
    annotate(model, some, reject="off", inplace=True)
    some.obsm["X_umap"] = some.obsm["X_evercell"][:, :2]
    figure = sc.pl.umap(some, color="evercell", show=False, return_fig=True)
    axes = figure.axes[0]
    drawn = {mpl.colors.to_hex(one) for one in axes.collections[0].get_facecolors()}
    by_code = type_colours((), first=model.types.names)
    assert drawn == {by_code[name] for name in set(some.obs["evercell"])}
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == [name for name in model.types.names if name in set(some.obs["evercell"])]


def test_scanpy_ranks_genes_where_a_type_has_no_cell(model: Annotator, query: ad.AnnData) -> None:
    import scanpy as sc

    some = query[query.obs["cell_type"].isin(query.obs["cell_type"].cat.categories[[1, 3]])].copy()
    annotate(model, some, reject="off", inplace=True)
    sc.pp.normalize_total(some)
    sc.pp.log1p(some)
    common = [name for name, cells in some.obs["evercell"].value_counts().items() if cells > 1]
    assert len(common) == some.obs["evercell"].nunique() == 2
    sc.tl.rank_genes_groups(some, "evercell")
    assert set(some.uns["rank_genes_groups"]["names"].dtype.names) == set(common)
