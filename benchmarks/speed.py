"""Speed of annotation: file to file against CellTypist and Scanpy, and `latent` against `performer`.

    python benchmarks/speed.py [--cells 12000] [--repeats 3] [--threads 2]

Models are trained on pbmc4k_labelled; the query is pbmc8k_labelled, its cells repeated up to the asked-for number,
written gzipped as most files are. Each tool runs in a process of its own, so that its peak memory is its own; imports
and the loading of the model are left out of the time, reading and writing the file are not. The tools take turns,
`--repeats` times, and the median is printed, with the ratio to evercell, because machines are noisy.

The forward pass is timed on counts in memory: `latent` on all expressed genes, `performer` in scBERT's size (width 200,
depth 6, 10 heads) on CANAL's 1,000 variable genes and on 16,906 genes.
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
from typing import Any

import numpy as np
from tasks import load

TOOLS = ("scanpy", "celltypist", "evercell")


def make_inputs(folder: Path, n_cells: int) -> None:
    """Query file and trained models."""
    import celltypist
    import scanpy as sc
    from scipy import sparse

    import evercell

    train = load("pbmc4k_labelled")
    train.X = sparse.csr_matrix(train.X).astype(np.float32)
    model = evercell.train(train, labels="cell_type", shown=False)
    evercell.save(model, folder / "evercell")
    logged = train.copy()
    sc.pp.normalize_total(logged, target_sum=1e4)
    sc.pp.log1p(logged)
    celltypist.train(logged, labels="cell_type", n_jobs=1, check_expression=False).write(str(folder / "celltypist.pkl"))
    query = load("pbmc8k_labelled")
    rows = np.resize(np.arange(query.n_obs), n_cells)
    query = query[rows].copy()
    query.obs_names = [f"cell{i}" for i in range(n_cells)]
    query.write_h5ad(folder / "query.h5ad", compression="gzip")


def run_scanpy(folder: Path) -> float:
    """Read, normalise and log-transform: the floor under every tool."""
    import anndata as ad
    import scanpy as sc

    start = time.perf_counter()
    cells = ad.read_h5ad(folder / "query.h5ad")
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    return time.perf_counter() - start


def run_celltypist(folder: Path) -> float:
    """Read, normalise, label without majority voting, write."""
    import anndata as ad
    import celltypist
    import scanpy as sc

    model = celltypist.models.Model.load(str(folder / "celltypist.pkl"))
    start = time.perf_counter()
    cells = ad.read_h5ad(folder / "query.h5ad")
    counts = cells.X.copy()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    labelled = celltypist.annotate(cells, model=model).to_adata()
    labelled.X = counts
    labelled.write_h5ad(folder / "celltypist.h5ad")
    return time.perf_counter() - start


def run_evercell(folder: Path) -> float:
    """Read, label, write."""
    import evercell
    from evercell.testing import synthetic_cells

    model = evercell.load(folder / "evercell")
    evercell.embed(model, synthetic_cells(200, n_genes=2000, seed=0), shown=False)  # compiled loops are loaded here
    start = time.perf_counter()
    cells = evercell.read_cells(folder / "query.h5ad")
    evercell.annotate(model, cells, inplace=True, shown=False)
    evercell.write_cells(cells, folder / "evercell.h5ad")
    return time.perf_counter() - start


def child(tool: str, folder: Path) -> None:
    """Run one tool in this process; print seconds and peak memory."""
    seconds = {"scanpy": run_scanpy, "celltypist": run_celltypist, "evercell": run_evercell}[tool](folder)
    print(json.dumps({"seconds": seconds, "peak_mb": peak_mb()}))


def peak_mb() -> float:
    """Peak memory of this program; getrusage would count that of the parent which it was forked from."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forward(threads: int, repeats: int) -> dict[str, float]:
    """Cells a second of the forward pass alone."""
    import torch
    from scipy import sparse

    from evercell.annotator import Annotator, empty_bank
    from evercell.backbones import BACKBONES
    from evercell.celltypes import CellTypes
    from evercell.genes import GeneVocabulary
    from evercell.heads import GrowingHead
    from evercell.tokenizers import TOKENIZERS, View

    torch.set_num_threads(threads)
    cells = load("pbmc8k_labelled")
    counts = sparse.csr_matrix(cells.X).astype(np.float32)
    counts = counts[:, np.flatnonzero(counts.getnnz(axis=0) >= 3)]
    by_spread = np.argsort(-np.asarray(counts.power(2).mean(axis=0) - np.square(counts.mean(axis=0))).ravel())
    kinds: dict[str, tuple[str, dict[str, Any], str, sparse.csr_matrix]] = {
        "latent, all expressed genes": ("values", {}, "latent", counts[:2048]),
        "performer, 1,000 genes": ("bins", {"zeros": True}, "performer", counts[:128][:, np.sort(by_spread[:1000])]),
        "performer, 16,906 genes": ("bins", {"zeros": True}, "performer", _widened(counts[:2], 16_906)),
    }
    rates = {}
    for name, (tokenizer_name, settings, backbone_name, some) in kinds.items():
        tokenizer = TOKENIZERS[tokenizer_name](**settings)
        n_genes = some.shape[1]
        backbone = BACKBONES[backbone_name](n_genes, n_bins=tokenizer.n_bins).eval()  # type: ignore[call-arg]
        names = tuple(f"G{i}" for i in range(n_genes))
        model = Annotator(
            vocabulary=GeneVocabulary(names, names, "human"),
            types=CellTypes(("one", "other")),
            tokenizer=tokenizer,
            backbone=backbone,
            head=GrowingHead(backbone.width, 2).eval(),
            linear=None,
            temperature=1.0,
            rejector=None,
            bank=empty_bank(n_genes),
        )
        batch = some.shape[0] if n_genes > 10_000 else None
        seconds = []
        for _ in range(repeats if batch is None else 1):
            start = time.perf_counter()
            if batch is None:
                model.represent(View.whole(some))
            else:  # a full batch of so many tokens needs more memory than a laptop has
                with torch.inference_mode():
                    backbone(tokenizer.tokenize(View.whole(some)))
            seconds.append(time.perf_counter() - start)
        rates[name] = some.shape[0] / float(np.median(seconds))
    return rates


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
    parser.add_argument("--child", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder)
        return 0
    threads = str(options.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    found: dict[str, list[dict[str, float]]] = {tool: [] for tool in TOOLS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, options.cells)
        for _ in range(options.repeats):
            for tool in TOOLS:
                command = [sys.executable, __file__, "--child", tool, "--folder", str(folder)]
                run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                found[tool].append(json.loads(run.stdout.splitlines()[-1]))
    print(f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads; load {os.getloadavg()[0]:.1f}")
    print(f"\nFile to file, {options.cells:,} cells (pbmc8k_labelled repeated), median of {options.repeats}:\n")
    print(f"{'tool':<42}{'cells/s':>10}{'peak MB':>10}{'evercell is':>14}")
    own = float(np.median([one["seconds"] for one in found["evercell"]]))
    for tool in TOOLS:
        seconds = float(np.median([one["seconds"] for one in found[tool]]))
        words = {"scanpy": "scanpy (read, normalise, log1p; no label)"}.get(tool, tool)
        peak = max(one["peak_mb"] for one in found[tool])
        print(f"{words:<42}{options.cells / seconds:>10,.0f}{peak:>10,.0f}{seconds / own:>12.2f} x")
    rates = forward(options.threads, options.repeats)
    best = rates["latent, all expressed genes"]
    print(f"\nForward pass:\n\n{'backbone':<42}{'cells/s':>10}{'latent is':>14}")
    for name, rate in rates.items():
        print(f"{name:<42}{rate:>10,.2f}{best / rate:>12,.0f} x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
