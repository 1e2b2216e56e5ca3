"""Speed of annotation: file to file against CellTypist and Scanpy, and `latent` against `performer`.

    python benchmarks/speed.py [--cells 12000] [--repeats 3] [--threads 2]

Models are trained on pbmc4k_labelled; the query is pbmc8k_labelled, its cells repeated up to the asked-for number,
written gzipped as most files are. Each tool runs in a process of its own, so that its peak memory is its own; imports
and the loading of the model are left out of the time, reading and writing the file are not. The tools take turns,
`--repeats` times, and the median is printed, with the ratio to evercell, because machines are noisy.

Evercell goes two ways: part by part, as `evercell annotate` does, and with all cells in memory. The first copies the
matrix as it is stored, the second packs it anew; that of CellTypist is written without compression.

Forward pass and training step are timed on counts in memory (`evercell.benching`): `latent` on all expressed genes,
`performer` in scBERT's size (width 200, depth 6, 10 heads) on CANAL's 1,000 variable genes and on 16,906 genes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scale import THREADS
from tasks import load

if TYPE_CHECKING:
    from evercell.annotator import Annotator
    from evercell.benching import Pace

TOOLS = ("scanpy", "celltypist", "evercell", "evercell in memory")


def make_inputs(folder: Path, n_cells: int, celltypist_too: bool) -> None:
    """Query file and trained models."""
    import scanpy as sc
    from scipy import sparse

    import evercell

    train = load("pbmc4k_labelled")
    train.X = sparse.csr_matrix(train.X).astype(np.float32)
    model = evercell.train(train, labels="cell_type", shown=False)
    evercell.save(model, folder / "evercell")
    if celltypist_too:
        import celltypist

        sc.pp.normalize_total(train, target_sum=1e4)
        sc.pp.log1p(train)
        fitted = celltypist.train(train, labels="cell_type", n_jobs=1, check_expression=False)
        fitted.write(str(folder / "celltypist.pkl"))
    query = load("pbmc8k_labelled")
    rows = np.resize(np.arange(query.n_obs), n_cells)
    query = query[rows].copy()
    query.obs_names = [f"cell{i}" for i in range(n_cells)]
    query.write_h5ad(folder / "query.h5ad", compression="gzip")


def run_scanpy(folder: Path) -> np.ndarray:
    """Read, normalise and log-transform: the floor under every tool."""
    import anndata as ad
    import scanpy as sc

    start = clock()
    cells = ad.read_h5ad(folder / "query.h5ad")
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    return clock() - start


def run_celltypist(folder: Path) -> np.ndarray:
    """Read, normalise, label without majority voting, write."""
    import anndata as ad
    import celltypist
    import scanpy as sc

    model = celltypist.models.Model.load(str(folder / "celltypist.pkl"))
    start = clock()
    cells = ad.read_h5ad(folder / "query.h5ad")
    counts = cells.X.copy()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    labelled = celltypist.annotate(cells, model=model).to_adata()
    labelled.X = counts
    labelled.write_h5ad(folder / "celltypist.h5ad")
    return clock() - start


def run_evercell(folder: Path) -> np.ndarray:
    """Read, label, write, part by part: what `evercell annotate` does once it has read its model."""
    from evercell.cells import read_cells
    from evercell.copying import extended
    from evercell.streaming import annotated

    model, file, output = _loaded(folder), folder / "query.h5ad", folder / "evercell.h5ad"
    start = clock()
    cells = read_cells(file, backed=True)
    with annotated(model, cells, file, output, shown=False) as result:
        result.write_into(cells)
        arrays = {name: cells.obsm[name] for name in ("X_evercell", "evercell_proba")}
        extended(file, output, obs=cells.obs, obsm=arrays, uns={"evercell": cells.uns["evercell"]})
    return clock() - start


def run_in_memory(folder: Path) -> np.ndarray:
    """Read, label, write, with all cells in memory."""
    import evercell

    model = _loaded(folder)
    start = clock()
    cells = evercell.read_cells(folder / "query.h5ad")
    evercell.annotate(model, cells, inplace=True, shown=False)
    evercell.write_cells(cells, folder / "evercell.h5ad")
    return clock() - start


def _loaded(folder: Path) -> Annotator:
    """The model, with compiled loops and names of genes loaded."""
    import evercell
    from evercell.testing import synthetic_cells

    model = evercell.load(folder / "evercell")
    evercell.embed(model, synthetic_cells(200, n_genes=2000, seed=0), shown=False)
    return model


def child(tool: str, folder: Path) -> None:
    """Run one tool in this process; print seconds, processor seconds and peak memory."""
    run = dict(zip(TOOLS, (run_scanpy, run_celltypist, run_evercell, run_in_memory), strict=True))[tool]
    seconds, cpu = run(folder).tolist()
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_mb": peak_mb()}))


def clock() -> np.ndarray:
    """Seconds by the clock and of the processor; the latter are less a matter of what else runs."""
    return np.array([time.perf_counter(), time.process_time()])


def peak_mb() -> float:
    """Peak memory of this program; getrusage would count that of the parent which it was forked from."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def paces(threads: int, seconds: float) -> tuple[dict[str, Pace], dict[str, Pace]]:
    """Forward pass and training step of untrained models, by backbone, each within some seconds."""
    import torch
    from scipy import sparse

    from evercell.benching import forward_pace, most_variable, new_model, paced, step_pace
    from evercell.tokenizers import View

    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    cells = load("pbmc8k_labelled")
    counts = sparse.csr_matrix(cells.X).astype(np.float32)
    counts = counts[:, np.flatnonzero(counts.getnnz(axis=0) >= 3)]
    codes = cells.obs["cell_type"].astype("category").cat.codes.to_numpy().astype(np.int64)
    variable = most_variable(counts, 1000)
    model, view = new_model("latent", counts.shape[1], 10), View.whole(counts[:2048])
    model.represent(view.taken(np.arange(1)))  # compiled loops are loaded
    forward = {
        "latent, all expressed genes": paced(lambda: model.represent(view), 2048, seconds=seconds),
        "performer, 1,000 genes": forward_pace("performer", variable[:16], cpu, seconds),
        "performer, 16,906 genes": forward_pace("performer", _widened(counts[:2], 16_906), cpu, seconds, most=1),
    }
    training = {
        "latent, all expressed genes": step_pace(
            "latent", counts, codes, cells_a_step=128, device=cpu, seconds=seconds
        ),
        "performer, 1,000 genes": step_pace(
            "performer", variable, codes, cells_a_step=8, steps=1, device=cpu, seconds=seconds
        ),
    }
    return forward, training


def _widened(counts: Any, n_genes: int) -> Any:
    """The same cells over more genes."""
    from scipy import sparse

    kept = counts[:, : min(counts.shape[1], n_genes)].tocsr()
    return sparse.csr_matrix((kept.data, kept.indices, kept.indptr), shape=(kept.shape[0], n_genes))


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=12_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each backbone, forward and training")
    parser.add_argument("--paces", action="store_true", help="leave out the files")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--child", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder)
        return 0
    print(f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads; load {os.getloadavg()[0]:.1f}")
    if not options.paces:
        files(options)
    for name, of in zip(("Forward pass", "Training step"), paces(options.threads, options.seconds), strict=True):
        best = next(iter(of.values())).cells_per_second
        print(f"\n{name}:\n\n{'backbone':<42}{'cells/s':>10}{'repeats':>9}{'latent is':>14}")
        for backbone, pace in of.items():
            rate = pace.cells_per_second
            print(f"{backbone:<42}{rate:>10,.2f}{pace.repeats:>9}{best / rate:>12,.0f} x")
    return 0


def files(options: argparse.Namespace) -> None:
    """File to file: the tools in turns."""
    environment = {**os.environ, **dict.fromkeys(THREADS, str(options.threads))}
    found: dict[str, list[dict[str, float]]] = {tool: [] for tool in TOOLS if tool in (*options.tools, "evercell")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, options.cells, "celltypist" in found)
        for _ in range(options.repeats):
            for tool, runs in found.items():
                command = [sys.executable, __file__, "--child", tool, "--folder", str(folder)]
                run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                runs.append(json.loads(run.stdout.splitlines()[-1]))
    print(f"\nFile to file, {options.cells:,} cells (pbmc8k_labelled repeated), median of {options.repeats}:\n")
    print(f"{'tool':<42}{'cells/s':>10}{'CPU s':>8}{'peak MB':>10}{'evercell is':>14}")
    own = float(np.median([one["seconds"] for one in found["evercell"]]))
    for tool, runs in found.items():
        seconds, cpu = (float(np.median([one[what] for one in runs])) for what in ("seconds", "cpu"))
        words = {"scanpy": "scanpy (read, normalise, log1p; no label)"}.get(tool, tool)
        peak = max(one["peak_mb"] for one in runs)
        print(f"{words:<42}{options.cells / seconds:>10,.0f}{cpu:>8.1f}{peak:>10,.0f}{seconds / own:>12.2f} x")


if __name__ == "__main__":
    sys.exit(main())
