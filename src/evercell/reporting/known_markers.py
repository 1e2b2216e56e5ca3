"""Genes that the literature knows a type by, for the types of the packaged models and others that are common."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from evercell import ontology
from evercell.errors import LabelsError


@cache
def _table() -> dict[str, dict[str, tuple[str, ...]]]:
    """Cell Ontology id -> species -> symbols, the best known first."""
    text = (files("evercell") / "data" / "known_markers.tsv").read_text(encoding="utf-8")
    _, *rows = (line.split("\t") for line in text.splitlines())
    return {term: {"human": tuple(human.split()), "mouse": tuple(mouse.split())} for term, _, human, mouse in rows}


def known_markers(term: str | None, *, species: str = "human") -> tuple[str, ...]:
    """Symbols of well-known markers of a type, the best known first.

    Parameters
    ----------
    term
        Cell Ontology id, for example ``CL:0000169``. A type that is not listed has the markers of the nearest type
        that it is a kind of.
    species
        ``human`` or ``mouse``.

    Returns
    -------
    tuple of str
        Empty for a type of which none is listed.

    Examples
    --------
    >>> known_markers("CL:0000169")[:2]
    ('INS', 'IAPP')
    >>> known_markers("CL:0000169", species="mouse")[:2]
    ('Ins1', 'Ins2')
    """
    listed = _table()
    if not term or term not in listed:
        term = _nearest(term)
    return listed[term].get(species, ()) if term else ()


@cache
def _nearest(term: str | None) -> str | None:
    """The listed type that a type is a kind of and that is itself a kind of most others."""
    try:
        above = [] if not term else sorted(set(_table()) & ontology.ancestors(term))
    except LabelsError:  # an id of another release of the ontology
        return None
    return max(above, key=lambda one: len(ontology.ancestors(one)), default=None)
