"""Annotation of many files in parts: cells a second of one and two workers, as ratios to one plain `evercell annotate`.

    python benchmarks/atlas.py [--cells 100000] [--files 4] [--workers 1 2] [--engines local ray] [--repeats 3]

Cells are made as `scale.py` makes them: once as one file, which `evercell annotate` labels to a .csv in one process,
and once as `--files` files of equal size, which `--engine` and `--workers` label to a folder. Every run is a process
from start to end with one thread a worker: imports, the model, reading, writing and the start of workers or of Ray are
in its time. What a start costs is told by the row of a file of `--few` cells: a rate without it is (cells - few) /
(seconds - seconds of few), printed as "cells/s more". Runs take turns, `--repeats` times; the medians are printed. The
labels of all runs are compared.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import pandas as pd
from scale import make, timed

from evercell.label_store import read_labels

PLAIN = "evercell annotate"


def command(name: str, folder: Path, model: str) -> list[str]:
    """The command line of a run over the files in a folder."""
    words = [sys.executable, "-m", "evercell", "annotate", "--quiet", "--model", model]
    if name == PLAIN:
        return [*words, str(folder / "all.h5ad"), "--output", str(folder / "labels.csv")]
    engine, workers = name.split()
    return [*words, str(folder / "files"), "--output", str(folder / "store"), "--engine", engine, "--workers", workers]


def labels(name: str, folder: Path) -> list[str]:
    """What a run wrote, in the order of the cells; then it is removed."""
    if name == PLAIN:
        found = pd.read_csv(folder / "labels.csv", usecols=["evercell"])["evercell"].tolist()
        (folder / "labels.csv").unlink()
        return found
    found = read_labels(folder / "store")["evercell"].astype(str).tolist()
    shutil.rmtree(folder / "store")
    return found


def prepare(folder: Path, n_cells: int, n_files: int) -> None:
    """Files, and one file of the same cells."""
    import anndata as ad

    (folder / "files").mkdir(parents=True)
    make(folder / "all.h5ad", n_cells, None)
    whole = ad.read_h5ad(folder / "all.h5ad", backed="r")
    size = -(-n_cells // n_files)
    for number in range(n_files):
        whole[number * size : (number + 1) * size].to_memory().write_h5ad(folder / "files" / f"{number:03d}.h5ad")
    whole.file.close()


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--few", type=int, default=2_000, help="cells of the runs that tell what a start costs")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--engines", nargs="+", default=["local", "ray"])
    parser.add_argument("--model", default="human-immune")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where files are made; a temporary folder by default")
    options = parser.parse_args()
    names = [PLAIN, *(f"{engine} {workers}" for engine in options.engines for workers in options.workers)]
    times: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        for n_cells in (options.few, options.cells):
            folder = Path(place, str(n_cells))
            prepare(folder, n_cells, options.files)
            expected: list[str] = []
            for _ in range(options.repeats):
                for name in names:
                    seconds, peak, cpu = timed(command(name, folder, options.model), 1)
                    times.setdefault((name, n_cells), []).append(seconds)
                    print(
                        f"{n_cells:,} cells, {name}: {seconds:.1f} s, {peak:,.0f} MB, {cpu:.1f} CPU s", file=sys.stderr
                    )
                    found = labels(name, folder)
                    expected = expected or found
                    assert found == expected, f"{name} has other labels"
            shutil.rmtree(folder)
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"{options.cells:,} cells in {options.files} files, {options.model}, one thread a worker")
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {load}\n")
    print(
        f"{'engine, workers':<20}{'seconds':>9}{'cells/s':>9}{'ratio':>8}{'start s':>9}{'cells/s more':>14}{'ratio':>8}"
    )
    first = more_of_first = 0.0
    for name in names:
        few, all_ = (statistics.median(times[name, number]) for number in (options.few, options.cells))
        rate = options.cells / all_
        more = (options.cells - options.few) / (all_ - few) if all_ > few else float("nan")  # too few to tell
        start = few - options.few / more
        first, more_of_first = first or rate, more_of_first or more
        columns = f"{all_:>9.1f}{rate:>9,.0f}{rate / first:>8.2f}{start:>9.1f}{more:>14,.0f}"
        print(f"{name:<20}{columns}{more / more_of_first:>8.2f}")
    print("\nthe labels of all runs are equal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
