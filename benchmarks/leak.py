"""What oversampling before the split does to a figure: the leak of published evaluations, shown once.

    python benchmarks/leak.py --seeds 0 1 2

Rare types of the mouse lung (Tabula Muris, 10x, one mouse; the study that published work calls Quake 10x lung) are
oversampled to the size of the largest type, as TransAnno-Net's published script does, either

- `before`: the whole data set is oversampled, then folds are drawn at random: copies of test cells are trained on;
- `after`: folds are drawn first, and training cells alone are oversampled (`--balance oversample`).

`after, oversampled test` scores the honest folds with every type weighing alike, as the oversampled test cells of
`before` do: what is left between the two is the leak alone. Logistic regression and evercell get the same folds.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from tasks import DATA

import evercell as ec
from evercell.crossvalidation import CrossValidation, cross_validate

FILE = DATA / "labelled" / "mouse" / "tm_lung_10x_P7_8.h5ad"
RESULTS = Path(__file__).resolve().parent / "results" / "leak.csv"
LEAST_CELLS = 5  # a type must be in every fold


def oversampled(cells: ad.AnnData, seed: int) -> ad.AnnData:
    """Every type as often as the largest: its cells, then cells of it drawn again."""
    rng = np.random.default_rng(seed)
    label = cells.obs["cell_type"].astype(str).to_numpy()
    most = cells.obs["cell_type"].value_counts().max()
    rows = []
    for name in np.unique(label):
        own = np.flatnonzero(label == name)
        rows.append(np.concatenate([own, rng.choice(own, most - len(own))]))
    copied = cells[np.concatenate(rows)].copy()
    copied.obs_names = [f"{name}/{place}" for place, name in enumerate(copied.obs_names)]
    return copied


def weighed_alike(found: CrossValidation, method: str) -> float:
    """Share of right labels with every type weighing alike."""
    right = (found.cells[method] == found.cells["truth"]).groupby(found.cells["truth"]).mean()
    return float(right.mean())


def main() -> None:
    """Run both ways for every seed and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=12_000, help="training cells drawn by evercell in a fold")
    parser.add_argument("--state", type=Path, help="folder that keeps what is done")
    options = parser.parse_args()

    cells = ad.read_h5ad(FILE)
    sizes = cells.obs["cell_type"].value_counts()
    kept = [name for name in sizes.index[sizes >= LEAST_CELLS] if name != "unknown"]
    cells = cells[cells.obs["cell_type"].isin(kept)].copy()
    settings = ec.ModelSettings(balance="oversample", refit=False)
    settings = replace(settings, training=replace(settings.training, samples=options.samples))
    plain = replace(settings, balance="none")  # before: the copies are there already
    rows = []
    for seed in options.seeds:
        for way, data, how in (("before", oversampled(cells, seed), plain), ("after", cells, settings)):
            found = cross_validate(
                data,
                n_folds=options.folds,
                methods=["evercell", "linear"],
                twins="apart",
                settings=how,
                seed=seed,
                names=[way],
                state_folder=options.state,
                shown=False,
            )
            for method in found.methods:
                accuracy = found.summary().loc[method, ("accuracy", "mean")]
                macro = found.summary().loc[method, ("macro_f1", "mean")]
                leaked = next((one for one in found.warnings if "copy" in one), "")
                row = {"method": method, "seed": seed, "oversampled": way, "accuracy": accuracy, "macro_f1": macro}
                rows.append(row | {"types_alike": weighed_alike(found, method), "cells": data.n_obs, "leak": leaked})
    table = pd.DataFrame(rows)
    RESULTS.parent.mkdir(exist_ok=True)
    table.to_csv(RESULTS, index=False)
    means = table.groupby(["method", "oversampled"], sort=False)[["accuracy", "macro_f1", "types_alike"]].agg(
        ["mean", "std"]
    )
    print(f"{len(kept)} types, {cells.n_obs} cells, {options.folds} folds, seeds {options.seeds}")
    print(means.round(4).to_string())
    wide = table.pivot_table(
        index=["method", "seed"], columns="oversampled", values=["accuracy", "macro_f1", "types_alike"]
    )
    for method in ("evercell", "linear"):
        one = wide.loc[method]
        gap = one[("accuracy", "before")] - one[("accuracy", "after")]
        alike = one[("accuracy", "before")] - one[("types_alike", "after")]
        print(
            f"{method}: accuracy {100 * gap.mean():+.1f} points by oversampling before the split "
            f"({100 * alike.mean():+.1f} against honest folds with types weighing alike)"
        )


if __name__ == "__main__":
    main()
