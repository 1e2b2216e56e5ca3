"""Training from files: peak memory with and without `--store`, and cells a second that a training can draw.

    python benchmarks/loader.py memory [--cells 20000 80000] [--verb train pretrain] [--samples 1280]
    python benchmarks/loader.py draws [--cells 50000] [--batch 64] [--device cpu]

Files are made as in `scale.py`, of real cells drawn with repeats and thinned; their labels are drawn at random. Speed
and memory can be told from them, accuracy cannot.

**memory**: `evercell train` or `pretrain` as a process of its own, of a few steps, for every number of cells, with the
counts in memory and with `--store`. Two peaks are printed: the memory of the process itself (`RssAnon`, looked at every
20 ms), and what the system counts for it, which includes pages of mapped files. Those are the page cache: the system
takes them back when it needs them, and they do not make a process run out of memory. `MB of counts` is the size of the
counts as float32 CSR, eight bytes a value.

**draws**: batches of random cells, as a step of `train` draws them, from

- in memory, CSR float32: rows taken by SciPy; the reference of all ratios
- in memory: what `train` holds without a store, the smallest type that holds the counts
- mapped: the files of `--store`; *cold* with the page cache emptied before
- backed .h5ad and .zarr: rows read at random from the file that was given
- scDataset: the same .h5ad, shuffled in blocks of 16 (where the package is installed)

and then what share of a training step drawing takes, with the model that `train` makes by default. Nothing is drawn
ahead of its step: while the share is small there is nothing to be gained by it.

Why rows are drawn one by one, and not in shuffled blocks: blocks make up for the cost of beginning a read. That is high
where a chunk must be unpacked (.zarr, compressed .h5ad), and low where a row is two slices of mapped files. Blocks have
a price too: neighbours in a file are of one donor or type, so a batch of blocks is less mixed, and the numbers would
not be those of a training in memory. A mapped file larger than memory needs a disk that reads at random (an SSD): on a
spinning one each of the two reads of a cell that is not in the page cache waits for the disk to turn.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scale import THREADS, make

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from evercell.stored_counts import CellCounts
    from evercell.training_cells import TrainingCells

TYPES = 8
SECONDS = 2.0  # of each way to draw
SCDATASET = 16  # cells a block


def make_labelled(path: Path, n_cells: int, compression: str | None = None) -> None:
    """A file of cells with labels drawn at random."""
    import h5py
    from anndata.io import read_elem, write_elem

    make(path, n_cells, compression)
    with h5py.File(path, "a") as file:
        obs = read_elem(file["obs"])
        obs["cell_type"] = np.random.default_rng(0).choice([f"type {i}" for i in range(TYPES)], n_cells)
        obs["cell_type"] = obs["cell_type"].astype("category")
        del file["obs"]
        write_elem(file, "obs", obs)


def peaks(command: list[str], threads: int) -> tuple[float, float, float]:
    """Seconds, peak of the process's own memory, and peak with mapped pages (MB)."""
    environment = {**os.environ, **dict.fromkeys(THREADS, str(threads))}
    start, own = time.perf_counter(), 0.0
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=complaints)
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
            own = max([own, *(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))])
            time.sleep(0.02)
        if status:
            complaints.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {complaints.read().decode()[-2000:]}")
    return time.perf_counter() - start, own, usage.ru_maxrss / 1024


def memory(options: argparse.Namespace, folder: Path) -> None:
    """Peaks of both verbs, in memory and with a store."""
    import h5py

    print(f"{'verb':9} {'cells':>9} {'MB of counts':>13} {'counts are':>11} {'own MB':>8} {'with pages':>11} {'s':>7}")
    for n_cells in options.cells:
        file = folder / f"{n_cells}.h5ad"
        subprocess.run([sys.executable, __file__, "make", "--cells", str(n_cells), "--folder", str(folder)], check=True)
        with h5py.File(file) as stored:
            size = 8 * stored["X/data"].shape[0] / 2**20
        for verb in options.verb:
            for where, more in (("in memory", []), ("in files", ["--store", str(folder)])):
                output = folder / f"{verb}-{n_cells}-{where.replace(' ', '-')}"
                words = [verb, str(file), "--labels", "cell_type", "--output", str(output), "--device", "cpu"]
                words += ["--samples", str(options.samples), "--quiet", *more]
                seconds, own, whole = peaks([sys.executable, "-m", "evercell", *words], options.threads)
                print(
                    f"{verb:9} {n_cells:9,} {size:13,.0f} {where:>11} {own:8,.0f} {whole:11,.0f} {seconds:7.1f}",
                    flush=True,
                )
        file.unlink()


def per_second(draw: Callable[[np.ndarray], Any], n_cells: int, batch: int) -> float:
    """Cells a second over random batches."""
    rng = np.random.default_rng(0)
    draw(rng.integers(0, n_cells, batch))
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        draw(rng.integers(0, n_cells, batch))
        done += batch
    return done / (time.perf_counter() - start)


def sorted_rows(matrix: Any) -> Callable[[np.ndarray], csr_matrix]:
    """Rows of a matrix in a file: each once and in order, as HDF5 wants them, and then as they were asked for."""

    def draw(rows: np.ndarray) -> csr_matrix:
        once, back = np.unique(rows, return_inverse=True)
        return matrix[once][back]

    return draw


def emptied(counts: CellCounts) -> CellCounts:
    """Mapped counts with none of their pages in memory."""
    for array in (counts.parts[0].data, counts.parts[0].indices):
        mapped = array._mmap
        mapped.madvise(4)  # MADV_DONTNEED: unmapped here; below they leave the page cache too
        with open(array.filename, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return counts


def scdataset_batches(matrix: Any, batch: int) -> Iterator[Any]:
    """Batches of scDataset over a backed matrix, shuffled in blocks."""
    from scdataset import BlockShuffling, scDataset

    class Rows:
        """The matrix, with the length that scDataset asks for."""

        def __len__(self) -> int:
            return matrix.shape[0]

        def __getitem__(self, rows: Any) -> csr_matrix:
            return matrix[rows]

    while True:
        yield from scDataset(Rows(), BlockShuffling(block_size=SCDATASET), batch_size=batch, fetch_factor=16)


def draws(options: argparse.Namespace, folder: Path) -> None:
    """Cells a second of every way to draw, and the share of a step."""
    from evercell.cells import read_cells, write_cells
    from evercell.celltypes import CellTypes
    from evercell.training_cells import gather, read_study, vocabulary_of

    n_cells, batch = options.cells[0], options.batch
    file, packed, zarr = folder / "cells.h5ad", folder / "packed.h5ad", folder / "cells.zarr"
    make_labelled(file, n_cells)
    make_labelled(packed, n_cells, "gzip")
    write_cells(read_cells(file), zarr)
    backed = {name: read_cells(path, backed=True) for name, path in ((".h5ad", file), (".h5ad, gzip", packed))}
    backed[".zarr"] = read_cells(zarr, backed=True)
    study = read_study(backed[".h5ad"], "cell_type")
    types = CellTypes(tuple(sorted(set(study.labels))))
    cells = gather([study], vocabulary_of([study]), types)
    mapped = named(cells.stored, folder)
    whole = cells.counts
    found = {
        "in memory, CSR float32": per_second(lambda rows: whole[rows], n_cells, batch),
        "in memory": per_second(lambda rows: cells.stored[rows], n_cells, batch),
        "mapped": per_second(lambda rows: mapped[rows], n_cells, batch),
    }
    found["mapped, cold"] = per_second(emptied(mapped).__getitem__, n_cells, batch)
    for name, adata in backed.items():
        found[f"backed {name}"] = per_second(sorted_rows(adata.X), n_cells, batch)
    try:
        batches = scdataset_batches(backed[".h5ad"].X, batch)
        found[f"scDataset over .h5ad, blocks of {SCDATASET}"] = per_second(lambda _: next(batches), n_cells, batch)
    except ImportError:
        print("scDataset is not installed: left out", file=sys.stderr)
    reference = found["in memory, CSR float32"]
    genes = np.diff(cells.stored.indptr).mean()
    print(f"{n_cells:,} cells, {genes:,.0f} genes a cell, batches of {batch}, {options.threads} threads, {load()}")
    print(f"{'drawn from':36} {'cells/s':>10} {'of in memory':>13}")
    for name, speed in found.items():
        print(f"{name:36} {speed:10,.0f} {speed / reference:13.3f}")
    print(f"\n{'a step on ' + options.device:36} {'ms':>8} {'of it drawing':>14}")
    for name, counts in (("in memory", cells.stored), ("mapped", mapped)):
        step, drawing = shares(cells, counts, batch, options.device)
        print(f"{name:36} {1e3 * step:8.2f} {drawing / step:14.1%}")


def named(counts: CellCounts, folder: Path) -> CellCounts:
    """The same counts in files as `--store` has them, with names, so that they can leave the page cache."""
    from scipy.sparse import csr_matrix

    from evercell.stored_counts import CellCounts as Counts

    whole = counts[:]
    found = csr_matrix(whole.shape, dtype=np.float32)
    whole.data.tofile(folder / "values")
    whole.indices.tofile(folder / "columns")
    found.data, found.indices = (
        np.memmap(folder / name, kind, "r") for name, kind in (("values", np.float32), ("columns", np.int32))
    )
    found.indptr = whole.indptr
    return Counts.of(found)


def shares(cells: TrainingCells, counts: CellCounts, batch: int, device: str, steps: int = 40) -> tuple[float, float]:
    """Seconds of a training step, and those of them in which its cells are drawn."""
    from dataclasses import replace

    import torch
    from torch import nn

    from evercell.annotator import Annotator
    from evercell.augmentation import Augmentation
    from evercell.backbones import BACKBONES
    from evercell.classification import classification_loss
    from evercell.genes import GeneVocabulary
    from evercell.heads import GrowingHead
    from evercell.stored_counts import CellCounts as Counts
    from evercell.threads import threads_of
    from evercell.tokenizers import TOKENIZERS
    from evercell.training import TrainingSettings, fit

    spent = [0.0]

    class Timed(Counts):
        """Counts that know how long they were read."""

        def __getitem__(self, wanted: Any) -> csr_matrix:
            start = time.perf_counter()
            found = super().__getitem__(wanted)
            spent[0] += time.perf_counter() - start
            return found

    timed = Timed(counts.parts, counts.rows, counts.n_genes)
    names = tuple(f"ENSG{number:011d}" for number in range(counts.n_genes))
    backbone = BACKBONES["latent"](counts.n_genes).to(device)
    head = GrowingHead(backbone.width, TYPES).to(device)
    model = Annotator.begun(GeneVocabulary(names, names), TOKENIZERS["values"](), backbone, head)
    cells = replace(cells, stored=timed)
    seconds = []
    for n_steps in (3, steps):  # the first compiles
        training = TrainingSettings(samples=n_steps * batch, batch_size=batch, evaluations=1)
        weights = cells.sampling_weights("sqrt")
        loss = classification_loss(model, cells, weights, training=training, augmentation=Augmentation())
        spent[0], start = 0.0, time.perf_counter()
        with threads_of(backbone):
            fit(nn.ModuleDict({"backbone": backbone, "head": head}), loss, training)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start, spent[0]))
    return seconds[-1][0] / steps, seconds[-1][1] / steps


def load() -> str:
    """What machine, and how busy."""
    return f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "draws", "make"))
    parser.add_argument("--cells", type=int, nargs="+", help="20000 80000 for memory, 50000 for draws by default")
    parser.add_argument("--verb", nargs="+", choices=("train", "pretrain"), default=("train", "pretrain"))
    parser.add_argument("--samples", type=int, default=1280, help="cells drawn in a training of `memory`")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="of the steps of `draws`")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where files are made; a temporary folder by default")
    options = parser.parse_args()
    options.cells = options.cells or ([20_000, 80_000] if options.what == "memory" else [50_000])
    if options.what == "make":
        make_labelled(options.folder / f"{options.cells[0]}.h5ad", options.cells[0])
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        (memory if options.what == "memory" else draws)(options, Path(name))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
