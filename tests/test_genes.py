"""Genes of any file meet the genes of a model, or the message says why they do not."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix, issparse

from evercell.errors import GenesError
from evercell.gene_names import _columns, _dotted, _tables
from evercell.genes import (
    Alignment,
    CanonicalGenes,
    Coverage,
    GeneVocabulary,
    align,
    canonical_genes,
    orthologues,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TP53, ACTB, HLA_DRA, MT_CO1 = "ENSG00000141510", "ENSG00000075624", "ENSG00000204287", "ENSG00000198804"
MOUSE_ACTB, MOUSE_TP53 = "ENSMUSG00000029580", "ENSMUSG00000059552"


def _rows(name: str, width: int) -> list[tuple[str, ...]]:
    return list(zip(*_columns(name, width), strict=True))


def names_of(*genes: str, species: str = "human") -> list[str]:
    return canonical_genes(list(genes), species=species).names.tolist()


def some_genes(species: str = "human", n: int = 400) -> dict[str, str]:
    """Id -> symbol of genes whose symbol is theirs alone and that have an orthologue."""
    tables = _tables("mouse" if species == "mouse" else "human")
    ids = _columns("orthologues.tsv.gz", 2)[species == "mouse"]
    found = {i: tables.symbols[i] for i in ids if i in tables.symbols}
    return dict([(i, s) for i, s in found.items() if tables.meaning[s.upper()] == i][:n])


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("TP53", TP53),
        ("tp53", TP53),
        (" TP53 ", TP53),
        ("ENSG00000141510", TP53),
        ("ensg00000141510", TP53),
        ("ENSG00000141510.17", TP53),
        ("ENSG00000141510_TP53", TP53),
        ("TP53|ENSG00000141510.17", TP53),
        ("GRCh38_TP53", TP53),
        ("GRCh38_____TP53", TP53),
        ("hg19_ENSG00000141510", TP53),
        ("GRCh38-2020-A_TP53", TP53),
        ("HLA.DRA", HLA_DRA),
        ("MT.CO1", MT_CO1),
        ("X7SK", names_of("7SK")[0]),
        ("P53", TP53),  # alias
        ("SEPT2", names_of("SEPTIN2")[0]),  # previous symbol
        ("FAM129A", names_of("NIBAN1")[0]),
        ("RP11-34P13.7", "ENSG00000238009"),  # symbol of older releases
        ("TBCE-1", names_of("TBCE")[0]),
        ("TP53.1", TP53),
        ("not a gene", "NOT A GENE"),
        ("Y_RNA", "Y_RNA"),  # a family: no one id
    ],
)
def test_a_human_name_has_one_canonical_form(written: str, meant: str) -> None:
    assert names_of(written) == [meant]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Actb", MOUSE_ACTB),
        ("ACTB", MOUSE_ACTB),
        ("mm10___Actb", MOUSE_ACTB),
        ("mm10_ENSMUSG00000029580.16", MOUSE_ACTB),
        ("H2.K1", names_of("H2-K1", species="mouse")[0]),
        ("Actb.1", MOUSE_ACTB),
        ("Aldoa", "ENSMUSG00000030695"),  # two ids have the symbol
        ("myTransgene", "myTransgene"),
        ("mm10_myTransgene", "myTransgene"),
    ],
)
def test_a_mouse_name_has_one_canonical_form(written: str, meant: str) -> None:
    assert names_of(written, species="mouse") == [meant]


def test_a_gene_of_the_other_species_keeps_its_own_name() -> None:
    assert names_of("mm10___Actb") == ["mm10___Actb"]
    assert names_of("hg19_ACTB", species="mouse") == ["hg19_ACTB"]
    found = canonical_genes([*(f"hg19_{s}" for s in ("ACTB", "TP53", "CD3E")), "mm10_Actb"])
    assert found.species == "human"
    assert found.recognised == 0.75


def test_no_other_name_overrides_a_current_symbol_or_means_two_genes() -> None:
    for species in ("human", "mouse"):
        symbols = {s.upper() for _, s in _rows(f"{species}_genes.tsv.gz", 2)}
        names = _rows(f"{species}_names.tsv.gz", 3)
        loose = [name for name, _, kind in names if kind in ("alias", "previous", "release")]
        assert not symbols & set(loose)
        assert len({name for name, *_ in names}) == len(names)
        assert not set(_dotted(species)) & set(_tables(species).meaning)


def test_an_alias_does_not_add_its_counts_to_a_gene_that_the_file_holds() -> None:
    assert names_of("P53", "TP53") == ["P53", TP53]
    assert names_of("FAM129A", "NIBAN1")[0] == names_of("NIBAN1")[0]  # a previous symbol is the same gene
    assert canonical_genes(["P53", "TP53"]).recognised == 0.5


def test_tables_are_small_and_quick() -> None:
    folder = Path(__file__).resolve().parents[1] / "src" / "evercell" / "data" / "genes"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6
    genes = list(_tables("human").symbols.values())[:33_000]
    canonical_genes(genes)
    start = time.process_time()
    canonical_genes(genes)
    assert time.process_time() - start < 1.0  # 0.1 s on an idle core


@pytest.mark.parametrize("species", ["human", "mouse"])
@pytest.mark.parametrize("written", ["id", "version", "symbol"])
def test_species_is_found(species: str, written: str) -> None:
    genes = some_genes(species)
    form = {"id": list(genes), "version": [f"{i}.3" for i in genes], "symbol": list(genes.values())}[written]
    found = canonical_genes(form)
    assert found.species == species
    assert found.names.tolist() == list(genes)
    assert found.symbols.tolist() == list(genes.values())
    assert found.recognised == 1.0


def test_a_mouse_gene_in_a_human_file_does_not_make_it_mouse() -> None:
    found = canonical_genes([*some_genes().values(), MOUSE_ACTB])
    assert found.species == "human"
    assert found.names[-1] == MOUSE_ACTB


def test_upper_case_mouse_symbols_of_a_whole_file_are_mouse() -> None:
    genes = [s.upper() for s in _tables("mouse").symbols.values()][::5]
    assert canonical_genes(genes).species == "mouse"


def test_the_column_with_most_known_names_is_used() -> None:
    genes = some_genes()
    frame = pd.DataFrame({"gene_ids": list(genes), "other": list(genes)}, index=[str(i) for i in range(len(genes))])
    assert canonical_genes(frame).column == "gene_ids"
    frame.index = pd.Index(list(genes.values()))
    assert canonical_genes(frame).column == "index"  # a tie
    assert canonical_genes(frame, column="other").column == "other"
    assert canonical_genes(frame, column="index").column == "index"
    frame["feature_name"] = pd.Categorical(list(genes.values()))
    frame.index = pd.Index([f"g{i}" for i in range(len(genes))])
    assert canonical_genes(frame.drop(columns=["gene_ids"])).column == "feature_name"
    with pytest.raises(GenesError, match=r"no column `gene_name`.*`gene_ids`"):
        canonical_genes(frame, column="gene_name")
    with pytest.raises(GenesError, match="`rat`"):
        canonical_genes(frame, species="rat")


def test_orthologues_go_both_ways() -> None:
    assert orthologues([MOUSE_ACTB, "nothing"], to="human") == {MOUSE_ACTB: ACTB}
    assert orthologues([ACTB], to="mouse") == {ACTB: MOUSE_ACTB}
    assert orthologues(["Trp53"], to="human") == {"Trp53": TP53}
    pairs = _rows("orthologues.tsv.gz", 2)
    assert len(pairs) > 15_000
    assert len({h for h, _ in pairs}) == len({m for _, m in pairs}) == len(pairs)
    assert all(h.startswith("ENSG") and m.startswith("ENSMUSG") for h, m in pairs)
    with pytest.raises(GenesError):
        orthologues([], to="rat")


def test_vocabulary_keeps_order_and_codes() -> None:
    genes = some_genes()
    vocabulary = GeneVocabulary.of(list(genes.values()))
    assert vocabulary.names == tuple(genes)
    assert vocabulary.symbols == tuple(genes.values())
    assert len(vocabulary) == len(genes)
    assert vocabulary.names[3] in vocabulary
    assert "nothing" not in vocabulary
    assert [vocabulary.code(name) for name in vocabulary.names] == list(range(len(genes)))
    longer = vocabulary.extended([vocabulary.names[5], MT_CO1, MT_CO1, "NEW"])
    assert longer.names == (*vocabulary.names, MT_CO1, "NEW")
    assert longer.symbols[-2:] == ("MT-CO1", "NEW")
    assert len(vocabulary) == len(genes)
    with pytest.raises(KeyError):
        vocabulary.code("nothing")
    with pytest.raises(GenesError, match="`A` is twice"):
        GeneVocabulary(("A", "A"), ("A", "A"))


def test_vocabulary_of_several_files() -> None:
    first, second = canonical_genes(["TP53", "ACTB"]), canonical_genes([ACTB, MT_CO1])
    assert GeneVocabulary.from_genes([first, second]).names == (TP53, ACTB, MT_CO1)
    assert GeneVocabulary.from_genes([first, second], how="intersection").names == (ACTB,)
    lone = next(i for i in _tables("mouse").symbols if i not in {m for _, m in _rows("orthologues.tsv.gz", 2)})
    mouse = canonical_genes([MOUSE_ACTB, MOUSE_TP53, lone])
    joint = GeneVocabulary.from_genes([second, mouse])
    assert joint.species == "human"
    assert joint.names == (ACTB, MT_CO1, TP53, lone)
    assert joint.symbols[2] == "TP53"
    assert GeneVocabulary.from_genes([mouse]).species == "mouse"
    aligned = align([lone, "Trp53"], joint, species="mouse")
    assert aligned.columns.tolist() == [3, 2]
    with pytest.raises(GenesError):
        GeneVocabulary.from_genes([])


label = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)


@given(st.lists(label, unique=True, max_size=20), st.sampled_from(["human", "mouse"]))
@settings(max_examples=50, deadline=None)
def test_vocabulary_text_round_trip(names: list[str], species: str) -> None:
    vocabulary = GeneVocabulary(tuple(names), tuple(names[::-1]), "mouse" if species == "mouse" else "human")
    again = GeneVocabulary.from_text(vocabulary.to_text())
    assert again == vocabulary
    assert again.digest() == vocabulary.digest()
    assert len(vocabulary.digest()) == 64
    assert vocabulary.extended(["one more gene"]).digest() != vocabulary.digest()


@pytest.mark.parametrize(
    "text", ["", "TP53\n", "# evercell genes\tversion 1\thuman", "# evercell genes\tversion 1\trat\n"]
)
def test_damaged_vocabulary_is_refused(text: str) -> None:
    with pytest.raises(GenesError, match="damaged"):
        GeneVocabulary.from_text(text)


def test_vocabulary_of_a_newer_or_cut_file_is_refused() -> None:
    text = GeneVocabulary.of(["TP53", "ACTB"]).to_text()
    with pytest.raises(GenesError, match="format version 9"):
        GeneVocabulary.from_text(text.replace("version 1", "version 9"))
    with pytest.raises(GenesError, match="damaged"):
        GeneVocabulary.from_text(text[:-3])
    with pytest.raises(GenesError, match="line 3"):
        GeneVocabulary.from_text(text.replace("\tACTB", ""))
    with pytest.raises(GenesError, match="tab or a line break"):
        GeneVocabulary(("A\tB",), ("A",))


def test_alignment_of_symbols_to_ids() -> None:
    genes = some_genes()
    vocabulary = GeneVocabulary.of(list(genes))
    query = [*list(genes.values())[:100][::-1], "UNKNOWN1", f"{next(iter(genes))}.4"]
    found = align(query, vocabulary)
    assert found.columns.dtype == np.int32
    assert found.columns.tolist() == [*range(99, -1, -1), -1, 0]
    assert found.measured.tolist() == [True] * 100 + [False] * 300
    coverage = found.coverage
    assert (coverage.n_query, coverage.n_model, coverage.n_matched, coverage.summed) == (102, 400, 100, 1)
    assert coverage.share_of_model == 0.25
    assert coverage.share_of_query == 101 / 102
    assert coverage.unmatched == ("UNKNOWN1",)
    assert not coverage.through_orthologues
    assert json.loads(json.dumps(coverage.to_dict()))["unmatched"] == ["UNKNOWN1"]
    assert coverage.sentence().startswith("100 of the model's 400 genes (25%) were measured (102 human genes")


@pytest.mark.parametrize(("query", "model"), [("mouse", "human"), ("human", "mouse")])
def test_alignment_through_orthologues(query: str, model: str) -> None:
    genes = some_genes(query)
    partners = orthologues(genes, to=model)
    vocabulary = GeneVocabulary.of(list(partners.values())[::-1])
    found = align(list(genes.values()), vocabulary)
    assert found.coverage.through_orthologues
    assert (found.coverage.species, found.coverage.vocabulary_species) == (query, model)
    assert [vocabulary.names[c] for c in found.columns] == [partners[g] for g in genes]
    assert "one-to-one orthologues" in found.coverage.sentence()


def alignment(columns: list[int], n_model: int) -> Alignment:
    coverage = Coverage(0, 0, 0, 0.0, 0.0, "human", "human", False, "index", 0, ())
    return Alignment(np.array(columns, dtype=np.int32), np.zeros(n_model, dtype=bool), coverage)


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_apply_equals_a_dense_sum(data: st.DataObject) -> None:
    n_cells, n_query, n_model = (data.draw(st.integers(low, 7)) for low in (0, 1, 1))
    columns = data.draw(st.lists(st.integers(-1, n_model - 1), min_size=n_query, max_size=n_query))
    entries = data.draw(st.lists(st.integers(0, 255), min_size=n_cells * n_query, max_size=n_cells * n_query))
    dense = np.array(entries, dtype=np.uint8).reshape(n_cells, n_query)
    expected = np.zeros((n_cells, n_model))
    for gene, code in enumerate(columns):
        if code >= 0:
            expected[:, code] += dense[:, gene]
    query = csr_matrix(dense)
    before = query.copy()
    for counts in (query, query.tocsc(), dense):
        aligned = alignment(columns, n_model).apply(counts)
        assert issparse(aligned)
        assert aligned.format == "csr"
        assert aligned.dtype == np.float32
        assert aligned.has_canonical_format
        assert np.array_equal(aligned.toarray(), expected)
    assert (query != before).nnz == 0


def test_apply_refuses_counts_of_other_genes() -> None:
    with pytest.raises(GenesError, match="3 genes; 2 were aligned"):
        alignment([0, 1], 2).apply(csr_matrix(np.ones((1, 3))))


def refusal(genes: pd.DataFrame | list[str], **how: str) -> GenesError:
    vocabulary = GeneVocabulary.of(list(some_genes()))
    with pytest.raises(GenesError) as raised:
        align(genes, vocabulary, name="query.h5ad", **how)  # type: ignore[arg-type]
    assert "`query.h5ad` shares" in raised.value.message
    assert "the model's 400 genes" in raised.value.message
    assert vocabulary.names[0] in raised.value.message
    return raised.value


def test_refusal_names_the_cause_and_the_argument() -> None:
    genes = some_genes()
    numbers = [str(i) for i in range(400)]
    frame = pd.DataFrame({"my_ids": list(genes)}, index=numbers)
    error = refusal(frame)
    assert "column `my_ids`" in error.message
    assert error.hint == "pass --gene-column my_ids"
    error = refusal(frame.set_index("my_ids", drop=False).assign(symbol=numbers), column="symbol")
    assert error.hint == "pass --gene-column index"
    error = refusal(numbers)
    assert "`0`, `1`" in error.message
    assert "numbers" in error.message
    assert "--gene-column" in str(error.hint)
    error = refusal([f"AAACCTGAGCC{'ACGT'[i % 4]}{'ACGT'[i // 4 % 4]}{'ACGT'[i // 16 % 4]}-1" for i in range(400)])
    assert "swapped" in error.message
    assert "adata.T" in str(error.hint)
    error = refusal([f"thing{i}" for i in range(400)])
    assert "0% of them" in error.message
    assert "--species" in str(error.hint)
    others = [i for i in _tables("human").symbols if i not in genes][:300]
    error = refusal([*others, *list(genes)[:9]])
    assert "shares 9 of" in error.message
    assert "few of them are genes of this model" in error.message
    refusal([])


def test_refusal_names_a_wrong_species() -> None:
    partnered = {h for h, _ in _rows("orthologues.tsv.gz", 2)}
    human = {s: i for i, s in _tables("human").symbols.items() if s.startswith("LINC") and i not in partnered}
    with pytest.raises(GenesError, match="they are human genes, read as mouse") as raised:
        align(list(human), GeneVocabulary.of(list(human.values())), species="mouse")
    assert raised.value.hint == "pass --species human"


def test_limits_of_refusal() -> None:
    genes = list(some_genes())
    vocabulary = GeneVocabulary.of(genes)
    assert align(genes[:50], vocabulary).coverage.n_matched == 50
    with pytest.raises(GenesError):
        align(genes[:49], vocabulary)
    with pytest.raises(GenesError):
        align([*genes[:60], *(f"unknown {i}" for i in range(400))], vocabulary, min_coverage=0.5)
    small = GeneVocabulary.of([f"gene {i}" for i in range(10)])  # a model of few, invented genes
    assert align([f"gene {i}" for i in range(5)], small).coverage.n_matched == 5


def var_of(path: Path) -> pd.DataFrame:
    import h5py
    from anndata.io import read_elem

    with h5py.File(path) as file:
        return read_elem(file["var"])


@pytest.fixture(scope="module")
def studies() -> dict[str, tuple[pd.DataFrame, CanonicalGenes, str]]:
    files = sorted(DATA.glob("labelled/*/*.h5ad"))
    if not files:
        pytest.skip(f"no data sets in {DATA}")
    tables = {path: var_of(path) for path in files}
    return {path.stem: (var, canonical_genes(var), path.parent.name) for path, var in tables.items()}


@pytest.mark.shared
def test_every_study_is_recognised(studies: dict[str, tuple[pd.DataFrame, CanonicalGenes, str]]) -> None:
    for study, (var, found, species) in studies.items():
        assert found.species == species, study
        assert found.recognised >= (0.8 if study == "jaitin_spleen_sorted" else 0.9), study
        assert len(set(found.names.tolist())) > 0.98 * len(var), study  # names do not melt together


@pytest.mark.shared
@pytest.mark.parametrize(
    ("first", "second", "gain"),
    [
        ("pbmc3k", "pbmc4k_labelled", 1000),
        ("pbmc4k_labelled", "hao_small_pbmc", 3000),
        ("pbmc4k_labelled", "liu_covid_pbmc", 10),
        ("habib_brain_nuclei", "heart_san_nuclei", 4000),
        ("baron_human", "muraro_pancreas", 1300),
        ("baron_human", "tritschler_pancreas", 1300),
        ("baron_human", "panc8_small_5tech", 150),
        ("tm_lung_10x_P7_8", "lung_development_atlas_subset", 150),
        ("tm_lung_10x_P7_8", "zilionis_lung_immune", 1000),
    ],
)
def test_studies_share_more_genes_than_symbols(
    studies: dict[str, tuple[pd.DataFrame, CanonicalGenes, str]], first: str, second: str, gain: int
) -> None:
    (var, found, _), (other_var, other, _) = studies[first], studies[second]
    raw = len(set(var.index) & set(other_var.index))
    assert len(set(found.names.tolist()) & set(other.names.tolist())) >= raw + gain


@pytest.mark.shared
def test_mouse_study_meets_human_model(studies: dict[str, tuple[pd.DataFrame, CanonicalGenes, str]]) -> None:
    vocabulary = GeneVocabulary.from_genes([studies["baron_human"][1]])
    var = studies["baron_mouse_pancreas"][0]
    found = align(var, vocabulary, name="baron_mouse_pancreas.h5ad")
    assert found.coverage.through_orthologues
    by_letters = len(set(studies["baron_human"][0].index) & set(var.index.str.upper()))
    assert found.coverage.n_matched >= by_letters + 300
