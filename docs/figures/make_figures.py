"""Pictures of the documentation, by the commands of its pages: `python docs/figures/make_figures.py`, ten minutes."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import scanpy as sc

from evercell.cli import main

HERE = Path(__file__).parent


def run(*words: str) -> None:
    """Run a command, and stop where it fails."""
    if code := main(list(words)):
        sys.exit(code)


def annotated(folder: Path) -> None:
    """Cells of an unseen study in a map of their representation, coloured by label."""
    query, output = str(folder / "studies" / "tritschler_unseen.h5ad"), str(folder / "annotated.h5ad")
    run("annotate", query, "--model", "human-pancreas", "--output", output)
    cells = sc.read_h5ad(output)
    sc.pp.neighbors(cells, use_rep="X_evercell")
    sc.tl.umap(cells)
    figure, axes = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
    sc.pl.umap(cells, color="evercell", ax=axes, show=False, size=60, frameon=False, title="")
    figure.savefig(HERE / "annotated.png", dpi=110)


def compared(folder: Path) -> None:
    """evercell beside other methods, whole donors held out."""
    query, output = str(folder / "studies" / "fasolino_stage2.h5ad"), folder / "compared"
    words = ("--labels", "cell_type", "--by", "donor", "--folds", "3", "--methods", "evercell,linear,knn")
    run("compare", query, *words, "--output", str(output))
    (HERE / "compared.png").write_bytes((output / "compared.png").read_bytes())


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        run("example", "pancreas", "--output", str(Path(name) / "studies"))
        annotated(Path(name))
        compared(Path(name))
