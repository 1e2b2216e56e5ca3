"""Is the installation sound: Python, packages, threads, GPU, temporary files, packaged data."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterable
from importlib import metadata

from evercell.doctor.finding import Finding
from evercell.errors import class_and_words


def check_installation() -> list[Finding]:
    """Look at Python, the packages evercell needs, threads, GPU, folder for temporary files and packaged data."""
    findings = [Finding("info", "system", f"Python {platform.python_version()}, {platform.platform()}")]
    findings += _packages()
    try:
        findings += _torch()
    except Exception as error:  # a broken build of torch fails in many ways
        findings.append(
            Finding("error", "torch", f"it cannot be imported: {class_and_words(error)}", mend="install torch again")
        )
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
                wrong.append(Finding("error", needed.name, "it is not installed", mend=mend))
            continue
        found.append(f"{needed.name} {version}")
        if not needed.specifier.contains(version, prereleases=True):
            wrong.append(Finding("warning", needed.name, f"version {version} is not {needed.specifier}", mend=mend))
    return [Finding("info", "packages", ", ".join(found)), *wrong]


def _torch() -> Iterable[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if threads > cores:
        yield Finding(
            "warning",
            "threads",
            f"torch uses {threads} threads on {cores} cores",
            expected=f"at most {cores}",
            cause="OMP_NUM_THREADS is set, or the process may use fewer cores than the machine has",
            mend=f"pass --threads {cores}, or set OMP_NUM_THREADS={cores}",
        )
    else:
        yield Finding("info", "threads", f"torch uses {threads} of {cores} cores")
    if torch.cuda.is_available():
        yield Finding("info", "GPU", ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))
    else:
        yield Finding("info", "GPU", "none that torch can use; evercell runs on the CPU")


def _temporary_files() -> Finding:
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"evercell")
    except OSError as error:
        return Finding(
            "error", "temporary files", class_and_words(error), mend="make room, or point TMPDIR at another folder"
        )
    return Finding("info", "temporary files", f"can be written to `{tempfile.gettempdir()}`")


def _packaged_data() -> Iterable[Finding]:
    try:
        from evercell.examples import EXAMPLES, describe
        from evercell.gene_names import canonical_genes, orthologues

        good = canonical_genes(["TP53"]).recognised == 1 and bool(orthologues(["INS", "ALB"], to="mouse"))
        cells = sum(describe(name).n_cells for name in EXAMPLES)
    except Exception as error:  # whatever a cut-off file leads to
        good, cells = False, 0
        what = class_and_words(error)
    else:
        what = "gene tables do not know TP53"
    if not good:
        return [Finding("error", "packaged data", what, mend="pip install --force-reinstall evercell")]
    return [Finding("info", "packaged data", f"gene tables, orthologues, {len(EXAMPLES)} studies of {cells:,} cells")]
