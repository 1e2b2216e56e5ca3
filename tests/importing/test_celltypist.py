"""CellTypist models: its labels by an independent computation, what a pickle may not do, and updates without a bank."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anndata import AnnData
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.preprocessing import StandardScaler

from evercell.annotation import annotate
from evercell.annotator import Annotator
from evercell.checkpoint import FORMAT, load, save
from evercell.errors import GenesError, ModelError, SettingsError
from evercell.importing import import_celltypist
from evercell.testing import TYPES, synthetic_cells
from evercell.updating.update import update

Run = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.filterwarnings("ignore:lbfgs failed to converge")


def log_normalised(cells: AnnData) -> np.ndarray:
    counts = cells.X.toarray().astype(np.float64)
    return np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))


def made(
    cells: AnnData, genes: np.ndarray | None = None, *, sgd: bool = False, with_mean: bool = True
) -> tuple[Any, StandardScaler]:
    """Classifier and scaler as CellTypist trains them: one type against the rest, on scaled values cut off at 10."""
    x, labels = log_normalised(cells), cells.obs["cell_type"].astype(str).to_numpy()
    genes = np.arange(cells.n_vars) if genes is None else genes
    scaler = StandardScaler(with_mean=with_mean).fit(x[:, genes])
    z = np.minimum(scaler.transform(x[:, genes]), 10)
    if sgd:
        classifier = SGDClassifier(loss="log_loss", random_state=0).fit(z, labels)
    else:
        types = np.unique(labels)
        fits = [LogisticRegression(max_iter=50).fit(z, labels == one) for one in types]
        classifier = LogisticRegression().fit(z[:, :3], labels)
        if len(types) == 2:
            fits = fits[1:]
        classifier.coef_ = np.concatenate([fit.coef_ for fit in fits])
        classifier.intercept_ = np.concatenate([fit.intercept_ for fit in fits])
    classifier.features = np.asarray(cells.var_names[genes], dtype=object)
    return classifier, scaler


def written(path: Path, classifier: Any, scaler: Any, protocol: int | None = None, **more: Any) -> Path:
    description = {"date": "2026-11-20", "details": "made up", "version": "v1", "number_celltypes": 4}
    stored = {"Model": classifier, "Scaler_": scaler, "description": description, **more}
    path.write_bytes(pickle.dumps(stored, protocol=protocol))
    return path


def decided(classifier: Any, scaler: Any, cells: AnnData) -> np.ndarray:
    """Decision values (B, K), from CellTypist's description: genes that both have, scaled, cut off at 10, weighed."""
    place = {gene: column for column, gene in enumerate(classifier.features)}
    shared = [column for column, gene in enumerate(cells.var_names) if gene in place]
    rows = [place[gene] for gene in cells.var_names if gene in place]
    z = (log_normalised(cells)[:, shared] - (scaler.mean_[rows] if scaler.with_mean else 0)) / scaler.scale_[rows]
    values = np.minimum(z, 10) @ classifier.coef_[:, rows].T + classifier.intercept_
    return np.hstack([-values, values]) if values.shape[1] == 1 else values


def imported(path: Path, **keywords: Any) -> Annotator:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return import_celltypist(path, trust_pickle=True, **keywords)


@pytest.fixture(scope="module")
def study() -> AnnData:
    return synthetic_cells(240, seed=1)


@pytest.fixture(scope="module")
def parts(study: AnnData) -> tuple[Any, StandardScaler]:
    return made(study, np.arange(0, 240))


@pytest.fixture(scope="module")
def pickled(parts: tuple[Any, StandardScaler], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("celltypist") / "model.pkl", *parts)


@pytest.fixture(scope="module")
def model(pickled: Path) -> Annotator:
    return imported(pickled)


@pytest.mark.parametrize("lacking", [False, True], ids=["all genes", "genes that the query lacks"])
@pytest.mark.parametrize("high", [False, True], ids=["", "cut off"])
def test_labels_and_odds_are_those_of_an_independent_computation(
    parts: tuple[Any, StandardScaler], lacking: bool, high: bool, tmp_path: Path
) -> None:
    """A gene that is not measured says nothing; the total is over all genes, also those without weights."""
    classifier, scaler = copy.deepcopy(parts)
    if high:  # so that some genes lie more than 10 spreads above their mean
        scaler.scale_[:100] /= 8
        classifier.coef_ = classifier.coef_ / 10  # nothing is certain, so that differences are seen
    model = imported(written(tmp_path / "model.pkl", classifier, scaler))
    query = synthetic_cells(150, seed=2, study_shift=0.4)
    query = query[:, 70:].copy() if lacking else query
    expected = decided(classifier, scaler, query)
    result = annotate(model, query)
    assert (result.labels == classifier.classes_[expected.argmax(axis=1)]).all()
    proba = np.exp(expected - expected.max(axis=1, keepdims=True))
    np.testing.assert_allclose(result.probabilities, proba / proba.sum(axis=1, keepdims=True), atol=1e-4)
    assert model.linear is not None
    uncut = replace(model, linear=replace(model.linear, ceiling=None))
    assert (np.abs(annotate(uncut, query).probabilities - result.probabilities).max() > 0.001) == high


@pytest.mark.parametrize("sgd", [False, True])
@pytest.mark.parametrize("with_mean", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_kinds_of_models_and_of_pickles(sgd: bool, with_mean: bool, protocol: int, tmp_path: Path) -> None:
    cells = synthetic_cells(90, seed=1, n_genes=120, n_types=3)
    two = made(cells, sgd=sgd, with_mean=with_mean)
    query = synthetic_cells(60, seed=2, n_genes=120, n_types=3)
    found = annotate(imported(written(tmp_path / "model.pkl", *two, protocol=protocol)), query)
    assert (found.labels == two[0].classes_[decided(*two, query).argmax(axis=1)]).all()


def test_two_types_with_one_row_and_a_type_that_cannot_be_a_name(tmp_path: Path) -> None:
    cells = synthetic_cells(80, seed=1, n_types=2)
    classifier, scaler = made(cells)
    assert len(classifier.coef_) == 1
    classifier.classes_ = np.array(["Unassigned", "beta"])
    model = imported(written(tmp_path / "model.pkl", classifier, scaler))
    assert model.types.names == ("Unassigned (CellTypist)", "beta")
    query = synthetic_cells(60, seed=2, n_types=2)
    expected = decided(classifier, scaler, query).argmax(axis=1)
    assert (annotate(model, query).labels == np.asarray(model.types.names)[expected]).all()


def test_a_model_is_read_as_it_was_written_and_older_readers_refuse_it(model: Annotator, tmp_path: Path) -> None:
    again = load(save(model, tmp_path / "model"))
    assert again.fingerprint == model.fingerprint
    assert again.linear_only
    query = synthetic_cells(50, seed=2)
    np.testing.assert_array_equal(annotate(again, query).probabilities, annotate(model, query).probabilities)
    assert f'"format": {FORMAT}' not in (tmp_path / "model" / "annotator.json").read_text()


def test_every_cell_is_labelled_and_the_user_is_told_why(model: Annotator) -> None:
    query = synthetic_cells(60, n_types=6, seed=2)
    result = annotate(model, query, reject=0.3)
    assert "Unknown" not in result.labels
    assert any("every cell is labelled" in note for note in result.info["notes"])


# --- pickles


def test_without_the_word_of_the_user_nothing_is_read(pickled: Path) -> None:
    with pytest.raises(ModelError, match="can run code") as caught:
        import_celltypist(pickled)
    assert "--trust-pickle" in (caught.value.hint or "")
    with pytest.warns(UserWarning, match="can run code"):
        import_celltypist(pickled, trust_pickle=True)


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("true",), "posix.system"),
        (eval, ("1",), "eval"),
        (np.load, ("x",), "numpy.load"),
        (getattr, (1, "real"), "getattr"),
    ],
)
def test_anything_else_is_refused_by_name_and_not_run(
    function: Any, arguments: tuple[Any, ...], name: str, parts: tuple[Any, StandardScaler], tmp_path: Path
) -> None:
    path = written(tmp_path / "model.pkl", *parts, hidden=Calls(function, *arguments))
    with pytest.raises(ModelError, match=name) as caught:
        imported(path)
    assert "nothing was run" in str(caught.value)


def test_a_file_that_would_leave_a_mark_leaves_none(parts: tuple[Any, StandardScaler], tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = written(tmp_path / "model.pkl", *parts, hidden=Calls(os.mkdir, str(mark)))
    pickle.loads(path.read_bytes())  # noqa: S301 -- the file of this test
    assert mark.is_dir()  # so the file is one that runs
    mark.rmdir()
    with pytest.raises(ModelError, match="mkdir"):
        imported(path)
    assert not mark.exists()


def test_no_code_of_scikit_learn_or_numpy_is_reached(pickled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: Any) -> None:
        raise AssertionError("a class of the file was used")

    for cls in (LogisticRegression, StandardScaler):
        monkeypatch.setattr(cls, "__setstate__", reached)
    with pytest.raises(AssertionError):
        pickle.loads(pickled.read_bytes())  # noqa: S301 -- the file of this test
    assert len(imported(pickled).types) == 4


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x04]\x94.", b"\x80\x04K\x01."])
def test_what_is_no_model_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot be read as a pickle|is no CellTypist model"):
        imported(tmp_path / "model.pkl")
    with pytest.raises(ModelError, match="there is no CellTypist model"):
        imported(tmp_path / "nowhere.pkl")


def test_parts_that_do_not_fit_are_refused(parts: tuple[Any, StandardScaler], tmp_path: Path) -> None:
    classifier, scaler = copy.deepcopy(parts)
    del classifier.features
    with pytest.raises(ModelError, match="does not name its genes"):
        imported(written(tmp_path / "a.pkl", classifier, scaler))
    classifier.features = parts[0].features[:-1]
    with pytest.raises(ModelError, match="do not fit"):
        imported(written(tmp_path / "b.pkl", classifier, scaler))
    classifier.features = np.array([f"gene {n}" for n in range(240)], dtype=object)
    with pytest.raises(GenesError, match="0% of the 240 names"):
        imported(written(tmp_path / "c.pkl", classifier, scaler))
    classifier, scaler = copy.deepcopy(parts)
    classifier.coef_ = classifier.coef_.copy()
    classifier.coef_[0, 0] = np.nan
    with pytest.raises(ModelError, match="no numbers `coef_`"):
        imported(written(tmp_path / "d.pkl", classifier, scaler))


# --- updates


@pytest.fixture(scope="module")
def updated(model: Annotator) -> Annotator:
    """The model taught two new types and one that it knows, by a study of these alone."""
    new = synthetic_cells(180, n_types=6, n_genes=320, seed=3)
    new = new[new.obs["cell_type"].isin(["delta", "acinar", "ductal"]).to_numpy()].copy()
    return update(model, new, mapping={"acinar": "acinar", "ductal": "ductal"}, shown=False)


def right(model: Annotator, types: list[str], *, seed: int = 5) -> float:
    query = synthetic_cells(360, n_types=6, seed=seed)
    query = query[query.obs["cell_type"].isin(types).to_numpy()].copy()
    return float((annotate(model, query, reject="off").labels == query.obs["cell_type"].astype(str)).mean())


def test_an_update_without_a_bank_learns_and_forgets_nothing(model: Annotator, updated: Annotator) -> None:
    assert updated.types.names == (*TYPES[:4], "acinar", "ductal") or set(updated.types.names) == set(TYPES[:6])
    assert right(updated, ["alpha", "beta", "gamma"]) >= right(model, ["alpha", "beta", "gamma"]) - 0.02
    assert right(updated, ["acinar", "ductal"]) > 0.6  # in another study than the one that taught them
    assert right(updated, ["delta"]) > 0.9


def test_rows_of_types_without_cells_stay_bit_equal(model: Annotator, updated: Annotator) -> None:
    old, new = model.linear, updated.linear
    assert old is not None
    assert new is not None
    for name in ("alpha", "beta", "gamma"):
        code = model.types.code(name)
        np.testing.assert_array_equal(new.weight[: len(old.weight), code], old.weight[:, code])
        assert new.bias[code] == old.bias[code]
    assert not np.array_equal(
        new.weight[: len(old.weight), model.types.code("delta")], old.weight[:, model.types.code("delta")]
    )


def test_made_up_cells_are_what_keeps_old_types(model: Annotator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them a type that is taught alone takes all cells, so they are not there in vain."""
    new = synthetic_cells(240, n_types=6, seed=3)
    new = new[(new.obs["cell_type"] == "ductal").to_numpy()].copy()
    mapping = {"ductal": "ductal"}
    kept = update(model, new, mapping=mapping, shown=False)
    assert right(kept, ["alpha", "beta", "gamma", "delta"]) > 0.9
    for name in ("LEAST", "MOST", "DRAWN"):
        monkeypatch.setattr(f"evercell.updating.linear.{name}", 0)
    lost = update(model, new, mapping=mapping, shown=False)
    assert right(lost, ["alpha", "beta", "gamma", "delta"]) < 0.3


def test_the_update_is_a_model_that_is_stored_and_updated_again(
    model: Annotator, updated: Annotator, tmp_path: Path
) -> None:
    before = replace(model).fingerprint
    again = load(save(updated, tmp_path / "model"))
    assert again.fingerprint == updated.fingerprint
    assert again.linear_only
    facts = again.ledger.stages[-1].facts
    assert (facts["strategy"], facts["asked"]) == ("linear", "linear")
    assert "transformer" not in facts["metrics"]
    assert again.rejector is not None
    assert np.isfinite(again.rejector.threshold(0.01))  # held-out cells have set it
    more = synthetic_cells(120, n_types=4, seed=7)
    third = update(again, more, shown=False)
    assert len(third.ledger) == 3
    assert facts["sealed"]["stages"].keys() == {"2"}
    assert right(third, ["acinar", "ductal"]) > 0.7
    assert right(third, ["alpha", "beta", "gamma"]) > 0.9
    assert replace(model).fingerprint == before  # invariant 3


def test_the_seed_decides_the_update(model: Annotator, updated: Annotator) -> None:
    new = synthetic_cells(180, n_types=6, n_genes=320, seed=3)
    new = new[new.obs["cell_type"].isin(["delta", "acinar", "ductal"]).to_numpy()].copy()
    again = update(model, new, mapping={"acinar": "acinar", "ductal": "ductal"}, shown=False)
    assert again.fingerprint == updated.fingerprint


def test_a_query_that_lacks_genes_does_not_have_the_member_fitted_again(updated: Annotator) -> None:
    """There is no cell of most types: a fit on the bank would forbid them."""
    query = synthetic_cells(200, n_types=6, seed=5)[:, ::2].copy()
    result = annotate(updated, query, reject="off")
    assert not result.info["adapted"]
    alone = query.obs["cell_type"].isin(["alpha", "beta", "gamma"]).to_numpy()
    assert (result.labels == query.obs["cell_type"].astype(str))[alone].mean() > 0.8


def test_the_strategy_is_not_for_other_models() -> None:
    from evercell.finetuning import quick_settings, train

    ordinary = train(synthetic_cells(120, seed=1), settings=quick_settings(), shown=False)
    with pytest.raises(SettingsError, match="no strategy `linear`"):
        update(ordinary, synthetic_cells(60, seed=2), strategy="linear", shown=False)


# --- the command line


def test_the_commands_import_annotate_and_update(run: Run, pickled: Path, tmp_path: Path) -> None:
    code, out, err = run("import", "celltypist", pickled, "--output", tmp_path / "model")
    assert code == 2
    assert "--trust-pickle" in err
    assert not (tmp_path / "model").exists()
    code, out, err = run("import", "celltypist", pickled, "--trust-pickle", "--output", tmp_path / "model")
    assert code == 0, err
    assert "4 cell types" in out
    assert "warning:" in err
    assert "No cell is called Unknown" in (tmp_path / "model" / "MODEL_CARD.md").read_text()
    query = synthetic_cells(60, seed=2)
    query.write_h5ad(tmp_path / "query.h5ad")
    words = ("--model", tmp_path / "model", "--output", tmp_path / "annotated.h5ad")
    assert run("annotate", tmp_path / "query.h5ad", *words)[0] == 0
    code, out, err = run(
        "update", tmp_path / "model", tmp_path / "query.h5ad", "--labels", "cell_type", "--output", tmp_path / "second"
    )
    assert code == 0, err
    assert "linear member alone" in err
    assert "fell" not in err
    assert run("log", tmp_path / "second")[0] == 0
    assert run("verify", tmp_path / "second")[0] == 0
