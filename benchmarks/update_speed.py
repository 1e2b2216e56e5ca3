"""Seconds to teach a model 2,000 new cells, by strategy, beside a logistic regression fitted again on all cells.

    python benchmarks/update_speed.py --model MODEL

MODEL is one of pbmc3k, trained before; without it one is trained first (not timed). The reference, in the same process:
`fit_linear` on the cells of both studies, what a linear tool does when data are added.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
from streams import STREAMS

import evercell as ec
from evercell.celltypes import CellTypes
from evercell.linear import fit_linear
from evercell.training_cells import gather, read_studies, vocabulary_of

N_CELLS = 2000


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--strategies", nargs="+", default=["canal", "replay", "analytic"])
    options = parser.parse_args()
    stages, _ = STREAMS["immune"].parts("forward", 0)
    first, new = stages[0].train, stages[3].train  # pbmc3k, pbmc4k
    assert first is not None
    assert new is not None
    new = new[np.sort(np.random.default_rng(0).permutation(new.n_obs)[:N_CELLS])].copy()
    model = ec.load(options.model) if options.model else ec.train(first, "label", groups="group", shown=False)
    studies = read_studies([first, new], "label", names=["first", "new"])
    types = CellTypes(tuple(sorted({name for study in studies for name in study.labels})))
    cells = gather(studies, vocabulary_of(studies), types)
    start = time.perf_counter()
    fit_linear(cells.counts, cells.codes, n_types=len(types))
    reference = time.perf_counter() - start
    print(f"{os.cpu_count()} cores, {new.n_obs:,} new cells, {new.n_vars:,} genes")
    print(f"{'linear, on all cells':<24}{reference:>8.1f} s{1:>8.1f}")
    names = {name: name for name in new.obs["label"].astype(str).unique()}
    for strategy in options.strategies:
        start = time.perf_counter()
        updated = ec.update(model, new, "label", groups="group", strategy=strategy, mapping=names, shown=False)
        seconds = time.perf_counter() - start
        made_with = updated.ledger.stages[-1].facts["strategy"]
        print(f"{strategy:<24}{seconds:>8.1f} s{seconds / reference:>8.1f}   (published: {made_with})")


if __name__ == "__main__":
    main()
