"""Are the genes of a file known, of which species, how many of them are there, and do their values fit their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from evercell.cells import Counts
from evercell.doctor.finding import Finding
from evercell.errors import EvercellError
from evercell.genes import CanonicalGenes, GeneVocabulary, align, canonical_genes
from evercell.labels import listed

FEW_RECOGNISED = 0.5  # share of the genes that are known, below which the names are looked at
FEW_OF_MODEL = 0.6  # share of a model's genes that a file measured
PANEL = 5000  # genes; whole transcriptomes have three times as many
CLEARER = 0.05  # more of the names known as the other species: about what two annotations of one species differ by
DATE = re.compile(r"\d{1,2}-(?:Mar|Sep|Dec)|(?:Mar|Sep|Dec)-\d{1,2}")


def gene_findings(
    counts: Counts, vocabulary: GeneVocabulary | None, name: str, *, species: str, column: str | None
) -> list[Finding]:
    """What is to be said of the genes of a file, and of those of a model among them."""
    try:
        genes = canonical_genes(counts.genes, species=species, column=column)
    except EvercellError as error:
        return [Finding("error", "genes", error.message, mend=error.hint or "")]
    found = [_names(counts, genes, column), *_species(counts, genes, column), *_dates(counts), *_number(genes)]
    if vocabulary is not None:
        found += _of_model(counts, vocabulary, name, species=species, column=column)
    return found


def _names(counts: Counts, genes: CanonicalGenes, column: str | None) -> Finding:
    where = "the index of var" if genes.column == "index" else f"var['{genes.column}']"
    said = f"{genes.species}, names from {where}, {genes.recognised:.0%} of {len(genes):,} recognised"
    if genes.recognised >= FEW_RECOGNISED:
        return Finding("info", "genes", said)
    return Finding(
        "warning",
        "genes",
        said,
        f"{FEW_RECOGNISED:.0%} or more",
        "names of another kind than symbols and Ensembl ids, or of another species than human and mouse",
        "pass --gene-column with the column that holds symbols or Ensembl ids, or --species",
    )


def _species(counts: Counts, genes: CanonicalGenes, column: str | None) -> Iterable[Finding]:
    """Names that more of are genes of the other species."""
    other = "mouse" if genes.species == "human" else "human"
    as_other = canonical_genes(counts.genes, species=other, column=genes.column if column is None else column)
    if as_other.recognised > genes.recognised + CLEARER:
        yield Finding(
            "warning",
            "species",
            f"{as_other.recognised:.0%} of the genes are {other}, {genes.recognised:.0%} {genes.species}",
            f"genes of {genes.species}",
            f"cells of {other} read as {genes.species}",
            f"pass --species {other}, or leave --species out",
        )


def _dates(counts: Counts) -> Iterable[Finding]:
    """Names of genes such as SEPT2 and MARCH1 that a spreadsheet has turned into dates."""
    dates = [str(one) for one in counts.genes.index if DATE.fullmatch(str(one))]
    if dates:
        yield Finding(
            "warning",
            "gene names",
            f"{len(dates):,} are dates: {listed(dates, 3)}",
            "names such as SEPTIN2 and MARCHF1",
            "the table was opened and saved in a spreadsheet",
            "take the gene names from the original file; these genes are not used as they are",
        )


def _number(genes: CanonicalGenes) -> Iterable[Finding]:
    n_known = round(genes.recognised * len(genes))
    if n_known and len(genes) < PANEL:
        yield Finding(
            "warning",
            "panel",
            f"{len(genes):,} genes",
            f"{PANEL:,} or more, as whole transcriptomes have",
            "a targeted panel, or the file keeps only variable genes",
            "give the file with all measured genes; of a panel, believe types only whose markers are on it",
        )


def _of_model(
    counts: Counts, vocabulary: GeneVocabulary, name: str, *, species: str, column: str | None
) -> Iterable[Finding]:
    try:
        coverage = align(counts.genes, vocabulary, species=species, column=column, name=name).coverage
    except EvercellError as error:
        yield Finding("error", "genes of the model", error.message, mend=error.hint or "")
        return
    if coverage.share_of_model >= FEW_OF_MODEL:
        yield Finding("info", "genes of the model", coverage.sentence())
        return
    yield Finding(
        "warning",
        "genes of the model",
        coverage.sentence(),
        f"{FEW_OF_MODEL:.0%} or more",
        "a panel, chosen genes, or another species" if coverage.n_query < PANEL else "another annotation or species",
        "give a file with all measured genes, or expect less and look at the confidence",
    )


def fits_its_names(means: np.ndarray, ubiquitous: np.ndarray) -> float:
    """Chance that a gene which every cell expresses has a higher mean than one drawn from the others.

    Parameters
    ----------
    means
        Mean count of each gene (G,).
    ubiquitous
        Which genes every cell expresses (G,), bool; at least one, and not all.

    Returns
    -------
    float
        0.5 where names and values have nothing to do with each other, 1 at best.
    """
    from scipy.stats import rankdata

    n, others = int(ubiquitous.sum()), int((~ubiquitous).sum())
    return float((rankdata(means)[ubiquitous].sum() - n * (n + 1) / 2) / (n * others))
