"""What the signs of a file's cells mean, and what to do about them."""

from __future__ import annotations

from collections.abc import Iterable

from evercell.doctor.finding import Finding
from evercell.doctor.signs import FAINT, Signs

# Where not said otherwise: between what real files have and what the same files have when spoiled (docs/doctor.md).
SHALLOW = 500  # counts of a cell below which types blur
MANY_FAINT = 0.1  # of the cells
MANY_DAMAGED = 0.2  # of the cells
MISNAMED = 0.65
NUCLEI_MITO, NUCLEI_RIBO, NUCLEI_NUCLEAR = 0.05, 0.03, 0.03
MUCH_AMBIENT = 0.1
MANY_DOUBLETS = 0.11


def sign_findings(signs: Signs) -> list[Finding]:
    """Findings on the cells of a file."""
    found = [*_names(signs), *_depth(signs), *_droplets(signs), *_copies(signs), *_damage(signs)]
    return [*found, *_nuclei(signs), *_ambient(signs), *_doublets(signs)]


def _names(signs: Signs) -> Iterable[Finding]:
    if signs.fit is None:
        return
    said = f"a gene that every cell expresses lies above another one in {signs.fit:.0%} of the pairs"
    if signs.fit >= MISNAMED:
        yield Finding("info", "names and values", said)
        return
    yield Finding(
        "error",
        "names and values",
        said,
        f"{MISNAMED:.0%} or more; chance gives 50%",
        "gene names and columns are in different orders, or the values are no expression",
        "join the matrix and its gene table again, by name; then pass the right file",
    )


def _depth(signs: Signs) -> Iterable[Finding]:
    said = f"median of {signs.depth:,.0f} counts and {signs.n_genes:,.0f} genes a cell"
    if signs.depth >= SHALLOW:
        yield Finding("info", "depth", said)
        return
    yield Finding(
        "warning",
        "depth",
        said,
        f"{SHALLOW} counts or more",
        "shallow sequencing, a small panel, or droplets without a cell",
        f"cells of fewer than {SHALLOW} counts are hard to label: filter them, or give all measured genes",
    )


def _droplets(signs: Signs) -> Iterable[Finding]:
    if signs.empty:
        yield Finding(
            "warning",
            "empty cells",
            f"{signs.empty:,} of {signs.n_cells:,} cells have no counts",
            "none",
            "droplets that were not filtered, or cells of which all genes were filtered out",
            "remove them, or pass --empty-cells keep",
        )
    if signs.faint > MANY_FAINT:
        yield Finding(
            "warning",
            "empty droplets",
            f"{signs.faint:.1%} of the cells have fewer than {FAINT} counts and a twentieth of the deepest tenth",
            f"{MANY_FAINT:.0%} or fewer",
            "the raw matrix with all barcodes instead of the filtered one",
            "give the filtered matrix, or drop them with `evercell preprocess --min-counts`",
        )


def _copies(signs: Signs) -> Iterable[Finding]:
    if signs.copies:
        yield Finding(
            "warning",
            "copies",
            f"{signs.copies:,} cells have the very counts of another cell",
            "none",
            "a file was joined twice, or rare cells were repeated",
            "remove them before training: a copy of a training cell is no test",
        )


def _damage(signs: Signs) -> Iterable[Finding]:
    if signs.damaged is None:
        return
    said = f"{signs.damaged:.1%} of the cells have a quarter of their counts or more in mitochondrial genes"
    if signs.damaged <= MANY_DAMAGED:
        yield Finding("info", "damaged cells", said)
        return
    yield Finding(
        "warning",
        "damaged cells",
        said,
        f"{MANY_DAMAGED:.0%} or fewer",
        "cells that broke before they were caught; heart and liver have many mitochondria of their own",
        "drop them with `evercell preprocess --max-mito`",
    )


def are_nuclei(signs: Signs) -> bool:
    """Whether the counts are of nuclei: little of mitochondria and ribosomal proteins, much of nuclear transcripts."""
    shares = (signs.mito, signs.ribo, signs.nuclear)
    if any(share is None for share in shares):
        return False
    mito, ribo, nuclear = (float(share or 0) for share in shares)
    return mito < NUCLEI_MITO and ribo < NUCLEI_RIBO and nuclear > NUCLEI_NUCLEAR


def _nuclei(signs: Signs) -> Iterable[Finding]:
    if are_nuclei(signs):
        yield Finding(
            "info",
            "nuclei",
            f"{signs.mito:.1%} of the counts are mitochondrial, {signs.ribo:.1%} of ribosomal proteins, "
            f"{signs.nuclear:.1%} of transcripts that stay in the nucleus",
            cause="nuclei, not cells",
            mend="a --model trained on nuclei labels them best",
        )


def _ambient(signs: Signs) -> Iterable[Finding]:
    if signs.ambient is None:
        return
    said = f"genes of one kind of cell are in the others at {signs.ambient:.0%} of their mean"
    if signs.ambient <= MUCH_AMBIENT:
        yield Finding("info", "ambient RNA", said)
        return
    yield Finding(
        "warning",
        "ambient RNA",
        said,
        f"{MUCH_AMBIENT:.0%} or less",
        "RNA of broken cells that is in every droplet",
        "remove it (SoupX, CellBender, DecontX) and give the corrected counts, rounded; doubt types of few markers",
    )


def _doublets(signs: Signs) -> Iterable[Finding]:
    if signs.doublets is None:
        return
    said = f"{signs.doublets:.1%} of the cells lie where only two unlike cells together come to lie"
    if signs.doublets <= MANY_DOUBLETS:
        yield Finding("info", "doublets", said)
        return
    yield Finding(
        "warning",
        "doublets",
        said,
        f"{MANY_DOUBLETS:.0%} or fewer",
        "droplets that caught two cells: too many were loaded",
        "drop them with `evercell preprocess --doublets drop`",
    )
