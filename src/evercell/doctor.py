"""The doctor: is the installation sound, can a file be used, and what mends it."""

from __future__ import annotations

import os
import platform
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from evercell.errors import EvercellError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from evercell.cells import Counts
    from evercell.genes import GeneVocabulary

FEW_RECOGNISED = 0.5  # share of the genes that are known, below which the names are looked at
FEW_OF_MODEL = 0.6  # share of a model's genes that a file measured
SHALLOW = 500  # counts of a cell below which types blur
DONORS = re.compile(r"donor|patient|subject|individual|batch|sample|library|dataset|study|channel", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Parameters
    ----------
    level
        ``ok``, ``warning`` (it works, but look at it) or ``error`` (it does not work).
    subject
        What was looked at.
    message
        What was found.
    mend
        What mends it; empty where there is nothing to mend.
    """

    level: Literal["ok", "warning", "error"]
    subject: str
    message: str
    mend: str = ""


def check_installation() -> list[Finding]:
    """Look at Python, the packages evercell needs, threads, GPU, folder for temporary files and packaged data."""
    findings = [Finding("ok", "system", f"Python {platform.python_version()}, {platform.platform()}")]
    findings += _packages()
    try:
        findings += _torch()
    except Exception as error:  # a broken build of torch fails in many ways
        findings.append(Finding("error", "torch", f"it cannot be imported: {_line(error)}", "install torch again"))
    findings.append(_temporary_files())
    findings += _packaged_data()
    return findings


def _packages() -> Iterable[Finding]:
    """The packages that evercell's own metadata asks for, each with the version that is there."""
    from packaging.requirements import Requirement

    found, wrong = [], []
    for text in metadata.requires("evercell") or []:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        mend = f'pip install "{needed.name}{needed.specifier}"'
        try:
            version = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            if needed.name != "pynndescent":  # asked for to keep its version in bounds, not because it is imported
                wrong.append(Finding("error", needed.name, "it is not installed", mend))
            continue
        found.append(f"{needed.name} {version}")
        if not needed.specifier.contains(version, prereleases=True):
            wrong.append(Finding("warning", needed.name, f"version {version} is not {needed.specifier}", mend))
    return [Finding("ok", "packages", ", ".join(found)), *wrong]


def _torch() -> Iterable[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if threads > cores:
        yield Finding(
            "warning",
            "threads",
            f"torch uses {threads} threads on {cores} cores, which slows it down",
            f"set OMP_NUM_THREADS={cores}",
        )
    else:
        yield Finding("ok", "threads", f"torch uses {threads} of {cores} cores")
    if torch.cuda.is_available():
        yield Finding("ok", "GPU", ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))
    else:
        yield Finding("ok", "GPU", "none that torch can use; evercell runs on the CPU")


def _temporary_files() -> Finding:
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"evercell")
    except OSError as error:
        return Finding("error", "temporary files", _line(error), "make room, or point TMPDIR at another folder")
    return Finding("ok", "temporary files", f"can be written to `{tempfile.gettempdir()}`")


def _packaged_data() -> Iterable[Finding]:
    try:
        from evercell.examples import EXAMPLES, describe
        from evercell.gene_names import canonical_genes, orthologues

        good = canonical_genes(["TP53"]).recognised == 1 and bool(orthologues(["INS", "ALB"], to="mouse"))
        cells = sum(describe(name).n_cells for name in EXAMPLES)
    except Exception as error:  # whatever a cut-off file leads to
        good, cells = False, 0
        what = _line(error)
    else:
        what = "gene tables do not know TP53"
    if not good:
        return [Finding("error", "packaged data", what, "pip install --force-reinstall evercell")]
    return [Finding("ok", "packaged data", f"gene tables, orthologues, {len(EXAMPLES)} studies of {cells:,} cells")]


def check_cells(
    path: str | Path,
    vocabulary: GeneVocabulary | None = None,
    *,
    layer: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
) -> list[Finding]:
    """Look at a file of cells.

    Parameters
    ----------
    path
        File of a kind that `read_cells` reads.
    vocabulary
        Genes of a model, to say how many of them were measured.
    layer, species, gene_column
        As in `annotate`; found if not given.

    Returns
    -------
    list of Finding
        With an ``error`` where `annotate` and `train` would refuse the file. The file is not changed.
    """
    from evercell.cells import find_counts, read_cells

    name = str(path)
    try:
        adata = read_cells(path, layer=layer)
        counts = find_counts(adata, layer=layer, name=name, empty_cells="keep")
    except EvercellError as error:
        return [Finding("error", "counts", error.message, error.hint or "")]
    findings = [Finding("ok", "file", f"`{name}`: {adata.n_obs:,} cells, {adata.n_vars:,} genes")]
    findings += _values(adata, counts, name)
    findings += _genes(counts, vocabulary, name, species=species, column=gene_column)
    findings += _cells(counts)
    findings += _columns(adata.obs)
    return findings


def _values(adata: AnnData, counts: Counts, name: str) -> Iterable[Finding]:
    """What each matrix of the file holds, the one that is used first."""
    from evercell.cells import find_counts

    how = "raw counts" if counts.transform == "none" else f"no raw counts, but they can be had back: {counts.transform}"
    yield Finding("ok", "counts", f"taken from {counts.source}, {how}")
    for note in counts.notes:
        yield Finding("ok", "counts", note)
    sources = {"X": adata.X is not None, "raw": adata.raw is not None, **dict.fromkeys(map(str, adata.layers), True)}
    used = {"raw.X": "raw"}.get(counts.source, counts.source.removeprefix("layers['").removesuffix("']"))
    for source in (one for one, there in sources.items() if there and one != used):
        try:
            other = find_counts(adata, layer=source, name=name, empty_cells="keep")
            said = "raw counts" if other.transform == "none" else other.transform
        except EvercellError as error:
            said = error.message
        yield Finding("ok", f"not used: {source}", said)


def _genes(
    counts: Counts, vocabulary: GeneVocabulary | None, name: str, *, species: str, column: str | None
) -> Iterable[Finding]:
    from evercell.genes import align, canonical_genes

    try:
        found = canonical_genes(counts.genes, species=species, column=column)
    except EvercellError as error:
        yield Finding("error", "genes", error.message, error.hint or "")
        return
    where = "the index of var" if found.column == "index" else f"var['{found.column}']"
    said = f"{found.species}, names from {where}, {found.recognised:.0%} of {len(found):,} recognised"
    if found.recognised < FEW_RECOGNISED:
        mend = "pass --gene-column with the column that holds symbols or Ensembl ids, or --species"
        yield Finding("warning", "genes", said, mend)
    else:
        yield Finding("ok", "genes", said)
    if vocabulary is None:
        return
    try:
        coverage = align(counts.genes, vocabulary, species=species, column=column, name=name).coverage
    except EvercellError as error:
        yield Finding("error", "genes of the model", error.message, error.hint or "")
        return
    if coverage.share_of_model < FEW_OF_MODEL:
        mend = "give a file with all measured genes, or expect less and look at the confidence"
        yield Finding("warning", "genes of the model", coverage.sentence(), mend)
    else:
        yield Finding("ok", "genes of the model", coverage.sentence())


def _cells(counts: Counts) -> Iterable[Finding]:
    """Depth, empty cells, and cells that are copies of another."""
    import numpy as np

    totals, n_genes, prints = [], [], []
    for _, _, block in counts.chunks():
        totals.append(np.asarray(block.sum(axis=1)).ravel())
        n_genes.append(np.diff(block.indptr))
        for start, stop in zip(block.indptr[:-1], block.indptr[1:], strict=True):
            prints.append(hash((block.indices[start:stop].tobytes(), block.data[start:stop].tobytes())))
    total, genes = np.concatenate(totals), np.concatenate(n_genes)
    empty = int((genes == 0).sum())
    depth, number = (float(np.median(values[genes > 0])) if empty < len(genes) else 0.0 for values in (total, genes))
    said = f"median of {depth:,.0f} counts and {number:,.0f} genes a cell"
    if depth < SHALLOW:
        yield Finding("warning", "depth", said, f"cells of fewer than {SHALLOW} counts are hard to label: filter them")
    else:
        yield Finding("ok", "depth", said)
    if empty:
        mend = "remove them, or pass --empty-cells keep"
        yield Finding("warning", "empty cells", f"{empty:,} of {len(genes):,} cells have no counts", mend)
    copies = len(genes) - empty - len({one for one, n in zip(prints, genes, strict=True) if n})
    if copies:
        mend = "remove them before training: a copy of a training cell is no test"
        yield Finding("warning", "copies", f"{copies:,} cells have the very counts of another cell", mend)


def _columns(obs: pd.DataFrame) -> Iterable[Finding]:
    """Columns of `obs` that may hold cell types or donors."""
    from evercell.labels import _label_columns, listed

    donors = [str(one) for one in obs if DONORS.search(str(one)) and 2 <= obs[one].nunique() <= max(2, len(obs) // 2)]
    labels = [one for one in _label_columns(obs) if one not in donors]
    said = listed(labels, 5) if labels else "no column of obs looks like cell types; they are needed for training only"
    yield Finding("ok", "--labels", said)
    yield Finding("ok", "--donor or --batch", listed(donors, 5) if donors else "no column of obs looks like donors")


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
