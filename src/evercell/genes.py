"""Genes of any human or mouse file matched to the genes of a model."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from evercell.errors import GenesError
from evercell.gene_names import (
    CanonicalGenes,
    Genes,
    Species,
    canonical_genes,
    current_symbol,
    name_columns,
    orthologue_table,
    orthologues,
)

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = [
    "Alignment", "CanonicalGenes", "Coverage", "GeneVocabulary", "align", "canonical_genes", "orthologues",
]  # fmt: skip

FORMAT_VERSION = 1

_BARCODE = re.compile(r"^(?:\w+[_:#])?[ACGT]{10,}(?:[-_.]\w+)*$")
_NUMBER = re.compile(r"^[-+]?\d+(?:\.\d+)?$")


@dataclass(frozen=True)
class GeneVocabulary:
    """The genes of a model, in the order of their codes. A code keeps its gene for ever.

    Attributes
    ----------
    names
        Canonical names, unique.
    symbols
        A symbol for each gene, to show.
    species
        Species that queries are brought to. A vocabulary of human genes may also hold mouse genes that have no
        one-to-one human orthologue, under their mouse ids.
    """

    names: tuple[str, ...]
    symbols: tuple[str, ...]
    species: Species = "human"

    def __post_init__(self) -> None:
        if len(self.names) != len(self.symbols):
            raise GenesError(f"{len(self.names):,} gene names but {len(self.symbols):,} symbols")
        if len(self._codes) != len(self.names):
            twice = next(name for name, n in Counter(self.names).items() if n > 1)
            raise GenesError(f"gene `{twice}` is twice among the genes of the model")
        if bad := next((n for n in (*self.names, *self.symbols) if any(c in n for c in "\t\n")), None):
            raise GenesError(f"gene name {bad!r} holds a tab or a line break")
        if self.species not in ("human", "mouse"):
            raise GenesError(f"`{self.species}` is no species of evercell; human or mouse was expected")

    @cached_property
    def _codes(self) -> dict[str, int]:
        return {name: code for code, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._codes

    def code(self, name: str) -> int:
        """Code of a gene by its canonical name; ``KeyError`` if the model has no such gene."""
        return self._codes[name]

    @classmethod
    def from_genes(
        cls, genes: Sequence[CanonicalGenes], *, how: Literal["union", "intersection"] = "union"
    ) -> GeneVocabulary:
        """Vocabulary of one or more files, in the order the genes come.

        Mouse files beside human ones are brought to human genes; mouse genes without an orthologue keep their ids.
        """
        if not genes:
            raise GenesError("a vocabulary needs the genes of at least one file")
        species: Species = "mouse" if all(g.species == "mouse" for g in genes) else "human"
        symbols: dict[str, str] = {}
        seen: Counter[str] = Counter()
        for one in genes:
            names = _in_species(one, species, None)
            seen.update(set(names))
            for name, symbol in zip(names, one.symbols.tolist(), strict=True):
                symbols.setdefault(name, symbol if one.species == species else current_symbol(name))
        kept = [name for name in symbols if how == "union" or seen[name] == len(genes)]
        return cls(tuple(kept), tuple(symbols[name] for name in kept), species)

    @classmethod
    def of(cls, genes: Genes, *, species: str = "auto", column: str | None = None) -> GeneVocabulary:
        """Vocabulary of the genes of one file (``adata.var``); see `canonical_genes`."""
        return cls.from_genes([canonical_genes(genes, species=species, column=column)])

    def extended(self, names: Iterable[str]) -> GeneVocabulary:
        """A vocabulary with further canonical names behind the old ones, whose codes stay."""
        new = [name for name in dict.fromkeys(map(str, names)) if name not in self._codes]
        return GeneVocabulary(self.names + tuple(new), self.symbols + tuple(map(current_symbol, new)), self.species)

    def taken(self, columns: np.ndarray) -> GeneVocabulary:
        """Only the genes `columns`, in that order."""
        names, symbols = (tuple(of[i] for i in columns) for of in (self.names, self.symbols))
        return GeneVocabulary(names, symbols, self.species)

    def to_text(self) -> str:
        """Text of ``genes.txt``: a header, then canonical name and symbol of one gene a line."""
        lines = [f"# evercell genes\tversion {FORMAT_VERSION}\t{self.species}"]
        lines += [f"{name}\t{symbol}" for name, symbol in zip(self.names, self.symbols, strict=True)]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_text(cls, text: str) -> GeneVocabulary:
        """Read the text of `to_text`."""
        header, *lines = text.split("\n")
        found = re.fullmatch(r"# evercell genes\tversion (\d+)\t(human|mouse)", header)
        if not found or lines[-1:] != [""]:
            raise GenesError(f"`genes.txt` is damaged: its first line is `{header[:60]}`, {len(lines):,} lines follow",
                             hint="take the model directory from its source again")  # fmt: skip
        if int(found[1]) > FORMAT_VERSION:
            raise GenesError(f"`genes.txt` has format version {found[1]}; this evercell reads up to {FORMAT_VERSION}",
                             hint="update evercell")  # fmt: skip
        rows = [line.split("\t") for line in lines[:-1]]
        if bad := next((n for n, row in enumerate(rows, start=2) if len(row) != 2), None):
            raise GenesError(f"`genes.txt` is damaged: line {bad} does not hold a name and a symbol")
        return cls(tuple(r[0] for r in rows), tuple(r[1] for r in rows), "mouse" if found[2] == "mouse" else "human")

    def digest(self) -> str:
        """SHA-256 of `to_text`, hexadecimal."""
        return hashlib.sha256(self.to_text().encode()).hexdigest()


def _in_species(genes: CanonicalGenes, species: Species, vocabulary: GeneVocabulary | None) -> list[str]:
    """Names brought to a species; a gene keeps its own name where the other species (or the vocabulary) has none."""
    names: list[str] = genes.names.tolist()
    if genes.species == species:
        return names
    table = orthologue_table(species)
    if vocabulary is None:
        return [table.get(name, name) for name in names]
    return [target if (target := table.get(name)) in vocabulary else name for name in names]  # type: ignore[misc]


@dataclass(frozen=True)
class Coverage:
    """How the genes of a query cover the genes of a model; ``n_matched`` counts model genes that the query measured."""

    n_query: int
    n_model: int
    n_matched: int
    share_of_model: float
    share_of_query: float
    species: str
    vocabulary_species: str
    through_orthologues: bool
    column: str
    summed: int
    unmatched: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and ``adata.uns``."""
        return asdict(self) | {"unmatched": list(self.unmatched)}

    def sentence(self) -> str:
        """One sentence for a person."""
        where = "the index" if self.column == "index" else f"column `{self.column}`"
        text = f"{self.n_matched:,} of the model's {self.n_model:,} genes ({self.share_of_model:.0%}) were measured"
        text += f" ({self.n_query:,} {self.species} genes, names from {where}"
        if self.through_orthologues:
            text += f", matched to {self.vocabulary_species} genes through one-to-one orthologues"
        if self.summed:
            text += f"; counts of {self.summed:,} genes added to another row of the same gene"
        return text + ")."


@dataclass(frozen=True)
class Alignment:
    """Where each gene of a query goes in a model.

    Attributes
    ----------
    columns
        Model code of each query gene or -1, int32, shape (G_query,).
    measured
        Whether the query measured each model gene, bool, shape (G_model,).
    coverage
        The numbers, to report.
    """

    columns: np.ndarray
    measured: np.ndarray
    coverage: Coverage

    def apply(self, counts: csr_matrix | np.ndarray) -> csr_matrix:
        """Bring counts (B, G_query) into the model's gene order.

        Genes of the query that are one gene of the model are summed.

        Returns
        -------
        scipy.sparse.csr_matrix
            Shape (B, G_model), float32, indices sorted and unique.
        """
        from scipy.sparse import csr_matrix

        query = csr_matrix(counts)
        if query.shape[1] != len(self.columns):
            raise GenesError(f"the counts have {query.shape[1]:,} genes; {len(self.columns):,} were aligned")
        return brought_over(query.astype(np.float32, copy=False), self.columns, len(self.measured))


def brought_over(counts: csr_matrix, columns: np.ndarray, n_genes: int) -> csr_matrix:
    """Counts (B, G_own) with gene j in column ``columns[j]`` of `n_genes`; -1 leaves it out. Indices are sorted."""
    from scipy.sparse import csr_matrix

    new = columns[counts.indices]
    kept = new >= 0
    before = np.concatenate([[0], np.cumsum(kept)])  # kept entries before each entry: the new row pointers
    found = csr_matrix((counts.data[kept], new[kept], before[counts.indptr]), shape=(counts.shape[0], n_genes))
    found.sum_duplicates()
    return found


def align(
    genes: Genes,
    vocabulary: GeneVocabulary,
    *,
    species: str = "auto",
    column: str | None = None,
    min_coverage: float = 0.05,
    min_genes: int = 50,
    name: str = "the data",
) -> Alignment:
    """Match the genes of a query to the genes of a model.

    Parameters
    ----------
    genes
        Gene names or gene table of the query (``adata.var``), G_query rows.
    vocabulary
        Genes of the model. A query of the other species is matched through one-to-one orthologues.
    species, column
        See `canonical_genes`.
    min_coverage
        Least share of the smaller of both gene sets that has to match.
    min_genes
        Least number of genes that has to match; at most half of the model's genes are asked for.
    name
        File name, for messages.

    Raises
    ------
    GenesError
        If too few genes match; the message says why, as far as it can be found.
    """
    found = canonical_genes(genes, species=species, column=column)
    names = _in_species(found, vocabulary.species, vocabulary)
    codes = vocabulary._codes
    columns = np.fromiter((codes.get(n, -1) for n in names), dtype=np.int32, count=len(names))
    measured = np.zeros(len(vocabulary), dtype=bool)
    measured[columns[columns >= 0]] = True
    matched, rows = int(measured.sum()), int((columns >= 0).sum())
    labels = name_columns(genes, found.column)[found.column]
    coverage = Coverage(
        n_query=len(names),
        n_model=len(vocabulary),
        n_matched=matched,
        share_of_model=matched / max(len(vocabulary), 1),
        share_of_query=rows / max(len(names), 1),
        species=found.species,
        vocabulary_species=vocabulary.species,
        through_orthologues=found.species != vocabulary.species,
        column=found.column,
        summed=rows - matched,
        unmatched=tuple(labels[row] for row in np.flatnonzero(columns < 0)[:5]),
    )
    smaller = max(min(len(names), len(vocabulary)), 1)
    if matched < max(1, min(min_genes, len(vocabulary) // 2)) or matched / smaller < min_coverage:
        cause, hint = _cause(genes, vocabulary, found, labels, matched)
        theirs = ", ".join(f"`{label}`" for label in labels[:2]) or "none"
        ours = f"`{vocabulary.names[0]}` ({vocabulary.symbols[0]})" if len(vocabulary) else "none"
        raise GenesError(
            f"`{name}` shares {matched:,} of the model's {len(vocabulary):,} genes: its {len(names):,} genes are named "
            f"like {theirs}, the model's like {ours}; {cause}",
            hint=hint,
        )
    return Alignment(columns, measured, coverage)


def _cause(
    genes: Genes, vocabulary: GeneVocabulary, found: CanonicalGenes, labels: Sequence[str], matched: int
) -> tuple[str, str]:
    """Why genes do not match, found by trying, and the argument that mends it."""

    def n_matched(which: str, column: str | None) -> int:
        other = canonical_genes(genes, species=which, column=column)
        return len(set(_in_species(other, vocabulary.species, vocabulary)) & vocabulary._codes.keys())

    enough = max(2 * matched, min(50, len(vocabulary) // 2), 1)
    species = "mouse" if found.species == "human" else "human"
    if n_matched(species, found.column) >= enough:
        return f"they are {species} genes, read as {found.species}", f"pass --species {species}"
    columns = ["index", *genes.columns] if isinstance(genes, pd.DataFrame) else []
    for other in (c for c in columns if c != found.column):
        if n_matched("auto", other) >= enough:
            where = "the index" if other == "index" else f"column `{other}`"
            return f"names that match are in {where}, not in `{found.column}`", f"pass --gene-column {other}"
    sample = labels[:1000]
    if sample and np.mean([bool(_BARCODE.match(label)) for label in sample]) > 0.5:
        return (
            "they look like cell barcodes: cells and genes are swapped",
            "transpose the matrix (`adata.T`) and save it",
        )
    if sample and np.mean([bool(_NUMBER.match(label)) for label in sample]) > 0.5:
        return "they are numbers, not names", "pass --gene-column with the column that holds symbols or Ensembl ids"
    if found.recognised < 0.2:
        return (
            f"{found.recognised:.0%} of them are {found.species} Ensembl ids or symbols that are known",
            "pass --gene-column with the column that holds symbols or Ensembl ids, and --species human or mouse",
        )
    return (
        f"they are {found.species} genes, but few of them are genes of this model",
        "use a model that covers these genes, or a file with all measured genes",
    )
