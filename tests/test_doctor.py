"""What the doctor finds in an installation and in a file."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData

from evercell.cli import main
from evercell.doctor import Finding, check_cells, check_installation
from evercell.genes import GeneVocabulary
from evercell.testing import synthetic_cells


def of(findings: list[Finding], subject: str) -> Finding:
    (found,) = [one for one in findings if one.subject == subject]
    return found


def written(adata: AnnData, folder: Path) -> Path:
    adata.write_h5ad(folder / "q.h5ad")
    return folder / "q.h5ad"


def test_this_installation_is_sound() -> None:
    findings = check_installation()
    assert [one for one in findings if one.level == "error"] == []
    assert {"system", "packages", "threads", "GPU", "temporary files", "packaged data"} <= {
        one.subject for one in findings
    }
    assert metadata.version("scanpy") in of(findings, "packages").message


def test_packages_that_are_missing_or_too_new(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["numpy>=1.26", "numpy<1", "nosuchpackage>=2", "pynndescent<0.7", "pytest>=99; extra == 'dev'"]
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.7.0" if name == "pynndescent" else version(name))
    findings = check_installation()
    assert of(findings, "nosuchpackage") == Finding(
        "error", "nosuchpackage", "it is not installed", 'pip install "nosuchpackage>=2"'
    )
    assert of(findings, "numpy").level == "warning"
    assert of(findings, "pynndescent") == Finding(
        "warning", "pynndescent", "version 0.7.0 is not <0.7", 'pip install "pynndescent<0.7"'
    )
    assert not [one for one in findings if one.subject == "pytest"]


def test_no_place_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    found = of(check_installation(), "temporary files")
    assert (found.level, found.mend) == ("error", "make room, or point TMPDIR at another folder")


def test_a_sound_file_has_nothing_to_mend(tmp_path: Path) -> None:
    cells = synthetic_cells(100)
    findings = check_cells(written(cells, tmp_path), GeneVocabulary.of(cells.var))
    assert {one.level for one in findings} == {"ok"}
    assert of(findings, "counts").message == "taken from X, raw counts"
    assert of(findings, "genes").message == "human, names from the index of var, 100% of 300 recognised"
    assert "300 of the model's 300 genes (100%)" in of(findings, "genes of the model").message
    assert of(findings, "--labels").message == "`cell_type`"
    assert of(findings, "--donor or --batch").message == "`donor`"
    totals = np.asarray(cells.X.astype(int).sum(axis=1)).ravel()
    assert f"median of {np.median(totals):,.0f} counts" in of(findings, "depth").message


def test_values_of_every_matrix_are_told(tmp_path: Path) -> None:
    cells = synthetic_cells(60)
    cells.layers["counts"] = cells.X.copy()
    totals = np.asarray(cells.X.sum(axis=1)).ravel()
    cells.X = sp.csr_matrix(np.log1p(cells.X.toarray() / totals[:, None] * 1e4).astype(np.float32))
    cells.layers["scaled"] = cells.X.toarray() - 1
    findings = check_cells(written(cells, tmp_path))
    assert of(findings, "counts").message == "taken from layers['counts'], raw counts"
    assert "log" in of(findings, "not used: X").message
    assert "negative" in of(findings, "not used: scaled").message
    del cells.layers["counts"]
    findings = check_cells(written(cells, tmp_path))
    assert "taken from X, no raw counts, but they can be had back" in of(findings, "counts").message


def test_a_file_without_counts_is_an_error(tmp_path: Path) -> None:
    cells = synthetic_cells(60)
    cells.X = cells.X.toarray().astype(np.float32) - 1.5
    (found,) = check_cells(written(cells, tmp_path))
    assert (found.level, found.subject) == ("error", "counts")
    assert "negative" in found.message
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
    warnings = {one.subject: one for one in findings if one.level == "warning"}
    assert set(warnings) == {"depth", "empty cells", "copies"}
    assert warnings["empty cells"].message == "1 of 60 cells have no counts"
    assert warnings["copies"].message == "2 cells have the very counts of another cell"
    assert all(one.mend for one in warnings.values())
    assert of(findings, "--labels").message.startswith("no column of obs looks like cell types")


def test_genes_that_are_not_known_or_not_those_of_the_model(tmp_path: Path) -> None:
    cells = synthetic_cells(60)
    vocabulary = GeneVocabulary.of(cells.var)
    few = cells[:, :100].copy()
    findings = check_cells(written(few, tmp_path), vocabulary)
    assert of(findings, "genes of the model").level == "warning"
    cells.var_names = [f"feature{i}" for i in range(cells.n_vars)]
    findings = check_cells(written(cells, tmp_path), vocabulary)
    assert (of(findings, "genes").level, of(findings, "genes of the model").level) == ("warning", "error")
    assert "--gene-column" in of(findings, "genes").mend
    (found,) = [one for one in check_cells(tmp_path / "q.h5ad", gene_column="id") if one.level == "error"]
    assert "has no column `id`" in found.message


def test_exit_codes_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evercell.doctor.check_installation", lambda: [Finding("ok", "system", "made up")])

    def run(*words: str) -> tuple[int, str]:
        code = main(["doctor", *words])
        return code, capsys.readouterr().out

    assert run() == (0, "ok       system: made up\nnothing to mend\n")
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
    assert {tuple(one) for one in found["findings"]} == {("level", "subject", "message", "mend")}
    code, out = run(str(tmp_path / "none.h5ad"), "--json")
    assert (code, json.loads(out)["errors"]) == (2, 1)
