"""A model that CellTypist itself trained and wrote, imported: does it say the same of cells of another study?

    pip install -e ".[bench]"
    python benchmarks/imported_celltypist.py

Trained on one packaged pancreas example, compared on another; then taught the next study by `update` and written as a
table. Prints one line a figure.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import numpy as np
import scanpy as sc
from scipy.special import expit, softmax

import evercell as ec
from evercell.examples import load_example
from evercell.exporting import export_csv
from evercell.importing import import_celltypist


def accuracy(model: ec.Annotator, study: str) -> float:
    """Share of a study's cells of known types whose best label is right."""
    cells = load_example(study)
    truth = cells.obs["cell_type"].astype(str).to_numpy()
    known = np.isin(truth, model.types.names)
    return float((np.asarray(ec.annotate(model, cells, shown=False).best_labels) == truth)[known].mean())


def main() -> None:
    """Train, import, compare, update, export."""
    import celltypist

    warnings.simplefilter("ignore")
    learnt, query = load_example("baron_stage1"), load_example("tritschler_unseen")
    cells = query.copy()  # as it is, for evercell
    for adata in (learnt, query):
        adata.X = adata.X.astype(np.float32)
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    trained = celltypist.train(learnt, labels="cell_type", n_jobs=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pkl"
        trained.write(str(path))
        theirs = celltypist.annotate(query, model=str(path), majority_voting=False)
        print(
            f"CellTypist {celltypist.__version__}: {path.stat().st_size / 1e6:.1f} MB, {len(trained.cell_types)} types"
        )
        model = import_celltypist(path, trust_pickle=True)
        found = ec.annotate(model, cells, shown=False)
        decisions = theirs.decision_matrix[list(model.types.names)].to_numpy()
        labels = theirs.predicted_labels["predicted_labels"].astype(str).to_numpy()
        same = int((np.asarray(found.best_labels) == labels).sum())
        print(f"labels: {same} of {cells.n_obs} cells the same")
        apart = np.abs(found.probabilities - softmax(decisions, axis=1)).max()
        print(f"probabilities: at most {apart:.1e} from the softmax of CellTypist's decision values")
        own = theirs.probability_matrix[list(model.types.names)].to_numpy()
        print(f"CellTypist's own: sigmoids of the same values to {np.abs(own - expit(decisions)).max():.0e}; ", end="")
        print(
            f"mean of the best {own.max(axis=1).mean():.3f}, of evercell's {found.probabilities.max(axis=1).mean():.3f}"
        )
        print(f"accuracy on {len(cells)} cells of Tritschler: {accuracy(model, 'tritschler_unseen'):.3f}")
        second = load_example("fasolino_stage2")
        # Its stellate cells are called more coarsely; as the update proposes.
        updated = ec.update(model, second, "cell_type", accept_proposals=True, force=True, shown=False)
        for study in ("fasolino_stage2", "tritschler_unseen", "muraro_stage3"):
            print(f"{study}: {accuracy(model, study):.3f} before, {accuracy(updated, study):.3f} after the update")
        print("table:", export_csv(updated, Path(folder) / "weights.csv"))


if __name__ == "__main__":
    main()
