"""Cells a second of `pretrain` in two processes, as a ratio to one process in the same session, and whether the models
are equal.

    python benchmarks/several_processes.py [FILE...]

Each run is one of the same steps, two batches each: one process with one thread, one process with as many threads as
there are cores, two processes with one thread each. The time is that between two looks at the held-out cells, one of
which it holds, so that neither reading nor compiling is in it. Load of the machine before and after is printed: what
else runs takes cores away from all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

import evercell as ec
from evercell.checkpoint import save
from evercell.distributed import together
from evercell.pretraining import PretrainingSettings

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "labelled" / "human"
FILES = [DATA / f"{name}.h5ad" for name in ("muraro_pancreas", "tritschler_pancreas", "baron_human")]
BATCHES, LOOKS = 2, 3


def worker(files: list[str], folder: Path, steps: int) -> None:
    """One run, in as many processes as were started."""
    settings = PretrainingSettings()
    samples = steps * BATCHES * settings.training.batch_size
    training = replace(settings.training, samples=samples, batches_a_step=BATCHES, evaluations=LOOKS, averaging=0.0)
    with together("cpu", batches=BATCHES) as process:
        settings = replace(settings, training=training)
        model = ec.pretrain(files, settings=settings, device="cpu", state_folder=folder / "state", shown=False)
    if process.first:
        save(model, folder / "model")


def cells_a_second(folder: Path) -> float:
    """From the log: cells between the first look and the last."""
    rows = [json.loads(line) for line in (folder / "state" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    batch = PretrainingSettings().training.batch_size
    return float((rows[-1]["step"] - rows[0]["step"]) * BATCHES * batch / (rows[-1]["seconds"] - rows[0]["seconds"]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", default=[str(file) for file in FILES])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.files, options.worker, options.steps)
        return
    cores = os.cpu_count() or 1
    print(f"{cores} cores, load {os.getloadavg()[0]:.1f}, {options.steps} steps of {BATCHES} batches")
    runs = {"1 process, 1 thread": (1, 1), f"1 process, {cores} threads": (1, cores), "2 processes, 1 thread": (2, 1)}
    weights: dict[str, dict[str, torch.Tensor]] = {}
    reference = 0.0
    for name, (processes, threads) in runs.items():
        with tempfile.TemporaryDirectory() as place:
            start = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            words = [__file__, *options.files, "--steps", str(options.steps), "--worker", place]
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            subprocess.run([sys.executable, *start, *words], check=True, env=environment)
            speed = cells_a_second(Path(place))
            weights[name] = load_file(Path(place) / "model" / "weights.safetensors")
        reference = reference or speed
        first = next(iter(weights.values()))
        apart = max(float((one - first[key]).abs().max()) for key, one in weights[name].items() if one.numel())
        print(f"{name:<24}{speed:>8.0f} cells/s{speed / reference:>8.2f}   largest difference of a weight {apart:g}")
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
