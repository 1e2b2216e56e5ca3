"""The Cell Ontology (CL), offline: a label's term, a term's ancestors, the nearest common parent of several types.

The table is packaged (`data/cell_ontology.tsv.gz`, CC BY 4.0, written by `runs/make_cell_ontology.py`) and read
at first use.
"""

from __future__ import annotations

import gzip
import importlib.resources
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from .errors import LabelsError

__all__ = ["Term", "ancestors", "common_parent", "find", "is_a", "normalised", "term"]


@dataclass(frozen=True, slots=True)
class Term:
    """One cell type of the Cell Ontology.

    Attributes
    ----------
    id
        For example `CL:0000236`.
    label
        For example `B cell`.
    synonyms
        Other names in the ontology.
    parents
        Ids of the direct parents (is_a).
    """

    id: str
    label: str
    synonyms: tuple[str, ...]
    parents: tuple[str, ...]


# Names of the field that the ontology does not hold, or holds under another type. A key is written as `normalised`
# gives it. None keeps a name without a term: single-cell studies mean something else by it than the ontology's synonym.
_FIELD_NAMES: dict[str, str | None] = {
    "cell": None,
    # lymphoid
    "nk": "CL:0000623",
    "nkt": "CL:0000814",
    "natural killer t": "CL:0000814",
    "cd4 t": "CL:0000624",
    "cd4 positive t": "CL:0000624",
    "t cd4": "CL:0000624",
    "t cd4 positive": "CL:0000624",
    "t helper": "CL:0000912",
    "cd8 t": "CL:0000625",
    "cd8 positive t": "CL:0000625",
    "t cd8": "CL:0000625",
    "t cd8 positive": "CL:0000625",
    "cytotoxic t": "CL:0000910",
    "treg": "CL:0000815",
    "t reg": "CL:0000815",
    "t regulatory": "CL:0000815",
    "gdt": "CL:0000798",
    "gd t": "CL:0000798",
    "gamma delta t": "CL:0000798",
    "mait": "CL:0000940",
    "ilc": "CL:0001065",
    "plasmablast": "CL:0000980",
    "naive b": "CL:0000788",
    "memory b": "CL:0000787",
    "b memory": "CL:0000787",
    "b naive": "CL:0000788",
    "cd4 naive": "CL:0000895",
    "cd4 tcm": "CL:0000904",
    "cd4 tem": "CL:0000905",
    "cd8 naive": "CL:0000900",
    "cd8 tcm": "CL:0000907",
    "cd8 tem": "CL:0000913",
    "t cycling": "CL:4033069",
    "double negative t": None,
    # myeloid and blood
    "mono": "CL:0000576",
    "cd14 mono": "CL:0001054",
    "cd14 monocyte": "CL:0001054",
    "cd14 positive mono": "CL:0001054",
    "cd16 mono": "CL:0002396",
    "cd16 positive mono": "CL:0002396",
    "cd16 monocyte": "CL:0002396",
    "cd16 positive monocyte": "CL:0002396",
    "fcgr3a mono": "CL:0002396",
    "fcgr3a positive mono": "CL:0002396",
    "fcgr3a monocyte": "CL:0002396",
    "fcgr3a positive monocyte": "CL:0002396",
    "nonclassical monocyte": "CL:0000875",
    "mac": "CL:0000235",
    "macro": "CL:0000235",
    "interstitial macrophage": "CL:4033043",
    "myeloid cycling": "CL:4033081",
    "dc": "CL:0000451",
    "dendritic": "CL:0000451",
    "cdc": "CL:0000990",
    "classical dendritic": "CL:0000990",
    "cdc1": "CL:0002394",
    "conventional dendritic type 1": "CL:0002394",
    "cdc2": "CL:0002399",
    "conventional dendritic type 2": "CL:0002399",
    "pdc": "CL:0000784",
    "cd8 positive dendritic": "CL:0001000",
    "migratory dendritic cell (ccr7)": "CL:4047054",
    "dc1": None,
    "dc2": None,
    "type 1 dc": None,
    "type 2 dc": None,
    "erythroid": "CL:0000764",
    "eryth": "CL:0000764",
    "rbc": "CL:0000232",
    "red blood": "CL:0000232",
    "hsc": None,  # hematopoietic stem cell or hepatic stellate cell
    "hspc": "CL:0008001",
    "hematopoietic stem and progenitor": "CL:0008001",
    "mep": "CL:0000050",
    "megakaryocyte erythroid progenitor": "CL:0000050",
    "gmp": "CL:0000557",
    "cmp": "CL:0000049",
    "clp": "CL:0000051",
    # stroma, vessels, muscle
    "fibro": "CL:0000057",
    "endo": "CL:0000115",
    "endothelial": "CL:0000115",
    "lymphatic endothelial": "CL:0002138",
    "lec": "CL:0002138",
    "venous endothelial": "CL:0002543",
    "arterial endothelial": "CL:1000413",
    "general capillary endothelial": "CL:4028002",
    "ec general capillary": "CL:4028002",
    "aerocyte capillary endothelial": "CL:4028003",
    "ec aerocyte capillary": "CL:4028003",
    "aerocyte": "CL:4028003",
    "pericyte (pdgfrb)": "CL:0000669",
    "adventitial fibroblast (mfap5 pdgfra)": "CL:4052030",
    "alveolar fibroblast (wnt2 pdgfra)": "CL:4028004",
    "smc": "CL:0000192",
    "vsmc": "CL:0000359",
    "cardiomyocyte": "CL:0000746",
    "airway smooth muscle": "CL:0019019",
    "msc": None,  # mesenchymal stem, or stromal, cell
    # lung
    "at1": "CL:0002062",
    "type 1 pneumocyte": "CL:0002062",
    "alveolar type 1": "CL:0002062",
    "at 1": "CL:0002062",
    "at2": "CL:0002063",
    "at 2": "CL:0002063",
    "type 2 pneumocyte": "CL:0002063",
    "alveolar type 2": "CL:0002063",
    "proliferating at2": "CL:4033080",
    # other epithelia
    "multiciliated": "CL:0005012",
    "ductal": "CL:0000068",
    "duct": "CL:0000068",
    "squamous epithelium": "CL:0000076",
    "luminal progenitor": "CL:4033057",
    "mature luminal": "CL:4033058",
    # islets of Langerhans
    "alpha": "CL:0000171",
    "beta": "CL:0000169",
    "delta": "CL:0000173",
    "gamma": "CL:0002275",
    "pp": "CL:0002275",
    "epsilon": "CL:0005019",
    # brain and eye
    "opc": "CL:0002453",
    "oligo": "CL:0000128",
    "astro": "CL:0000127",
    "glia": "CL:0000125",
    "microglia": "CL:0000129",
    "excitatory neuron": "CL:0000679",
    "inhibitory neuron": "CL:0000617",
    "muller glia": "CL:0000636",
    "rod": "CL:0000604",
    "cone": "CL:0000573",
    "bipolar": "CL:0000748",
    "horizontal": "CL:0000745",
    "amacrine": "CL:0000561",
}

_GREEK = str.maketrans({"α": " alpha ", "β": " beta ", "γ": " gamma ", "δ": " delta ", "ε": " epsilon "})
_POSITIVE = re.compile(r"(?<=\w)\+")
_NEGATIVE = re.compile(r"\b(cd\d+[a-z]?)-(?=\s|$|cd\d)")
_GAP = re.compile(r"[^a-z0-9()/:+]+")
_ROMAN = re.compile(r"\btype (iii|ii|i)\b")
_AS_NUMBER = {"i": "1", "ii": "2", "iii": "3"}
_ACRONYM = re.compile(r"(?=(?:.*[A-Z]){2})[A-Za-z0-9-]{2,5}$")
_ONE_NAME = re.compile(r"CL[:_]\d{7}$")


def _singular(word: str) -> str:
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def normalised(label: str) -> str:
    """Label without what carries no meaning: case, plural, punctuation, a closing "cell" or "cells".

    `"B-Cells"` and `"b_cell"` give `"b"`, `"CD4+ T cells"` gives `"cd4 positive t"`, `"Type II pneumocytes"` gives
    `"type 2 pneumocyte"`. Brackets, slashes and colons stay, because they set types apart (`"monocyte/macrophage"`).
    """
    text = label.lower()
    if not text.isascii():
        text = text.translate(_GREEK)
    if "-" in text:
        text = _NEGATIVE.sub(r"\1 negative ", text)
    if "+" in text:
        text = _POSITIVE.sub(" positive ", text)
    words = [_singular(word) for word in _GAP.sub(" ", text).split()]
    while len(words) > 1 and words[-1] == "cell":
        words.pop()
    text = " ".join(words)
    return _ROMAN.sub(lambda match: "type " + _AS_NUMBER[match[1]], text) if "type i" in text else text


@lru_cache(maxsize=1)
def _terms() -> dict[str, Term]:
    packed = importlib.resources.files("evercell").joinpath("data", "cell_ontology.tsv.gz").read_bytes()
    terms = {}
    for line in gzip.decompress(packed).decode().splitlines():
        if line.startswith("CL:"):
            cl, label, synonyms, parents = line.split("\t")
            terms[cl] = Term(
                cl, label, tuple(synonyms.split("|")) if synonyms else (), tuple(parents.split("|")) if parents else ()
            )
    return terms


@lru_cache(maxsize=1)
def _index() -> dict[str, str | None]:
    """Normalised name -> id; None where types share it. Labels go before synonyms."""
    of_label: defaultdict[str, set[str]] = defaultdict(set)
    of_synonym: defaultdict[str, set[str]] = defaultdict(set)
    for entry in _terms().values():
        of_label[normalised(entry.label)].add(entry.id)
        for synonym in entry.synonyms:
            # a bare acronym (ARC, IPC, DC2) is seldom what a study means by it; the usual ones are field names above
            if not _ACRONYM.match(synonym):
                of_synonym[normalised(synonym)].add(entry.id)
    index: dict[str, str | None] = {}
    for names in (of_synonym, of_label):
        index |= {name: next(iter(ids)) if len(ids) == 1 else None for name, ids in names.items()}
    # a letter alone ("K cell", "D cell") names other cells in every tissue, but for B and T
    return {name: id for name, id in index.items() if len(name) > 1 or name in "bt"}


@lru_cache(maxsize=1)
def _by_exact_label() -> dict[str, str]:
    return {entry.label: entry.id for entry in _terms().values()}


def term(id: str) -> Term:
    """Term of a Cell Ontology id.

    Parameters
    ----------
    id
        Such as `CL:0000236`; `CL_0000236` is read too.

    Raises
    ------
    LabelsError
        The id is not a current term of the packaged ontology.
    """
    entry = _terms().get(id.replace("_", ":"))
    if entry is None:
        raise LabelsError(
            f"`{id}` is not a term of the packaged Cell Ontology",
            hint="an id reads like CL:0000236; withdrawn ids are not held",
        )
    return entry


@lru_cache(maxsize=4096)
def find(label: str) -> Term | None:
    """Cell Ontology term that a label means, or None.

    An id is taken first, then a usual name of the field, an exact label, and at last a label or synonym; names are
    compared without regard to case, plural, punctuation and a closing "cell". A name that several types share gives
    None: a missing term does no harm, a wrong one does.

    Examples
    --------
    >>> find("CD8+ T cells").label
    'CD8-positive, alpha-beta T cell'
    >>> find("type_ii_pneumocyte").id
    'CL:0002063'
    >>> find("cluster 7") is None
    True
    """
    label = label.strip()
    if _ONE_NAME.match(label):
        return _terms().get(label.replace("_", ":"))
    name = normalised(label)
    found = _FIELD_NAMES[name] if name in _FIELD_NAMES else _by_exact_label().get(label) or _index().get(name)
    return None if found is None else _terms()[found]


@lru_cache(maxsize=4096)
def ancestors(id: str) -> frozenset[str]:
    """Ids of all types that the type is a kind of, itself left out."""
    above: set[str] = set()
    waiting = list(term(id).parents)
    while waiting:
        parent = waiting.pop()
        if parent not in above:
            above.add(parent)
            waiting.extend(_terms()[parent].parents)
    return frozenset(above)


def is_a(a: str, b: str) -> bool:
    """Whether type `a` is type `b` or a kind of it."""
    return term(a).id == term(b).id or term(b).id in ancestors(a)


@lru_cache(maxsize=1)
def _kinds() -> dict[str, int]:
    """Number of types below each type."""
    below: defaultdict[str, int] = defaultdict(int)
    for id in _terms():
        for above in ancestors(id):
            below[above] += 1
    return below


def common_parent(ids: Iterable[str]) -> Term:
    """Lowest common ancestor: of the types that all given types are, or are kinds of, the one with fewest kinds.

    A type's own kinds are always fewer than its parent's, so the answer has no other common ancestor below it; among
    several such answers the narrowest is taken, ties going to the smaller id.

    Raises
    ------
    LabelsError
        No id was given, or an id is not in the ontology.
    """
    given = [term(id).id for id in ids]
    if not given:
        raise LabelsError("a common parent needs at least one Cell Ontology id; none was given")
    shared = frozenset.intersection(*(ancestors(id) | {id} for id in given))
    if not shared:
        raise LabelsError(f"`{given[0]}` and the other {len(given) - 1} ids share no ancestor in the Cell Ontology")
    kinds = _kinds()
    return term(min(shared, key=lambda id: (kinds.get(id, 0), id)))
