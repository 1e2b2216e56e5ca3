"""What the doctor finds in an installation and in a file."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData

from evercell import registry
from evercell.annotation import annotate
from evercell.cells import read_cells
from evercell.cli import main
from evercell.doctor import Finding, check_cells, check_installation, check_labels, examine
from evercell.examples import load_example
from evercell.genes import GeneVocabulary
from evercell.testing import synthetic_cells, with_ambient, with_doublets, with_empty_droplets

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "labelled"


def of(findings: list[Finding], subject: str) -> Finding:
    (found,) = [one for one in findings if one.subject == subject]
    return found


def written(adata: AnnData, folder: Path) -> Path:
    adata.write_h5ad(folder / "q.h5ad")
    return folder / "q.h5ad"


def test_this_installation_is_sound() -> None:
    findings = check_installation()
    assert [one for one in findings if one.severity == "error"] == []
    assert {"system", "packages", "threads", "GPU", "temporary files", "packaged data"} <= {
        one.subject for one in findings
    }
    assert metadata.version("scanpy") in of(findings, "packages").found


def test_packages_that_are_missing_or_too_new(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["numpy>=1.26", "numpy<1", "nosuchpackage>=2", "pynndescent<0.7", "pytest>=99; extra == 'dev'"]
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.7.0" if name == "pynndescent" else version(name))
    findings = check_installation()
    assert of(findings, "nosuchpackage") == Finding(
        "error", "nosuchpackage", "it is not installed", mend='pip install "nosuchpackage>=2"'
    )
    assert of(findings, "numpy").severity == "warning"
    assert of(findings, "pynndescent") == Finding(
        "warning", "pynndescent", "version 0.7.0 is not <0.7", mend='pip install "pynndescent<0.7"'
    )
    assert not [one for one in findings if one.subject == "pytest"]


def test_no_place_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    found = of(check_installation(), "temporary files")
    assert (found.severity, found.mend) == ("error", "make room, or point TMPDIR at another folder")


def test_a_sound_file_has_nothing_to_mend(tmp_path: Path) -> None:
    cells = load_example("baron_stage1")
    findings = check_cells(written(cells, tmp_path), GeneVocabulary.of(cells.var))
    assert {one.severity for one in findings} == {"info"}
    assert of(findings, "counts").found == "taken from X, raw counts"
    assert of(findings, "genes").found == "human, names from the index of var, 100% of 6,000 recognised"
    assert "6,000 of the model's 6,000 genes (100%)" in of(findings, "genes of the model").found
    assert of(findings, "--labels").found == "`cell_type`"
    assert of(findings, "--donor or --batch").found == "`donor`"
    totals = np.asarray(cells.X.astype(int).sum(axis=1)).ravel()
    assert f"median of {np.median(totals):,.0f} counts" in of(findings, "depth").found


def test_values_of_every_matrix_are_told(tmp_path: Path) -> None:
    cells = synthetic_cells(60)
    cells.layers["counts"] = cells.X.copy()
    totals = np.asarray(cells.X.sum(axis=1)).ravel()
    cells.X = sp.csr_matrix(np.log1p(cells.X.toarray() / totals[:, None] * 1e4).astype(np.float32))
    cells.layers["scaled"] = cells.X.toarray() - 1
    findings = check_cells(written(cells, tmp_path))
    assert of(findings, "counts").found == "taken from layers['counts'], raw counts"
    assert "log" in of(findings, "not used: X").found
    assert "negative" in of(findings, "not used: scaled").found
    del cells.layers["counts"]
    findings = check_cells(written(cells, tmp_path))
    assert "taken from X, no raw counts, but they can be had back" in of(findings, "counts").found


def test_a_file_without_counts_is_an_error(tmp_path: Path) -> None:
    cells = synthetic_cells(60)
    cells.X = cells.X.toarray().astype(np.float32) - 1.5
    (found,) = check_cells(written(cells, tmp_path))
    assert (found.severity, found.subject) == ("error", "counts")
    assert "negative" in found.found
    assert found.mend


def test_poor_cells_are_warnings_with_their_mend(tmp_path: Path) -> None:
    cells = synthetic_cells(60)
    counts = np.minimum(cells.X.toarray(), 1)
    counts[0] = 0
    counts[5] = counts[6]
    counts[7] = counts[6]
    counts[:, 0] = 0
    counts[1:, 0] = 2  # zeros and ones alone would be read as presence
    cells.X = sp.csr_matrix(counts)
    del cells.obs["cell_type"]
    findings = check_cells(written(cells, tmp_path))
    warnings = {one.subject: one for one in findings if one.severity == "warning"}
    assert set(warnings) == {"panel", "depth", "empty cells", "copies"}
    assert warnings["empty cells"].found == "1 of 60 cells have no counts"
    assert warnings["copies"].found == "2 cells have the very counts of another cell"
    assert all(one.mend for one in warnings.values())
    assert of(findings, "--labels").found.startswith("no column of obs looks like cell types")


def test_genes_that_are_not_known_or_not_those_of_the_model(tmp_path: Path) -> None:
    cells = synthetic_cells(60)
    vocabulary = GeneVocabulary.of(cells.var)
    few = cells[:, :100].copy()
    findings = check_cells(written(few, tmp_path), vocabulary)
    assert of(findings, "genes of the model").severity == "warning"
    cells.var_names = [f"feature{i}" for i in range(cells.n_vars)]
    findings = check_cells(written(cells, tmp_path), vocabulary)
    assert (of(findings, "genes").severity, of(findings, "genes of the model").severity) == ("warning", "error")
    assert "--gene-column" in of(findings, "genes").mend
    (found,) = [one for one in check_cells(tmp_path / "q.h5ad", gene_column="id") if one.severity == "error"]
    assert "has no column `id`" in found.found


def test_exit_codes_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evercell.doctor.check_installation", lambda: [Finding("info", "system", "made up")])

    def run(*words: str) -> tuple[int, str]:
        code = main(["doctor", *words])
        return code, capsys.readouterr().out

    assert run() == (0, "info     system: made up\nnothing to mend\n")
    monkeypatch.setattr("evercell.doctor.genes.PANEL", 300)
    good = synthetic_cells(60)
    path = str(written(good, tmp_path))
    assert run(path, "--strict")[0] == 0
    good.X = good.X // 10 if not sp.issparse(good.X) else sp.csr_matrix(good.X.toarray() // 10)
    path = str(written(good, tmp_path))
    code, out = run(path)
    assert code == 0
    assert "  -> cells of fewer than 500 counts are hard to label: filter them" in out
    assert out.endswith("errors: 0, warnings: 1\n")
    code, out = run(path, "--strict", "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["warnings"]) == (1, True, 1)
    assert {tuple(one) for one in found["findings"]} == {("severity", "subject", "found", "expected", "cause", "mend")}
    assert run(str(tmp_path / "none.h5ad"), "--json") == (2, "")  # an error as of any command, not a finding
    (tmp_path / "damaged.h5ad").write_text("no cells")
    code, out = run(str(tmp_path / "damaged.h5ad"), "--json")
    assert (code, json.loads(out)["errors"]) == (2, 1)


def test_labels_are_looked_at_without_knowing_the_truth() -> None:
    def warned(labels: dict[str, int], **more: object) -> set[str]:
        found = check_labels(np.repeat(list(labels), list(labels.values())), **more)  # type: ignore[arg-type]
        assert all(one.cause and one.mend and one.expected for one in found if one.severity == "warning")
        return {one.subject for one in found if one.severity != "info"}

    sure, unsure = np.full(100, 0.9), np.full(100, 0.4)
    assert warned({"a": 60, "b": 40}, confidence=sure) == set()
    assert warned({"a": 60, "Unknown": 40}) == {"unknown cells"}
    assert warned({"a": 99, "b": 1}) == {"one type everywhere"}
    assert warned({"a": 60, "b": 40}, confidence=unsure) == {"confidence"}
    assert warned({"a": 60, "b": 40}, confidence=np.repeat([0.9, 0.3], [60, 40])) == {"confidence of types"}
    assert warned({"a": 95, "b": 5}, confidence=np.repeat([0.9, 0.3], [95, 5])) == set()  # too few cells to judge by
    assert warned({"a": 60, "b": 40}, probabilities=np.full((100, 4), 0.25)) == {"entropy"}
    assert warned({"a": 60, "b": 40}, info={"coverage": {"share_of_model": 0.2}}) == {"gene coverage"}


def test_ambient_rna_doublets_droplets_and_mixed_up_names_are_seen() -> None:
    cells = load_example("baron_stage1")

    def subjects(altered: AnnData, **more: str) -> set[str]:
        return {one.subject for one in check_cells(altered, **more) if one.severity != "info"}

    assert subjects(cells) == set()
    assert subjects(with_ambient(cells, 0.2)) == {"ambient RNA"}
    assert subjects(with_doublets(cells, 0.3)) == {"doublets"}
    assert subjects(with_empty_droplets(cells, 0.3)) == {"empty droplets"}
    assert "panel" in subjects(cells[:, ::20].copy())
    mixed = cells.copy()
    mixed.var_names = np.random.default_rng(0).permutation(mixed.var_names)
    (found,) = [one for one in check_cells(mixed) if one.severity == "error"]
    assert found.subject == "names and values" and found.mend
    assert "species" in subjects(cells, species="mouse")
    cells.var_names = ["1-Mar", "2-Sep", *cells.var_names[2:]]
    (found,) = [one for one in check_cells(cells) if one.subject == "gene names"]
    assert "2 are dates: `1-Mar`, `2-Sep`" in found.found


def test_a_fuller_matrix_that_is_not_used_is_named() -> None:
    cells = load_example("tritschler_unseen")
    cells.raw = cells
    few = cells[:, :2000].copy()
    (found,) = [one for one in check_cells(few) if one.subject == "not used: raw"]
    assert (found.severity, found.mend) == ("warning", "pass --layer raw")


@pytest.mark.shared
@pytest.mark.parametrize(
    "name", ["human/pbmc3k", "human/kang_pbmc", "human/travaglini_lung_subset", "mouse/tm_lung_10x_P7_8"]
)
def test_nothing_is_found_in_clean_files(name: str) -> None:
    """All 52 files, as they are and spoiled, are in benchmarks/doctor.py."""
    cells = read_cells(SHARED / f"{name}.h5ad")[:1000].to_memory()
    assert {one.subject for one in check_cells(cells) if one.severity != "info"} == set()


@pytest.mark.shared
def test_nuclei_damage_and_panels_are_seen_where_they_are() -> None:
    def subjects(name: str) -> dict[str, str]:
        return {one.subject: one.severity for one in check_cells(read_cells(SHARED / f"human/{name}.h5ad"))}

    assert subjects("heart_san_nuclei")["nuclei"] == "info"
    assert subjects("htan_breast_liver_met")["damaged cells"] == "warning"
    found = subjects("ding_pbmc_drop_seq")
    assert {one for one, severity in found.items() if severity == "warning"} == {"panel", "depth", "copies"}


def test_a_model_is_tried_on_a_file_and_its_labels_are_looked_at(tmp_path: Path) -> None:
    model = registry.load("human-pancreas")
    cells = load_example("tritschler_unseen")[::2].copy()
    path = written(cells, tmp_path)
    before = examine(path, model)
    assert of(before, "model tried").found.startswith("on 125 of 125 cells")
    assert {one.subject for one in before if one.severity == "warning"} == {"genes of the model", "gene coverage"}
    assert "studies of the training data lie" in of(before, "shift").found
    annotate(model, cells, inplace=True, model_name="human-pancreas", shown=False)
    after = examine(written(cells, tmp_path), model)
    assert of(after, "labels") == of(before, "labels") and of(after, "shift") == of(before, "shift")
    blood = registry.load("human-immune")
    wrong = {one.subject for one in examine(written(cells, tmp_path), blood) if one.severity == "warning"}
    assert "model" in wrong
    del cells.obs["evercell"]
    wrong = {one.subject for one in examine(written(cells, tmp_path), blood) if one.severity == "warning"}
    assert {"entropy", "proportions"} <= wrong
