from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from anndata.io import read_elem

from evercell import ontology
from evercell.errors import LabelsError

LABELLED = Path(__file__).resolve().parents[2] / "shared" / "data" / "labelled"

B, T, CD4, CD8, NK = "CL:0000236", "CL:0000084", "CL:0000624", "CL:0000625", "CL:0000623"
ALPHA, BETA = "CL:0000171", "CL:0000169"


def test_term_holds_label_synonyms_and_parents() -> None:
    term = ontology.term(B)
    assert term.label == "B cell"
    assert "B lymphocyte" in term.synonyms
    assert term.parents == ("CL:0000945",)
    assert ontology.term("CL_0000236") == term


def test_term_refuses_an_id_that_is_not_there() -> None:
    with pytest.raises(LabelsError, match="CL:9999999"):
        ontology.term("CL:9999999")


@pytest.mark.parametrize(
    ("label", "id"),
    [
        ("B cell", B), ("b", B), ("B-Cells", B), ("B lymphocytes", B), ("b_cell", B), ("CL:0000236", B),
        ("CL_0000236", B),
        ("nk", NK), ("NK cells", NK), ("Natural killer cells", NK),
        ("cd4_t", CD4), ("CD4+ T cells", CD4), ("CD4 T", CD4), ("T cell, CD4", None), ("cd8_t", CD8), ("CD8+ T", CD8),
        ("Treg", "CL:0000815"), ("regulatory T cells", "CL:0000815"), ("γδ T cell", "CL:0000798"),
        ("gdT", "CL:0000798"),
        ("pDC", "CL:0000784"), ("cDC", "CL:0000990"), ("Mono", "CL:0000576"), ("CD14+ Monocytes", "CL:0001054"),
        ("FCGR3A+ Monocytes", "CL:0002396"), ("Fibro", "CL:0000057"), ("AT1", "CL:0002062"),
        ("AT2 cells", "CL:0002063"),
        ("Type II pneumocytes", "CL:0002063"), ("alpha", ALPHA), ("Beta cells", BETA), ("PP cell", "CL:0002275"),
        ("microglia", "CL:0000129"), ("OPCs", "CL:0002453"), ("endothelial", "CL:0000115"), ("Platelets", "CL:0000233"),
    ],
)  # fmt: skip
def test_find_reads_the_names_of_the_field(label: str, id: str | None) -> None:
    found = ontology.find(label)
    assert (found and found.id) == id


@pytest.mark.parametrize(
    "label",
    ["unknown", "", "7", "cluster 3", "cell", "DC2", "HSC", "stellate", "monocyte/macrophage", "monocyte or neutrophil",
     "endothelial/fibroblast", "transitional at1-at2", "injured at2: other", "K cell", "pit cell",
     "doublet", "CL:9999999"],
)  # fmt: skip
def test_find_leaves_what_is_mixed_or_means_several_things(label: str) -> None:
    assert ontology.find(label) is None


def test_field_names_are_written_as_normalised_and_point_at_terms() -> None:
    for name, id in ontology._FIELD_NAMES.items():
        assert ontology.normalised(name) == name
        assert id is None or ontology.term(id).id == id


def test_every_label_of_the_ontology_finds_itself() -> None:
    lost = {term.label for id, term in ontology._terms().items() if ontology.find(term.label) != term}
    # "cell" is no type, and single-cell studies say "PP cell" of the islets only
    assert lost == {"cell", "PP cell"}


def test_parents_are_terms_and_no_type_is_its_own_ancestor() -> None:
    for id, term in ontology._terms().items():
        assert all(parent in ontology._terms() for parent in term.parents)
        assert id not in ontology.ancestors(id)


def test_is_a_follows_parents_upwards_only() -> None:
    assert ontology.is_a(CD4, T)
    assert ontology.is_a(CD4, CD4)
    assert not ontology.is_a(T, CD4)
    assert not ontology.is_a(B, T)


@pytest.mark.parametrize(
    ("ids", "label"),
    [((ALPHA, BETA), "pancreatic endocrine cell"),
     ((B, T), "lymphocyte"), ((CD4, T), "T cell"), ((NK,), "natural killer cell"),
     (("CL:0002062", "CL:0002063"), "pulmonary alveolar epithelial cell")],
)  # fmt: skip
def test_common_parent(ids: tuple[str, ...], label: str) -> None:
    assert ontology.common_parent(ids).label == label
    assert ontology.common_parent(reversed(ids)).label == label


def test_common_parent_has_no_common_ancestor_below_it() -> None:
    parent = ontology.common_parent([CD4, CD8, NK])
    shared = frozenset.intersection(*(ontology.ancestors(id) for id in (CD4, CD8, NK)))
    assert not any(parent.id in ontology.ancestors(id) for id in shared)


def test_common_parent_needs_an_id() -> None:
    with pytest.raises(LabelsError, match="at least one"):
        ontology.common_parent([])


def test_import_reads_no_table() -> None:
    code = "from evercell import ontology as o; assert o._terms.cache_info().currsize == 0; o.find('b'); print('ok')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "ok\n"


# names of the real data sets that no single term holds
WITHOUT_TERM = {
    "activated stellate cell", "activated_stellate", "cd4+esam+ dendritic cell", "chief cell",
    "dendritic cell / interstitial macrophage", "diencephalon inhibitory neuron",
    "differentiated suprabasal keratinocyte i",
    "differentiated suprabasal keratinocyte ii", "ductal myofibroblast", "early mesenchymal cell",
    "elongating spermatid",
    "endocrine progenitor (ngn3 high)", "endocrine progenitor (ngn3 low)", "endothelial/fibroblast",
    "injured at2: cell cycle arrest", "injured at2: other", "injured at2: proliferating",
    "injured at2: transdifferentiating",
    "keratinized layer cell i", "keratinized layer cell ii", "lymphoid cell", "monocyte or neutrophil",
    "neutrophil-monocyte intermediate", "pachytene spermatocyte", "pit cell", "pre-endocrine cell",
    "proliferating capillary endothelial cell", "proliferating epithelial cell", "proliferating mesenchymal cell",
    "quiescent stellate cell", "quiescent_stellate", "stellate", "telencephalon inhibitory interneuron",
    "transitional at1-at2", "undifferentiated progenitor", "unknown",
}  # fmt: skip


@pytest.mark.shared
def test_names_of_the_real_data_sets_have_terms() -> None:
    names: set[str] = set()
    for file in LABELLED.rglob("*.h5ad"):
        with h5py.File(file) as stored:
            names |= set(read_elem(stored["obs"])["cell_type"].astype(str))
    assert {name for name in names if ontology.find(name) is None} == WITHOUT_TERM
    # the human and the mouse files write the same types differently
    for one, other in [
        ("nk", "nk cell"),
        ("at2", "type_ii_pneumocyte"),
        ("gamma", "pp cell"),
        ("schwann", "schwann cell"),
    ]:
        assert {one, other} <= names
        assert ontology.find(one) == ontology.find(other)
