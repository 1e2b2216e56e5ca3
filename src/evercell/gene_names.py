"""Canonical names of human and mouse genes.

Every gene has one canonical name: its Ensembl id (no version) where that is known, else its symbol (human: upper case).
Ids, symbols, older symbols and orthologues come from the tables in ``data/genes`` (sources in their README).
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from evercell.errors import GenesError

Species = Literal["human", "mouse"]
Genes = pd.DataFrame | Sequence[str]

GENE_COLUMNS = (
    "gene_ids", "gene_id", "ensembl_id", "ensembl_ids", "ensembl", "ensemblid", "ensembl_gene_id", "feature_id",
    "gene_symbols", "gene_symbol", "symbol", "symbols", "gene_name", "gene_names", "gene_short_name", "gene", "genes",
    "feature_name", "features", "accession",
)  # fmt: skip

_ENSEMBL = re.compile(r"ENS(?:MUS)?G\d{11}")
_ASSEMBLY = re.compile(
    r"^(?:(GRCH3[78]|HG19|HG38)|(?:GRCM3[89]|MM9|MM10|MM39))(?:-20\d\d-[A-Z])?_+(?=.)", re.IGNORECASE
)
_SUFFIX = re.compile(r"^(.+)[-.]\d{1,2}$")
_DOTS = str.maketrans(dict.fromkeys("-/@()+: '", "."))


class _Tables(NamedTuple):
    """The names of one species; all keys are upper case."""

    symbols: dict[str, str]  # id -> current symbol
    meaning: dict[str, str]  # id, symbol, older symbol or alias -> canonical name
    aliases: frozenset[str]  # the keys that are loose aliases: used by papers, never official
    current: frozenset[str]  # the keys that are ids or current symbols
    exact: frozenset[str]  # current symbols as they are written


def _columns(name: str, width: int) -> list[list[str]]:
    """Columns of a table; every command that reads cells waits for these, so no list is made for each row."""
    text = gzip.decompress((files("evercell") / "data" / "genes" / name).read_bytes()).decode()
    values = text.removesuffix("\n").replace("\n", "\t").split("\t")
    return [values[at::width] for at in range(width)]


@cache
def _tables(species: Species) -> _Tables:
    symbols = dict(zip(*_columns(f"{species}_genes.tsv.gz", 2), strict=True))
    of_symbols = dict(zip(map(str.upper, symbols.values()), symbols, strict=True))
    meaning = dict(zip(symbols, symbols, strict=True)) | of_symbols
    names, identifiers, kinds = _columns(f"{species}_names.tsv.gz", 3)
    meaning.update((name, identifier or name) for name, identifier in zip(names, identifiers, strict=True))
    of_kind = {kind: [n for n, k in zip(names, kinds, strict=True) if k == kind] for kind in ("alias", "symbol")}
    current = frozenset({*symbols, *of_symbols, *of_kind["symbol"]})
    return _Tables(symbols, meaning, frozenset(of_kind["alias"]), current, frozenset(symbols.values()))


@cache
def _dotted(species: Species) -> dict[str, str]:
    """Names as R's make.names writes them; a form that two genes share means neither."""
    meaning = _tables(species).meaning
    forms: dict[str, str] = {}
    for name, canonical in meaning.items():
        form = name.translate(_DOTS)
        if form != name:
            forms[form] = "" if forms.get(form, canonical) != canonical else canonical
    return {form: canonical for form, canonical in forms.items() if canonical and form not in meaning}


@cache
def orthologue_table(to: Species) -> dict[str, str]:
    """One-to-one orthologues: canonical name in the other species -> canonical name in `to`."""
    human, mouse = _columns("orthologues.tsv.gz", 2)
    return dict(zip(mouse, human, strict=True) if to == "human" else zip(human, mouse, strict=True))


@dataclass(frozen=True)
class CanonicalGenes:
    """Genes of a file under their canonical names.

    Attributes
    ----------
    names
        Canonical name of each gene, shape (G,).
    symbols
        Current symbol of each gene, shape (G,); what the file says where the gene is not known.
    species
        ``"human"`` or ``"mouse"``.
    column
        Column the names were read from, or ``"index"``.
    recognised
        Share of the genes found in the tables.
    """

    names: np.ndarray
    symbols: np.ndarray
    species: Species
    column: str
    recognised: float

    def __len__(self) -> int:
        return len(self.names)


class _Key(NamedTuple):
    """A name as it is looked up."""

    key: str  # upper case, without assembly prefix; of ids the id alone
    prefix: str  # species of the assembly prefix, "" where there is none
    bare: str  # the name as written, without assembly prefix


def _key(name: str) -> _Key:
    bare, prefix = name.strip(), ""
    if "_" in bare and (found := _ASSEMBLY.match(bare)):
        prefix, bare = "human" if found[1] else "mouse", bare[found.end() :]
    key = bare.upper()
    if "ENS" in key and (found := _ENSEMBL.search(key)):
        return _Key(found[0], prefix, found[0])
    return _Key(key, prefix, bare)


def _species_of(names: Sequence[str]) -> Species:
    """Species by ids, assembly prefixes and current symbols, then by the case of the symbols."""
    keys = [_key(name) for name in names]
    stated = Counter(
        k.prefix or ("mouse" if k.key[3] == "M" else "human") for k in keys if k.prefix or _ENSEMBL.match(k.key)
    )
    votes = stated
    if 2 * stated.total() < len(names):
        human, mouse = _tables("human"), _tables("mouse")
        plain = [k for k in keys if not k.prefix and not _ENSEMBL.match(k.key)]
        votes = stated + Counter(
            human=sum(k.key in human.current for k in plain), mouse=sum(k.key in mouse.current for k in plain)
        )
        # few genes, most with an orthologue of the same letters: ACTB and Actb differ in case only
        if abs(votes["human"] - votes["mouse"]) < 0.05 * len(names):
            votes = stated + Counter(
                human=sum(k.bare in human.exact for k in plain), mouse=sum(k.bare in mouse.exact for k in plain)
            )
    return "mouse" if votes["mouse"] > votes["human"] else "human"


def _without_suffix(key: str, tables: _Tables) -> str | None:
    """The gene that a make-unique suffix (``TBCE-1``, ``TBCE.1``) was added to."""
    found = _SUFFIX.match(key)
    return tables.meaning[found[1]] if found and found[1] in tables.current else None


def _variant(key: str, species: Species) -> str | None:
    """The gene whose name R's make.names (``HLA.DRA``, ``X7SK``) or a make-unique suffix has changed."""
    tables = _tables(species)
    forms = _dotted(species) if "." in key else {}
    short = key[1:] if key[:1] == "X" else ""  # make.names writes X before a digit
    return (
        forms.get(key)
        or forms.get(short)
        or (short[:1].isdigit() and tables.meaning.get(short))
        or _without_suffix(key, tables)
    )


def _canonical(raw: Sequence[str], species: Species, column: str) -> CanonicalGenes:
    tables = _tables(species)
    names: list[str] = []
    known: list[bool] = []
    loose: dict[int, str] = {}  # rows known by an alias only, and their own names
    for row, name in enumerate(raw):
        key, prefix, bare = _key(name)
        if prefix and prefix != species:  # never under the key of a gene of the other species: mm10___Actb is not ACTB
            own, gene = name, None
        else:
            own = " ".join((key if species == "human" else bare).split())
            gene = tables.meaning.get(key) or _variant(key, species)
            if gene and key in tables.aliases:
                loose[row] = own
        names.append(gene or " ".join(own.split()))
        known.append(gene is not None)
    # An alias that lands on a gene which the file also holds under another name is some other gene.
    held = Counter(names)
    for row, own in loose.items():
        if held[names[row]] > 1:
            names[row], known[row] = own, False
    symbols = [tables.symbols.get(name) or " ".join(raw[row].split()) for row, name in enumerate(names)]
    share = float(np.mean(known)) if known else 0.0
    of_genes = np.array(names, dtype=str), np.array(symbols, dtype=str)
    for array in of_genes:
        array.flags.writeable = False  # many share it
    return CanonicalGenes(*of_genes, species, column, share)


def name_columns(genes: Genes, column: str | None) -> dict[str, list[str]]:
    """The name columns of a gene table, the index first."""
    if not isinstance(genes, pd.DataFrame):
        return {"index": [str(gene) for gene in genes]}
    if column == "index":
        return {"index": genes.index.astype(str).tolist()}
    if column is not None:
        if column not in genes.columns:
            listed = ", ".join(f"`{c}`" for c in genes.columns) or "none"
            raise GenesError(
                f"the gene table has no column `{column}`; its columns are: {listed}",
                hint="pass --gene-column with one of these, or `index`",
            )
        return {column: genes[column].astype(str).tolist()}
    found = {str(c): genes[c].astype(str).tolist() for c in genes.columns if str(c).lower() in GENE_COLUMNS}
    return {"index": genes.index.astype(str).tolist()} | found


def canonical_genes(genes: Genes, *, species: str = "auto", column: str | None = None) -> CanonicalGenes:
    """Give every gene of a file its canonical name.

    Parameters
    ----------
    genes
        Gene names, or the gene table of an AnnData (``adata.var``).
    species
        ``"human"``, ``"mouse"`` or ``"auto"``: found from ids, assembly prefixes and symbols.
    column
        Column that holds the names, or ``"index"``. By default whichever of the index and the usual columns
        (``gene_ids``, ``feature_name``, ...) holds the most recognised names; the index wins ties.

    Raises
    ------
    GenesError
        If there is no such column or species.

    Examples
    --------
    >>> canonical_genes(["TP53", "ENSG00000141510.17", "hg19_TP53"]).names.tolist()
    ['ENSG00000141510', 'ENSG00000141510', 'ENSG00000141510']
    """
    if species not in ("auto", "human", "mouse"):
        raise GenesError(f"`{species}` is no species of evercell; it was trained on human and mouse",
                         hint="pass --species human, mouse or auto")  # fmt: skip
    candidates = name_columns(genes, column)
    return _most_recognised(tuple((name, tuple(raw)) for name, raw in candidates.items()), species)


@lru_cache(maxsize=4)
def _most_recognised(candidates: tuple[tuple[str, tuple[str, ...]], ...], species: str) -> CanonicalGenes:
    """The column that holds the most recognised names. Kept, for each model and each block asks for the same genes."""
    which: Species = (
        _species_of([n for _, raw in candidates for n in raw])
        if species == "auto"
        else "mouse"
        if species == "mouse"
        else "human"
    )
    return max((_canonical(raw, which, c) for c, raw in candidates), key=lambda found: found.recognised)


def orthologues(names: Iterable[str], *, to: str) -> dict[str, str]:
    """One-to-one orthologues of genes.

    Parameters
    ----------
    names
        Genes of the other species, canonical names or symbols.
    to
        Species to go to: ``"human"`` or ``"mouse"``.

    Returns
    -------
    dict
        Name as given -> canonical name in `to`; genes without a one-to-one orthologue are left out.
    """
    if to not in ("human", "mouse"):
        raise GenesError(f"`{to}` is no species of evercell", hint="pass to='human' or to='mouse'")
    table, given = orthologue_table("mouse" if to == "mouse" else "human"), list(names)
    found = _canonical(given, "human" if to == "mouse" else "mouse", "index")
    return {g: table[n] for g, n in zip(given, found.names.tolist(), strict=True) if n in table}


def known_genes(species: Species) -> tuple[str, ...]:
    """Canonical names of all genes of a species that the tables hold, in their order."""
    return tuple(_tables(species).symbols)


def current_symbol(name: str) -> str:
    """Current symbol of a canonical name, or the name itself."""
    if not name.startswith("ENS"):
        return name
    return _tables("mouse" if name.startswith("ENSMUSG") else "human").symbols.get(name, name)
