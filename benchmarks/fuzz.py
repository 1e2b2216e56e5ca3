"""Fuzz the readers of cells and the model loader: good files are changed at random, and only meant errors may come.

    python benchmarks/fuzz.py --seconds 600 [--seed N] [--targets h5ad h5 mtx csv zarr model]

Anything but an `EvercellError`, more than `MOST_SECONDS` for a file, or more than `MOST_MEMORY` is a finding: its file
is kept in ``--keep``, and the exit code is 1. A fuzzer led by coverage sees nothing of the compiled readers of HDF5;
this one changes stored bytes, and the values, types and attributes of HDF5 files, whose structure stays whole.
"""

from __future__ import annotations

import argparse
import gzip
import multiprocessing as mp
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import h5py
import numpy as np

MOST_SECONDS = 60
MOST_MEMORY = 2 << 30  # bytes beyond what the process has when it begins
ODD = (0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 255, 65535)


def seeds(folder: Path) -> dict[str, Path]:
    """A small good file of every kind."""
    import scipy.sparse as sp

    from evercell.checkpoint import save
    from evercell.finetuning import quick_settings, train
    from evercell.testing import synthetic_cells

    cells = synthetic_cells(12, n_genes=60, n_types=2, n_donors=2)
    cells.obsm["X_pca"] = np.zeros((12, 2), dtype=np.float32)
    cells.layers["counts"] = cells.X.copy()
    cells.raw = cells.copy()
    found = {name: folder / name for name in ("cells.h5ad", "cells.h5", "sample", "cells.csv", "cells.zarr", "model")}
    cells.write_h5ad(found["cells.h5ad"], compression="gzip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells.write_zarr(found["cells.zarr"])
    with h5py.File(found["cells.h5"], "w") as file:
        matrix = file.create_group("matrix")
        for name, value in {
            "data": cells.X.data, "indices": cells.X.indices, "indptr": cells.X.indptr,
            "shape": np.array(cells.shape[::-1]), "barcodes": np.array(cells.obs_names, dtype="S30"),
        }.items():  # fmt: skip
            matrix[name] = value
        features = matrix.create_group("features")
        for name in ("id", "name"):
            features[name] = np.array(cells.var_names, dtype="S30")
    found["sample"].mkdir()
    coo = sp.coo_matrix(cells.X.T)
    rows = "".join(f"{i + 1} {j + 1} {v}\n" for i, j, v in zip(coo.row, coo.col, coo.data, strict=True))
    head = f"%%MatrixMarket matrix coordinate integer general\n60 12 {coo.nnz}\n"
    (found["sample"] / "matrix.mtx.gz").write_bytes(gzip.compress((head + rows).encode()))
    (found["sample"] / "barcodes.tsv").write_text("".join(f"{name}\n" for name in cells.obs_names))
    (found["sample"] / "features.tsv").write_text(
        "".join(f"{one}\t{one}\tGene Expression\n" for one in cells.var_names)
    )
    cells.to_df().to_csv(found["cells.csv"])
    save(train(synthetic_cells(60, n_genes=60, seed=1), settings=quick_settings(), shown=False), found["model"])
    return found


def spoilt(good: Path, target: Path, rng: np.random.Generator) -> Path:
    """A copy of a file or folder, one of its files changed."""
    if good.is_dir():
        shutil.copytree(good, target)
        files = sorted(one for one in target.rglob("*") if one.is_file())
        file = files[rng.integers(len(files))]
    else:
        shutil.copyfile(good, target)
        file = target
    if file.suffix in (".h5", ".h5ad") and rng.random() < 0.6:
        in_values(file, rng)
    elif file.suffix == ".gz" and rng.random() < 0.7:
        file.write_bytes(gzip.compress(in_bytes(gzip.decompress(file.read_bytes()), rng)))
    else:
        file.write_bytes(in_bytes(file.read_bytes(), rng))
    if (target / "annotator.json").is_file():
        signed(target)
    return target


def in_bytes(raw: bytes, rng: np.random.Generator) -> bytes:
    """Bytes flipped, cut, doubled, moved, or numbers in text replaced by odd ones."""
    data = bytearray(raw)
    for _ in range(int(rng.integers(1, 6))):
        if not data:
            break
        kind, place = int(rng.integers(6)), int(rng.integers(len(data)))
        size = int(min(rng.integers(1, 64), len(data) - place))
        if kind == 0:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[place : place + size] = rng.bytes(size)
        elif kind == 2:
            del data[place : place + size]
        elif kind == 3:
            data[place:place] = data[place : place + size] * int(rng.integers(1, 5))
        elif kind == 4:
            width = int(rng.choice([1, 2, 4, 8]))
            value = int(ODD[rng.integers(len(ODD))]) & ((1 << 8 * width) - 1)
            data[place : place + width] = value.to_bytes(width, "little")
        else:
            digits = [n for n in range(place, min(place + 4000, len(data))) if 48 <= data[n] <= 57]
            if digits:
                data[digits[0] : digits[0] + 1] = str(ODD[rng.integers(len(ODD))]).encode()
    return bytes(data)


def in_values(path: Path, rng: np.random.Generator) -> None:
    """Values, shapes, types and attributes of an HDF5 file, whose structure stays that of one."""
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        item = file[names[rng.integers(len(names))]]
        kind = int(rng.integers(5))
        if kind == 0 and len(item.attrs):
            key = sorted(item.attrs)[rng.integers(len(item.attrs))]
            item.attrs[key] = [ODD[rng.integers(len(ODD))], "magic", np.array([1.5, 2.5]), "csr_matrix", "array"][
                rng.integers(5)
            ]
        elif kind == 1:
            del file[item.name]
        elif isinstance(item, h5py.Dataset) and item.shape and item.size and item.dtype.kind in "iuf":
            values = item[...].astype([np.int64, np.float64, np.int8, np.complex64, "S5"][rng.integers(5)])
            if kind == 2 and values.dtype.kind in "if":
                with np.errstate(all="ignore"):
                    odd = [*ODD, np.nan, np.inf] if values.dtype.kind == "f" else [one & 0x7F for one in ODD]
                    values.flat[rng.integers(values.size)] = odd[rng.integers(len(odd))]
            elif kind == 3:
                values = values[: rng.integers(len(values) + 1)]
            attributes, name = dict(item.attrs), item.name
            del file[name]
            file[name] = values
            file[name].attrs.update(attributes)


def signed(folder: Path) -> None:
    """The hashes of a model made right again, as somebody would who means harm."""
    import hashlib
    import json

    from evercell import checkpoint

    own = folder / "annotator.json"
    try:
        told = json.loads(own.read_text())
        for name in told["sha256"]:
            if name != "annotator.json":
                told["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        told["sha256"]["annotator.json"] = checkpoint._own_digest(told)
        own.write_text(json.dumps(told))
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        return


def read(path: Path) -> str:
    """Read a file as the commands do; what came of it."""
    from evercell import checkpoint
    from evercell.cells import STORED, find_counts, read_cells
    from evercell.errors import EvercellError

    try:
        if path.name == "model":
            checkpoint.load(path)
        else:
            for backed in (False, True)[: 1 + (path.suffix in STORED)]:
                cells = read_cells(path, backed=backed)
                for _ in find_counts(cells, name=str(path), empty_cells="keep").chunks():
                    pass
    except EvercellError as error:
        return "refused" if error.message else "FINDING: an empty message"
    return "read"


def child(path: Path, line: object) -> None:
    """Read in a process of its own, with little memory and little time."""
    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (before + MOST_MEMORY, before + MOST_MEMORY))
    signal.alarm(MOST_SECONDS)
    try:
        said = read(path)
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = f"FINDING: {type(error).__name__}: {str(error)[:200]} ({Path(last.filename).name}:{last.lineno})"
    line.send(said)  # type: ignore[attr-defined]


def tried(path: Path) -> str:
    """What came of a file; a process that died is a finding."""
    context = mp.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(path, theirs))
    process.start()
    theirs.close()
    process.join(MOST_SECONDS + 10)
    if process.is_alive():
        process.kill()
        process.join()
        return "FINDING: hangs"
    try:
        return str(mine.recv())
    except EOFError:
        return f"FINDING: died with exit code {process.exitcode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", default=["h5ad", "h5", "mtx", "csv", "zarr", "model"])
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    asked = parser.parse_args()
    names = {
        "h5ad": "cells.h5ad",
        "h5": "cells.h5",
        "mtx": "sample",
        "csv": "cells.csv",
        "zarr": "cells.zarr",
        "model": "model",
    }
    rng, found, findings = np.random.default_rng(asked.seed), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        good = seeds(Path(place))
        for name in asked.targets:  # everything is imported before the first fork
            assert read(good[names[name]]) == "read", name
        ends, number = time.monotonic() + asked.seconds, 0
        while time.monotonic() < ends:
            target = asked.targets[number % len(asked.targets)]
            path = Path(place) / f"case{number}" / names[target]
            path.parent.mkdir()
            spoilt(good[names[target]], path, rng)
            said = tried(path)
            found[f"{target}: {said if said in ('read', 'refused') else 'finding'}"] += 1
            if said.startswith("FINDING"):
                findings[f"{target} {said}"] += 1
                if findings[f"{target} {said}"] == 1:
                    shutil.copytree(path.parent, asked.keep / f"{target}{number}", dirs_exist_ok=True)
                    print(f"{target}{number}: {said}", flush=True)
            shutil.rmtree(path.parent)
            number += 1
    print(f"{number:,} files in {asked.seconds:,.0f} seconds, seed {asked.seed}; findings: {len(findings)}")
    for name, count in sorted(found.items()):
        print(f"  {name}: {count:,}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
