"""Annotation of large files: cells a second and peak memory of `evercell annotate` against CellTypist and Scanpy.

    python benchmarks/scale.py [--cells 10000 100000] [--model human-immune] [--compression gzip] [--python PYTHON]

Files of any size are made of the 8,381 real cells of pbmc8k_labelled: cells are drawn with repeats and the counts of
each thinned binomially, every molecule kept with a probability that is drawn for the cell, from 0.5 to 1. No two cells
are alike, but they are no more varied than the real ones: speed and memory can be told from them, accuracy cannot. They
are written a block of cells at a time, as float32 CSR over 33,694 genes.

Every tool is a process of its own, from start to end: its time includes imports, model, reading and writing, and its
peak memory is what the system counted for it. Tools take turns, `--repeats` times; the median time and the largest peak
are printed, with ratios to `evercell annotate` of the same kind of output in the same session, because machines are
noisy.

- evercell to .csv, .h5ad: `evercell annotate`, which leaves the matrix in the file
- in memory to .h5ad: `read_cells`, `annotate`, `write_cells` in Python, which hold all cells
- celltypist to .csv, .h5ad: read, normalise, log1p, `celltypist.annotate` without majority voting, write. Its model is
  trained on pbmc4k_labelled with its own choice of 300 genes a type; one of all genes would make the cells dense over
  all of them, 27 GB for 100,000 cells
- scanpy: read, normalise_total, log1p; no label, nothing written
- copy: the file copied, as what the disk allows
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOCK = 10_000
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
TOOLS = (
    "evercell to .csv",
    "evercell to .h5ad",
    "in memory to .h5ad",
    "celltypist to .csv",
    "celltypist to .h5ad",
    "scanpy",
    "copy",
)
OTHER = ("celltypist", "scanpy")  # what the interpreter of --python runs


def make(path: Path, n_cells: int, compression: str | None) -> None:
    """A file of cells resampled from real ones."""
    import anndata as ad
    import h5py
    import numpy as np
    import pandas as pd
    from anndata.io import sparse_dataset, write_elem
    from scipy import sparse
    from tasks import load

    cells = load("pbmc8k_labelled")
    real = sparse.csr_matrix(cells.X)
    rng = np.random.default_rng(0)
    packed = {} if compression is None else {"compression": compression}
    obs = pd.DataFrame({"sample": pd.Categorical(rng.choice(["a", "b", "c"], n_cells))})
    obs.index = [f"cell{number:08d}" for number in range(n_cells)]
    whole = ad.AnnData(obs=obs, var=cells.var[[]])
    whole.write_h5ad(path)
    with h5py.File(path, "a") as file:
        for start in range(0, n_cells, BLOCK):
            block = real[rng.integers(0, real.shape[0], min(BLOCK, n_cells - start))]
            kept = np.repeat(rng.uniform(0.5, 1.0, block.shape[0]), np.diff(block.indptr))
            block.data = rng.binomial(np.rint(block.data).astype(np.int64), kept).astype(np.float32)
            block.eliminate_zeros()
            if start == 0:
                write_elem(file, "X", block, dataset_kwargs=packed)
            else:
                sparse_dataset(file["X"]).append(block)


def train_celltypist(path: Path) -> None:
    """CellTypist's model."""
    import celltypist
    import numpy as np
    import scanpy as sc
    from scipy import sparse
    from tasks import load

    cells = load("pbmc4k_labelled")
    cells.X = sparse.csr_matrix(cells.X).astype(np.float32)
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    chosen = {"feature_selection": True, "top_genes": 300}
    celltypist.train(cells, labels="cell_type", n_jobs=1, check_expression=False, **chosen).write(str(path))


def child(tool: str, folder: Path, model: str) -> None:
    """One tool, in this process."""
    query, output = folder / "query.h5ad", folder / f"out{'.csv' if tool.endswith('.csv') else '.h5ad'}"
    if tool.startswith("in memory"):
        import evercell
        from evercell.registry import find

        cells = evercell.read_cells(query)
        evercell.annotate(evercell.load(find(model)), cells, inplace=True, shown=False)
        evercell.write_cells(cells, output)
    elif tool == "copy":
        shutil.copyfile(query, output)
    else:
        import anndata as ad
        import scanpy as sc

        cells = ad.read_h5ad(query)
        counts = cells.X.copy() if tool.endswith(".h5ad") else None
        sc.pp.normalize_total(cells, target_sum=1e4)
        sc.pp.log1p(cells)
        if tool == "scanpy":
            return
        import celltypist

        found = celltypist.annotate(cells, model=celltypist.models.Model.load(str(folder / "celltypist.pkl")))
        if counts is None:
            found.predicted_labels.to_csv(output)
        else:
            labelled = found.to_adata()
            labelled.X = counts
            labelled.write_h5ad(output, compression="gzip")


def timed(command: list[str], threads: int) -> tuple[float, float, float]:
    """Seconds, peak memory (MB) and processor seconds of a process; the last are less a matter of what else runs."""
    environment = {**os.environ, **dict.fromkeys(THREADS, str(threads))}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    complaints = process.stderr.read() if process.stderr is not None else b""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)}: {complaints.decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 100_000], help="1000000 for a large file")
    parser.add_argument("--model", default="human-immune")
    parser.add_argument("--compression", choices=("lzf", "gzip"), help="of the made file; none by default")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has CellTypist and Scanpy")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where files are made; a temporary folder by default")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, number = options.child
        if what == "make":
            make(options.folder / "query.h5ad", int(number), options.compression)
        elif what == "train":
            train_celltypist(options.folder / "celltypist.pkl")
        else:
            child(what, options.folder, options.model)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for n_cells in options.cells:
            measure(Path(name), n_cells, options)
    return 0


def measure(folder: Path, n_cells: int, options: argparse.Namespace) -> None:
    """All tools on one file."""

    def command(tool: str, number: int = 0) -> list[str]:
        if tool.startswith("evercell"):
            output = folder / f"out{tool[tool.index('.') :]}"
            words = ["annotate", str(folder / "query.h5ad"), "--model", options.model, "--output", str(output)]
            return [sys.executable, "-m", "evercell", *words, "--quiet"]
        words = [__file__, "--child", tool, str(number), "--folder", str(folder), "--model", options.model]
        words += ["--compression", options.compression] if options.compression else []
        return [options.python if tool.startswith((*OTHER, "train")) else sys.executable, *words]

    timed(command("make", n_cells), options.threads)
    others = subprocess.run([options.python, "-c", "import celltypist"], capture_output=True, check=False)
    tools = [tool for tool in options.tools if not others.returncode or not tool.startswith("celltypist")]
    if any(tool.startswith("celltypist") for tool in tools) and not (folder / "celltypist.pkl").exists():
        timed(command("train"), options.threads)
    found: dict[str, list[tuple[float, float, float]]] = {tool: [] for tool in tools}
    for _ in range(options.repeats):
        for tool in tools:
            found[tool].append(timed(command(tool), options.threads))
            seconds, peak, cpu = found[tool][-1]
            print(
                f"{n_cells:,} cells, {tool}: {seconds:.1f} s, {peak:,.0f} MB, processor {cpu:.1f} s",
                file=sys.stderr,
                flush=True,
            )
            for left in folder.glob("out*"):
                left.unlink()
    size = (folder / "query.h5ad").stat().st_size / 2**20
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"{n_cells:,} cells, {size:,.0f} MB ({options.compression or 'not compressed'}), {options.threads} threads")
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {load}\n")
    heads = f"{'seconds':>9}{'CPU s':>8}{'cells/s':>10}{'peak MB':>9}{'time':>9}{'memory':>9}"
    print(f"{'tool':<22}{heads}  (ratios to evercell)")
    for tool in tools:
        seconds, peak = statistics.median(one[0] for one in found[tool]), max(one[1] for one in found[tool])
        like = found.get("evercell to .csv" if tool.endswith((".csv", "scanpy", "copy")) else "evercell to .h5ad")
        cpu, ratios = statistics.median(one[2] for one in found[tool]), ""
        if like:
            own = statistics.median(one[0] for one in like), max(one[1] for one in like)
            ratios = f"{seconds / own[0]:>7.2f} x{peak / own[1]:>7.2f} x"
        print(f"{tool:<22}{seconds:>9.1f}{cpu:>8.1f}{n_cells / seconds:>10,.0f}{peak:>9,.0f}{ratios}")
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
