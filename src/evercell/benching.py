"""How fast this machine is: annotation, forward pass and training step, measured in about a minute.

The cells are packaged real ones, drawn with repeats and thinned to a random depth, so no two are alike and any number
can be made; they tell time, not accuracy. Every part has its seconds, within which it is repeated; medians are given.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_matrix, vstack

from evercell.errors import SettingsError
from evercell.examples import EXAMPLES, load_example

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

    from evercell.annotator import Annotator

SECONDS = 45.0
"""Seconds that the parts share, where none are asked for; the start of the process and of Scanpy comes on top."""

SHARES = {
    "forward": 0.1,
    "annotate": 0.3,
    "scanpy": 0.1,
    "train": 0.15,
    "performer_forward": 0.1,
    "performer_train": 0.15,
    "draw": 0.05,
}
"""Share of the seconds that each part may take."""

WORDS = {
    "annotate": "annotate, file to file",
    "scanpy": "Scanpy: read, normalise, log1p",
    "forward": "forward pass",
    "train": "training step, latent",
    "performer_forward": "forward pass, performer, 1,000 genes",
    "performer_train": "training step, performer, 1,000 genes",
    "draw": "training cells drawn",
}
FEWEST, MOST = 500, 8000  # cells of the file
BATCH, FEW = 128, 4  # training cells a step; of performer, which takes seconds for more
GENES = 1000  # of performer, as CANAL has it
STEPS = 4  # training steps timed at a time
COPIED = 1 << 28  # bytes


@dataclass(frozen=True)
class Pace:
    """How fast something went: cells a second, the median of `repeats` times that `cells` were done."""

    cells_per_second: float
    cells: int
    repeats: int


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Parameters
    ----------
    paces
        Of each part, by its name in `WORDS`.
    cells
        What they were measured on: where the cells come from, genes, expressed genes a cell.
    machine
        Processor, cores, threads, load, device, versions.
    model
        Name of the model that annotated, its backbone and number of genes.
    peak_mb
        Most memory of this process until the file was annotated; None where the system does not tell.
    bandwidth
        On a GPU: GB a second at which the forward pass reads its tables, of a copy, and their ratio; else None.
    """

    paces: Mapping[str, Pace]
    cells: Mapping[str, Any]
    machine: Mapping[str, Any]
    model: Mapping[str, Any]
    peak_mb: float | None
    bandwidth: Mapping[str, float] | None

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as fast: `latent` as `performer`; and Scanpy's reading as annotation."""
        rate = {name: pace.cells_per_second for name, pace in self.paces.items()}
        return {
            "forward_latent_to_performer": rate["forward"] / rate["performer_forward"],
            "train_latent_to_performer": rate["train"] / rate["performer_train"],
            "scanpy_to_annotate": rate["scanpy"] / rate["annotate"],
        }

    @property
    def seconds_of(self) -> dict[str, float]:
        """Seconds that files of 100,000 and of a million such cells would take."""
        return {str(n): n / self.paces["annotate"].cells_per_second for n in (100_000, 1_000_000)}

    def estimate(self) -> str:
        """The same in words."""
        small, large = (in_words(seconds) for seconds in self.seconds_of.values())
        return (
            f"a file of 100,000 cells takes about {small} here, one of a million about {large}; time is in proportion "
            f"to the genes that a cell expresses (here {self.cells['expressed_genes']:,})"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            **asdict(self),
            "paces": {name: asdict(pace) for name, pace in self.paces.items()},
            "ratios": self.ratios,
            "seconds_of": self.seconds_of,
            "estimate": self.estimate(),
        }


def bench(
    model: Annotator, *, name: str, device: str = "auto", threads: int | None = None, seconds: float = SECONDS
) -> Bench:
    """Measure this machine.

    Parameters
    ----------
    model
        Annotator that labels the file; it must know genes of the human pancreas, or their mouse orthologues.
    name
        What to call it.
    device
        ``auto``, ``cpu`` or ``cuda``.
    threads
        Threads of the CPU; by default as many as torch takes.
    seconds
        What the parts share. Each is run at least once, so a slow machine takes longer.

    Raises
    ------
    GenesError, ModelError, SettingsError

    Examples
    --------
    >>> import evercell as ec
    >>> from evercell.benching import bench
    >>> bench(ec.load("human-pancreas"), name="human-pancreas", seconds=1).estimate()  # doctest: +SKIP
    """
    from evercell.genes import align
    from evercell.tokenizers import View
    from evercell.training import choose_device

    if not 0 < seconds <= 3600:
        raise SettingsError(f"seconds is {seconds:g}", hint="give a number above 0 and up to 3600")
    if threads is not None and not 1 <= threads <= 1024:
        raise SettingsError(f"threads is {threads}", hint="give the number of cores to use")
    where = choose_device(device)
    model = model.on(where)
    share = {part: seconds * of for part, of in SHARES.items()}
    paces: dict[str, Pace] = {}
    with _threads(threads) as n_threads, tempfile.TemporaryDirectory() as folder:
        cells = made_cells(1024)
        alignment = align(cells.var_names.tolist(), model.vocabulary, name="the packaged cells")
        view = View.whole(alignment.apply(cells.X), alignment.measured)
        model.represent(view.taken(np.arange(1)))  # compiled loops are loaded
        paces["forward"] = paced(lambda: model.represent(view), len(cells), seconds=share["forward"])
        bandwidth = _bandwidth(model, view, paces["forward"], where)

        # A third of what the forward pass alone would do in the time: reading and writing come on top.
        most = paces["forward"].cells_per_second * share["annotate"] / 3
        file = Path(folder) / "cells.h5ad"
        n_cells = int(np.clip(most // 100 * 100, FEWEST, MOST))
        made_cells(n_cells).write_h5ad(file, compression="gzip")
        paces["annotate"] = paced(
            lambda: _annotate(model, file, file.with_name("annotated.h5ad"), device), n_cells, seconds=share["annotate"]
        )
        peak = _peak_mb()
        paces["scanpy"] = _scanpy(file, n_cells, seconds=share["scanpy"])

        counts, codes = csr_matrix(cells.X), cells.obs["cell_type"].cat.codes.to_numpy().astype(np.int64)
        paces["draw"] = draw_pace(counts, seconds=share["draw"])
        paces["train"] = step_pace("latent", counts, codes, cells_a_step=BATCH, device=where, seconds=share["train"])
        variable = most_variable(counts, GENES)
        paces["performer_forward"] = forward_pace("performer", variable[:FEW], where, share["performer_forward"])
        paces["performer_train"] = step_pace(
            "performer", variable, codes, cells_a_step=FEW, steps=1, device=where, seconds=share["performer_train"]
        )
    facts = {
        "source": "packaged cells of the human pancreas, drawn with repeats and thinned",
        "file_cells": n_cells,
        "genes": cells.n_vars,
        "expressed_genes": round(float(np.diff(view.counts.indptr).mean())),
    }
    about = {"name": name, "backbone": model.backbone.name, "genes": len(model.vocabulary)}
    return Bench(paces, facts, _machine(where, n_threads), about, peak, bandwidth)


def made_cells(n_cells: int, seed: int = 0) -> AnnData:
    """Cells drawn from the packaged examples with repeats, each thinned: a molecule is kept with 0.5 to 1."""
    import pandas as pd
    from anndata import AnnData

    rng = np.random.default_rng(seed)
    examples = [load_example(name) for name in EXAMPLES]
    counts = vstack([csr_matrix(one.X).astype(np.int64) for one in examples], format="csr")
    types = np.concatenate([one.obs["cell_type"].astype(str) for one in examples])
    rows = rng.integers(0, counts.shape[0], n_cells)
    drawn = counts[rows]
    kept = np.repeat(rng.uniform(0.5, 1.0, n_cells), np.diff(drawn.indptr))
    drawn.data = rng.binomial(drawn.data, kept)
    drawn.eliminate_zeros()
    obs = pd.DataFrame({"cell_type": pd.Categorical(types[rows])}, index=[f"cell{row:07d}" for row in range(n_cells)])
    return AnnData(drawn.astype(np.float32), obs=obs, var=examples[0].var[[]])


def paced(work: Callable[[], object], cells: int, *, seconds: float, most: int = 25) -> Pace:
    """Repeat `work`, which does `cells` cells, as long as another time is likely to end within `seconds`."""
    took: list[float] = []
    while not took or (len(took) < most and sum(took) + float(np.median(took)) <= seconds):
        start = time.perf_counter()
        work()
        took.append(max(time.perf_counter() - start, 1e-9))
    return Pace(cells / float(np.median(took)), cells, len(took))


def most_variable(counts: csr_matrix, n_genes: int) -> csr_matrix:
    """The counts (B, G) of the genes with the largest variance, `n_genes` of them at most, in their order."""
    variance = np.asarray(counts.power(2).mean(axis=0) - np.square(counts.mean(axis=0))).ravel()
    return counts[:, np.sort(np.argsort(-variance, kind="stable")[:n_genes])]


def new_model(backbone: str, n_genes: int, n_types: int) -> Annotator:
    """An untrained model of `latent` as it comes, or of `performer` as scBERT and CANAL have it."""
    import torch

    from evercell.annotator import Annotator
    from evercell.backbones import BACKBONES
    from evercell.celltypes import CellTypes
    from evercell.genes import GeneVocabulary
    from evercell.heads import GrowingHead
    from evercell.tokenizers import TOKENIZERS

    names = tuple(f"G{gene}" for gene in range(n_genes))
    tokenizer = TOKENIZERS["bins"](zeros=True) if backbone == "performer" else TOKENIZERS["values"]()  # type: ignore[call-arg]
    with torch.random.fork_rng(devices=[]):
        made = BACKBONES[backbone](n_genes, n_bins=tokenizer.n_bins).eval()
        head = GrowingHead(made.width, n_types).eval()
    types = CellTypes(tuple(f"type{code}" for code in range(n_types)))
    return Annotator.begun(GeneVocabulary(names, names), tokenizer, made, head, types)


def forward_pace(backbone: str, counts: csr_matrix, device: torch.device, seconds: float, most: int = 25) -> Pace:
    """Forward pass of an untrained model over all cells (B, G) in one batch, tokens included."""
    import torch

    from evercell.threads import threads_of
    from evercell.tokenizers import View

    model = new_model(backbone, counts.shape[1], 2).on(device)
    view = View.whole(counts)

    def work() -> None:
        with torch.inference_mode(), threads_of(model.backbone):
            model.backbone(model.tokenizer.tokenize(view).to(device)).cpu()  # .cpu() waits for a GPU

    return paced(work, counts.shape[0], seconds=seconds, most=most)


def step_pace(
    backbone: str,
    counts: csr_matrix,
    codes: np.ndarray,
    *,
    cells_a_step: int,
    device: torch.device,
    seconds: float,
    steps: int = STEPS,
) -> Pace:
    """Training steps of an untrained model, as `train` does them: drawing, random views, loss, gradient, AdamW."""
    from torch import nn

    from evercell.augmentation import Augmentation
    from evercell.classification import classification_loss
    from evercell.threads import threads_of
    from evercell.training import TrainingSettings, fit
    from evercell.training_cells import TrainingCells

    model = new_model(backbone, counts.shape[1], int(codes.max()) + 1).on(device)
    of_one_study = np.zeros(len(codes), dtype=np.int64), np.ones((1, counts.shape[1]), dtype=bool)
    cells = TrainingCells(counts, codes, *of_one_study, None)
    module = nn.ModuleDict({"backbone": model.backbone, "head": model.head})

    def take(n_steps: int) -> None:
        settings = TrainingSettings(samples=cells_a_step * n_steps, batch_size=cells_a_step, evaluations=1)
        loss = classification_loss(
            model, cells, cells.sampling_weights("sqrt"), training=settings, augmentation=Augmentation()
        )
        with threads_of(model.backbone):
            fit(module, loss, settings)

    if backbone != "performer":
        take(1)  # compiled loops are loaded
    return paced(lambda: take(steps), cells_a_step * steps, seconds=seconds)


def draw_pace(counts: csr_matrix, *, seconds: float, n_batches: int = 50) -> Pace:
    """Shuffled batches of training cells, drawn from their counts in memory."""
    from evercell.stored_counts import CellCounts, compact

    stored, rng = CellCounts.of(compact(counts)), np.random.default_rng(0)

    def work() -> None:
        for _ in range(n_batches):
            stored[rng.integers(0, counts.shape[0], BATCH)]

    work()
    return paced(work, n_batches * BATCH, seconds=seconds)


def in_words(seconds: float) -> str:
    """A time, as one would say it: 40 seconds, 3 minutes, 2.5 hours."""
    unit, name = (1.0, "second") if seconds < 90 else (60.0, "minute") if seconds < 5400 else (3600.0, "hour")
    number = seconds / unit
    text = f"{number:.0f}" if number >= 9.5 else f"{number:.1f}".removesuffix(".0")
    return f"{text} {name}{'' if text == '1' else 's'}"


@contextmanager
def _threads(asked: int | None) -> Iterator[int]:
    """Torch's number of threads inside; the caller's is given back."""
    import torch

    before = torch.get_num_threads()
    try:
        if asked is not None:
            torch.set_num_threads(asked)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _annotate(model: Annotator, file: Path, output: Path, device: str) -> None:
    """What `evercell annotate` does once it has begun and has read its model and the names of genes.

    Without fitting the linear member again, which the few genes of the packaged cells would ask for, once a file.
    """
    from evercell.cells import read_cells
    from evercell.copying import extended
    from evercell.streaming import annotated

    cells = read_cells(file, backed=True)
    try:
        with annotated(model, cells, file, output, device=device, adapt=False, shown=False) as result:
            result.write_into(cells)
            arrays = {name: cells.obsm[name] for name in ("X_evercell", "evercell_proba")}
            extended(file, output, obs=cells.obs, obsm=arrays, uns={"evercell": cells.uns["evercell"]})
    finally:
        cells.file.close()  # or the next time could not write


def _scanpy(file: Path, n_cells: int, *, seconds: float) -> Pace:
    """The floor under every tool: the same file read, normalised and log-transformed."""
    import anndata as ad
    import scanpy as sc

    def work() -> None:
        cells = ad.read_h5ad(file)
        sc.pp.normalize_total(cells, target_sum=1e4)
        sc.pp.log1p(cells)

    return paced(work, n_cells, seconds=seconds)


def _bandwidth(model: Annotator, view: Any, pace: Pace, device: torch.device) -> dict[str, float] | None:
    """Bytes of its tables that the forward pass of `latent` gathers a second, beside a copy on the same GPU."""
    if device.type != "cuda" or model.backbone.name != "latent":
        return None
    import torch

    weights = model.backbone.state_dict()
    row = sum(
        weights[name].shape[1] * weights[name].element_size() for name in ("gene_embedding.weight", "gene_gate.weight")
    )
    gathered = view.counts.nnz * row / view.counts.shape[0] * pace.cells_per_second
    source = torch.ones(COPIED // 4, device=device)
    into = torch.empty_like(source)

    def copy() -> None:
        into.copy_(source)
        torch.cuda.synchronize(device)

    copy()
    copied = 2 * COPIED * paced(copy, 1, seconds=1.0).cells_per_second  # read and written
    return {"gathered_gb_s": gathered / 1e9, "copy_gb_s": copied / 1e9, "share": gathered / copied}


def _peak_mb() -> float | None:
    """Most memory that this process has had."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _machine(device: torch.device, n_threads: int) -> dict[str, Any]:
    import torch

    from evercell import __version__

    return {
        "processor": platform.processor() or platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": n_threads,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch": str(torch.__version__),
        "evercell": __version__,
    }
