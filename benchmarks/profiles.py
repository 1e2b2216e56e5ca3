"""Where the time goes: `annotate`, `train` and `update` stage by stage, and forward time against genes and cells.

    python benchmarks/profiles.py [annotate] [train] [update] [--cells 12000] [--threads 1]
    python benchmarks/profiles.py --figure docs/figures

Each command runs in a process of its own, from its first import to its end, on resampled real cells (`scale.py`). The
functions of each stage are timed by the processor seconds of their own thread, less those of other stages that they
call, so what else the machine does counts little; a clock at a dozen of places costs next to nothing. Two stages are
compared with what the machine can do, measured in the same process: the blocks with a large matrix product, the gather
with both a copy of memory and that product.

`--figure` times the forward pass on real cells cut down to 250 to 4,000 expressed genes, and on more and more cells,
and writes ``cost.svg``.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

STAGES: dict[str, tuple[str, ...]] = {
    "model read": ("checkpoint:load",),
    "names of genes": ("gene_names:canonical_genes",),
    "cells read and checked": ("cells:read_cells", "counts:find_counts", "counts:Counts.rows"),
    "alignment": ("genes:Alignment.apply", "training_cells:gather"),
    "random views": ("augmentation:Augmentation.view",),
    "tokens": (
        "tokenizers.base:View.taken",
        "tokenizers.base:View.whole",
        "tokenizers.values:ValuesTokenizer.tokenize",
    ),
    "gather": ("backbones.latent:LatentBackbone.gather",),
    "gather, gradient": ("backbones.gated_sum:GatedSum.backward",),
    "blocks": ("backbones.base:TransformerBlock.forward",),
    "norms and pool": ("backbones.latent:LatentBackbone.states", "backbones.latent:LatentBackbone.pool"),
    "head": ("heads:GrowingHead.forward", "heads:GrowingHead.member_logits"),
    "linear member": ("linear:LinearModel.log_proba", "linear:logistic_regression"),
    "rejector": ("rejection.combined:CombinedRejector.score", "rejection.combined:CombinedRejector.fitted"),
    "gradient of blocks and head": ("torch:Tensor.backward",),
    "optimiser": ("torch.optim:AdamW.step", "torch.nn.utils:clip_grad_norm_"),
    "journal": ("streaming:_Journal.append",),
    "output written": ("copying:extended", "cells:write_cells", "cells:write_table", "checkpoint:save"),
}
"""Stage -> functions, as ``module:name``; modules of evercell where no other is named."""

BOUNDS = {
    "imports": "files read, Python",
    "model read": "hashes, two banks (.h5ad), drawing weights that are replaced",
    "names of genes": "Python loops over tables of names, once a process",
    "cells read and checked": "decompression, one pass each to sort and to check",
    "alignment": "memory: values copied and sorted by gene",
    "random views": "memory: random numbers, sorting",
    "tokens": "memory: values copied into padded arrays",
    "gather, gradient": "memory: scattered adds to the table of genes",
    "norms and pool": "memory",
    "head": "calls of small operations",
    "linear member": "memory (annotate), L-BFGS (train)",
    "rejector": "memory: arrays of cells by dimensions",
    "gradient of blocks and head": "arithmetic",
    "optimiser": "memory: the table of genes, five times a step",
    "journal": "waiting for the disk (not in processor time)",
    "output written": "copy of stored bytes; gzip of what is new",
    "compiled loops loaded": "numba: files read, linked",
}


class Clock:
    """Processor seconds of stages, each without those of the stages inside it, summed over threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.running = threading.local()
        self.lock = threading.Lock()

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed as a part of a stage."""

        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            stack = self.running.__dict__.setdefault("stack", [])
            stack.append(0.0)
            start = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                spent = time.thread_time() - start
                inside = stack.pop()
                if stack:
                    stack[-1] += spent
                with self.lock:
                    self.seconds[stage] += spent - inside
                    self.calls[stage] += 1

        return run

    def watch_imports(self) -> None:
        """Time `import`, and numba's loading of loops that are compiled already."""
        builtins.__import__ = self.timed("imports", builtins.__import__)

    def watch(self) -> None:
        """Time the functions of all stages, wherever they were imported to."""
        from numba.core.dispatcher import Dispatcher

        Dispatcher._compile_for_args = self.timed("compiled loops loaded", Dispatcher._compile_for_args)
        for stage, names in STAGES.items():
            for name in names:
                module_name, _, path = name.partition(":")
                if not module_name.startswith("torch"):
                    module_name = f"evercell.{module_name}"
                owner = importlib.import_module(module_name)
                *holders, last = path.split(".")
                for holder in holders:
                    owner = getattr(owner, holder)
                raw = inspect.getattr_static(owner, last)
                inner = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw
                timed = self.timed(stage, inner)
                setattr(owner, last, type(raw)(timed) if inner is not raw else timed)
                if not holders:  # other modules hold the function under its name
                    for other in list(sys.modules.values()):
                        if getattr(other, "__name__", "").startswith(("evercell", "torch.nn.utils")):
                            for key, value in list(vars(other).items()):
                                if value is raw:
                                    setattr(other, key, timed)


def child(what: str, folder: Path, samples: int) -> None:
    """Run a command in this process, timed; print the seconds of each stage."""
    clock = Clock()
    clock.watch_imports()
    import evercell.copying
    import evercell.registry
    import evercell.streaming
    from evercell import cli

    if what != "annotate":
        import evercell.updating.update  # noqa: F401

    clock.watch()
    tokens = _count_tokens()
    query, output = str(folder / "query.h5ad"), str(folder / f"out-{what}")
    labelled, more = str(folder / "labelled.h5ad"), str(folder / "more.h5ad")
    words = {
        "annotate": ["annotate", query, "--model", "human-immune", "--output", f"{output}.h5ad"],
        "train": ["train", labelled, "--labels", "cell_type", "--output", output],
        "update": ["update", str(folder / "out-train"), more, "--labels", "cell_type", "--force", "--output", output],
    }[what]
    if what != "annotate":
        words += ["--samples", str(samples)]
    start = time.perf_counter()
    code = cli.main([*words, "--quiet"])
    if code:
        raise SystemExit(code)
    seconds, wall = time.process_time(), time.perf_counter() - start
    found = dict(clock.seconds)
    found["other"] = max(seconds - sum(found.values()), 0.0)
    print(json.dumps({"stages": found, "cpu": seconds, "wall": wall, "tokens": tokens, "machine": machine()}))


def _count_tokens() -> dict[str, int]:
    """Counts cells and tokens that are gathered without a gradient, from now on."""
    from evercell.backbones import latent

    counted = {"cells": 0, "tokens": 0}
    gated_sums = latent.gated_sums

    def count(gene_ids: Any, values: Any, lengths: Any, *others: Any) -> Any:
        counted["cells"] += len(lengths)
        counted["tokens"] += int(lengths.sum())
        return gated_sums(gene_ids, values, lengths, *others)

    latent.gated_sums = count
    return counted


def machine() -> dict[str, float]:
    """What one thread can do: GB/s of a copy (read and written), Gflop/s of a matrix product in float32."""
    import torch

    torch.set_num_threads(1)
    source = torch.ones(1 << 25)
    into = torch.empty_like(source)
    a = torch.ones(1024, 1024)

    def best(work: Callable[[], Any]) -> float:
        found = []
        for _ in range(5):
            start = time.thread_time()
            work()
            found.append(time.thread_time() - start)
        return min(found)

    return {
        "copy": 2 * source.nbytes / best(lambda: into.copy_(source)) / 1e9,
        "product": 2 * 1024**3 / best(lambda: a @ a) / 1e9,
    }


def bound(stage: str, seconds: float, found: dict[str, Any]) -> str:
    """What bounds a stage, in words; of the two that compute, with how near they come to it."""
    cells, tokens, able = found["tokens"]["cells"], found["tokens"]["tokens"], found["machine"]
    if stage not in ("gather", "blocks") or not tokens or found["what"] != "annotate":
        return BOUNDS.get(stage, {"gather": "arithmetic, memory", "blocks": "arithmetic"}.get(stage, ""))
    # The default model: width 192, 8 latents, 24 gates, 2 blocks of expansion 2 in each of 3 members of width 64.
    if stage == "gather":
        rate, speed = 2 * tokens * 8 * 192 / seconds / 1e9, tokens * 4 * (192 + 24) / seconds / 1e9
        tables = f"tables read at {speed:.1f} GB/s of {able['copy']:.0f}"
        return f"arithmetic: {rate:.0f} Gflop/s of {able['product']:.0f}; {tables}"
    rate = 2 * cells * 3 * 8 * 2 * (4 + 2 * 2) * 64**2 / seconds / 1e9
    return f"arithmetic: {rate:.0f} Gflop/s of {able['product']:.0f}"


def profile(commands: list[str], n_cells: int, samples: int, threads: int) -> None:
    """Run the commands and print their tables."""
    from scale import THREADS, make
    from tasks import load

    environment = {**os.environ, **dict.fromkeys(THREADS, str(threads))}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "annotate" in commands:
            make(folder / "query.h5ad", n_cells, "gzip")
        if {"train", "update"} & set(commands):
            cells = load("pbmc4k_labelled")
            order = np.random.default_rng(0).permutation(cells.n_obs)
            cells[order[:2000]].write_h5ad(folder / "labelled.h5ad", compression="gzip")
            cells[order[2000:3000]].write_h5ad(folder / "more.h5ad", compression="gzip")
        wanted = [what for what in ("annotate", "train", "update") if what in commands]
        if "update" in wanted and "train" not in wanted:
            wanted.insert(wanted.index("update"), "train")
        for what in wanted:
            command = [sys.executable, __file__, "--child", what, "--folder", str(folder), "--samples", str(samples)]
            run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found = {**json.loads(run.stdout.splitlines()[-1]), "what": what}
            size = (
                f"{n_cells:,} cells, gzipped" if what == "annotate" else "2,000 cells" if what == "train" else "1,000"
            )
            print(f"\n`evercell {what}`, {size}, {threads} threads: {found['cpu']:.1f} s of processor time, ", end="")
            print(f"{found['wall']:.1f} s by the clock without imports, load {os.getloadavg()[0]:.1f}\n")
            print("| stage | s | share | bound |\n|---|---:|---:|---|")
            for stage, seconds in sorted(found["stages"].items(), key=lambda one: -one[1]):
                if seconds >= 0.005 * found["cpu"]:
                    print(
                        f"| {stage} | {seconds:.2f} | {seconds / found['cpu']:.1%} | {bound(stage, seconds, found)} |"
                    )


GENES = (250, 500, 1000, 1500, 2000, 3000, 4000)
CELLS = (256, 512, 1024, 2048, 4096)
POOLED = 8  # cells whose counts are added, so that there are 4,000 expressed genes to choose from
INK, LINE = "#808080", "#3b82c4"  # read on white and on black


def figure(folder: Path) -> None:
    """Measure the forward pass against expressed genes and cells; write ``cost.svg`` and print the figures."""
    import torch
    from scipy import sparse
    from tasks import load

    from evercell.annotator import BATCH
    from evercell.benching import new_model
    from evercell.tokenizers import View

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    real = sparse.csr_matrix(load("pbmc8k_labelled").X).astype(np.float32)
    real = real[:, np.flatnonzero(real.getnnz(axis=0) >= 3)]
    pools = sparse.csr_matrix((np.ones(2 * BATCH * POOLED), (np.repeat(np.arange(2 * BATCH), POOLED),
                               rng.integers(0, real.shape[0], 2 * BATCH * POOLED))),
                              shape=(2 * BATCH, real.shape[0])).astype(np.float32) @ real  # fmt: skip
    pools = pools[np.flatnonzero(pools.getnnz(axis=1) >= max(GENES))][:BATCH]
    model = new_model("latent", real.shape[1], 10)

    def seconds(counts: sparse.csr_matrix, repeats: int = 5) -> float:
        view, found = View.whole(counts), []
        for _ in range(repeats):
            start = time.thread_time()
            model.represent(view)
            found.append(time.thread_time() - start)
        return float(np.median(found))

    seconds(pools[:1])  # compiled loops are loaded
    by_genes = []
    for n_genes in GENES:
        kept = np.concatenate([start + np.sort(rng.permutation(stop - start)[:n_genes])
                               for start, stop in zip(pools.indptr, pools.indptr[1:], strict=False)])  # fmt: skip
        rows = np.arange(pools.shape[0] + 1) * n_genes
        some = sparse.csr_matrix((pools.data[kept], pools.indices[kept], rows), shape=pools.shape)
        by_genes.append(1000 * seconds(some) / pools.shape[0])
    by_cells = [seconds(real[rng.integers(0, real.shape[0], n)], 3) for n in CELLS]
    mean = real.nnz / real.shape[0]
    print(f"Forward pass of latent, one thread, processor time, load {os.getloadavg()[0]:.1f}\n")
    fits = [_line("expressed genes", GENES, by_genes, "ms a cell"), _line("cells", CELLS, by_cells, "s")]
    _draw(folder / "cost.svg", by_genes, by_cells, fits, f"{mean:,.0f}")


def _line(of: str, x: tuple[int, ...], y: list[float], unit: str) -> tuple[float, float]:
    """Slope and offset of a straight line through the points, printed with how well it fits."""
    slope, offset = np.polyfit(x, y, 1)
    rest = np.asarray(y) - (slope * np.asarray(x) + offset)
    share = 1 - rest.var() / np.var(y)
    print(f"| {of} | {unit} |\n|---:|---:|")
    for one, value in zip(x, y, strict=True):
        print(f"| {one:,} | {value:.3g} |")
    print(f"\nline: {1000 * slope:.3g} {unit} for every 1,000 {of}, {offset:.2g} {unit} at none, R2 {share:.4f}\n")
    return float(slope), float(offset)


def _draw(path: Path, by_genes: list[float], by_cells: list[float], fits: list[tuple[float, float]], mean: str) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    colours = {f"{of}.color": INK for of in ("text", "xtick", "ytick")} | {
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
    }
    style = {"svg.fonttype": "none", "svg.hashsalt": "evercell", "font.size": 11, **colours}
    panels = (
        (GENES, by_genes, "expressed genes of a cell", "milliseconds a cell"),
        (CELLS, by_cells, f"cells ({mean} expressed genes each)", "seconds"),
    )
    with plt.rc_context(style):
        drawn, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for axis, (x, y, along, up), (slope, offset) in zip(axes, panels, fits, strict=True):
            ends = np.array([0, max(x)])
            axis.plot(ends, slope * ends + offset, color=INK, linewidth=1, linestyle="--")
            axis.plot(x, y, "o", color=LINE)
            axis.set(xlabel=along, ylabel=up, xlim=(0, None), ylim=(0, None))
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.set_major_formatter("{x:,.0f}")
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(drawn)
    print(f"written: {path}")


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help="annotate, train, update; annotate and train")
    parser.add_argument("--cells", type=int, default=12_000)
    parser.add_argument("--samples", type=int, default=24_000, help="cells that a training draws")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", type=Path, metavar="DIR", help="measure and draw what the forward pass costs")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder, options.samples)
        return 0
    if options.figure is not None:
        figure(options.figure)
    if options.figure is None or options.commands:
        profile(options.commands or ["annotate", "train"], options.cells, options.samples, options.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
