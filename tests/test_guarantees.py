"""Label sets, their common parents, false discoveries among unknown cells, thresholds for studies not learnt yet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad

import evercell as ec
from evercell.annotation import annotate
from evercell.annotator import Annotator
from evercell.celltypes import CellTypes
from evercell.checkpoint import load, save
from evercell.errors import ModelError, SettingsError
from evercell.examples import load_example
from evercell.finetuning import quick_settings
from evercell.label_sets import LabelSets, lineages, set_names
from evercell.label_store import read_labels
from evercell.rejection import REJECTORS, Outputs
from evercell.rejection.confidence import ConfidenceRejector
from evercell.streaming import annotated
from evercell.testing import synthetic_cells

TYPES = CellTypes(("cd4_t", "cd8_t", "b", "cluster 7"))


@pytest.fixture(scope="module")
def model() -> Annotator:
    """Of packaged pancreas cells."""
    cells = load_example("baron_stage1")
    return ec.train(cells, "cell_type", groups="donor", settings=quick_settings(), shown=False)


@pytest.fixture(scope="module")
def query() -> AnnData:
    """Cells of another study."""
    return load_example("tritschler_unseen")


def drawn(n_cells: int, n_types: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of cells of types that a poor model tells apart, and the types."""
    codes = rng.integers(0, n_types, n_cells)
    logits = rng.normal(size=(n_cells, n_types)) * np.linspace(0.5, 2, n_types)[codes][:, None]
    logits[np.arange(n_cells), codes] += 1.5
    found: np.ndarray = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return found, codes


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_sets_hold_the_right_type_as_often_as_promised_for_each_type(rate: float) -> None:
    """Over many calibrations: the promise is one on the mean. The last type is hard and has the largest sets."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        sets = LabelSets.calibrated(*drawn(400, 4, rng), 4)
        log_proba, codes = drawn(400, 4, rng)
        right = sets.members(log_proba, rate)[np.arange(400), codes]
        covered.append([right[codes == code].mean() for code in range(4)])
    mean, error = np.mean(covered, axis=0), np.std(covered, axis=0) / np.sqrt(200)
    assert (mean + 3 * error >= 1 - rate).all()
    # The most probable type is always in, so an easy type may be covered more often; a hard one must not be by much.
    assert mean[3] < 1 - rate + 0.03 or rate > 0.2


def test_thresholds_are_the_order_statistics_of_conformal_prediction() -> None:
    """Ten cells of one type with surprises 1 to 10: at 20 % the ninth smallest, ceil(11 * 0.8); at 10 % the tenth."""
    surprise = np.arange(1.0, 11.0)
    log_proba = np.column_stack([-surprise, -1.0 / surprise])
    sets = LabelSets.calibrated(log_proba, np.zeros(10, dtype=int), 2)
    assert sets.thresholds(0.2)[0] == 9.0
    assert sets.thresholds(0.1)[0] == 10.0
    assert sets.conditional(0.1)[0] and not sets.conditional(0.05)[0]  # 5 % would take the eleventh of ten
    assert not sets.conditional(0.1)[1]
    assert sets.thresholds(0.1)[1] == 10.0  # a type without cells takes the threshold of all cells


def test_a_set_is_never_empty_and_grows_with_certainty() -> None:
    rng = np.random.default_rng(1)
    sets = LabelSets.calibrated(*drawn(300, 4, rng), 4)
    log_proba, _ = drawn(200, 4, rng)
    loose, strict = sets.members(log_proba, 0.5), sets.members(log_proba, 0.05)
    assert loose[np.arange(200), log_proba.argmax(axis=1)].all()
    assert (strict | ~loose).all() and strict.sum() > loose.sum()


def test_common_parents_of_sets() -> None:
    members = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1]], dtype=bool)
    assert set_names(members, TYPES)[1] == "cd4_t | cd8_t"
    found = lineages(members, TYPES)
    assert found[0] == ("cd4_t", "CL:0000624")
    assert found[1] == ("mature alpha-beta T cell", "CL:0000791")
    assert found[2][0] == "lymphocyte"
    assert found[3] == ("cell", "CL:0000000")  # one of them has no place in the ontology
    assert found[4] == ("cluster 7", "")


def test_annotate_writes_sets_of_real_cells(model: Annotator, query: AnnData) -> None:
    result = annotate(model, query, sets=0.02, reject="off")
    sets = [str(one).split(" | ") for one in result.obs["evercell_set"]]
    assert all(label in one for label, one in zip(result.labels, sets, strict=True))
    single = np.array([len(one) == 1 for one in sets])
    lineage = result.obs["evercell_lineage"].astype(str).to_numpy()
    assert single.any() and not single.all()
    assert (lineage[single] == result.labels[single]).all()
    assert not np.isin(lineage[~single], model.types.names).any()
    truth = query.obs["cell_type"].astype(str)
    known = truth.isin(model.types.names).to_numpy()
    covered = [name in one for name, one in zip(truth, sets, strict=True)]
    assert np.mean(np.array(covered)[known]) > 0.9
    assert result.info["set_error_rate"] == 0.02
    smaller = annotate(model, query, sets=0.5, reject="off").obs["evercell_set"].astype(str)
    assert np.mean([len(one.split(" | ")) for one in smaller]) < np.mean([len(one) for one in sets])


def test_a_rejected_cell_keeps_its_set_and_has_no_lineage(model: Annotator, query: AnnData) -> None:
    obs = annotate(model, query, sets=0.1, reject=0.9).obs
    unknown = obs["evercell"] == "Unknown"
    assert unknown.any()
    assert (obs["evercell_lineage"][unknown] == "Unknown").all()
    assert (obs["evercell_lineage_ontology_term_id"][unknown] == "").all()
    assert (obs["evercell_set"][unknown].astype(str) != "").all()


def test_sets_depend_on_the_cell_alone_and_come_out_of_a_file_alike(
    model: Annotator, query: AnnData, tmp_path: Path
) -> None:
    """Invariant 1, and streaming; the q-values are of the whole file."""
    whole = annotate(model, query, sets=0.1, unknown_q=True).obs
    some = annotate(model, query[::3].copy(), sets=0.1).obs
    columns = ["evercell_set", "evercell_lineage", "evercell_lineage_ontology_term_id"]
    pd.testing.assert_frame_equal(whole[columns][::3].astype(str), some[columns].astype(str))
    query.write_h5ad(tmp_path / "query.h5ad")
    cells = ec.read_cells(tmp_path / "query.h5ad", backed=True)
    with annotated(
        model, cells, tmp_path / "query.h5ad", tmp_path / "out.csv", arrays=False, sets=0.1, unknown_q=True, chunk=100
    ) as result:
        pd.testing.assert_frame_equal(result.obs, whole)


def test_a_model_of_a_hundred_types_packs_its_sets() -> None:
    """More types than bits in a byte; the last ones are where packing would err."""
    from evercell.labelling import Verdicts, table

    names = tuple(f"type {n}" for n in range(101))
    members = np.zeros((2, 101), dtype=bool)
    members[0, [3, 100]] = members[1, [99]] = True
    verdicts = Verdicts(np.array([3, 99]), np.zeros(2, bool), np.ones(2), np.zeros(2), np.packbits(members, axis=1))
    model = ec.train(synthetic_cells(200, seed=0), groups="donor", settings=quick_settings(), shown=False)
    obs = table(replace(model, types=CellTypes(names)), verdicts, pd.Index(["a", "b"]), "evercell")
    assert list(obs["evercell_set"].astype(str)) == ["type 3 | type 100", "type 99"]


def test_sets_are_stored_and_updated(model: Annotator, tmp_path: Path) -> None:
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.sets is not None and model.sets is not None
    for name, array in model.sets.arrays().items():
        np.testing.assert_array_equal(again.sets.arrays()[name], array)
    new = load_example("muraro_stage3")
    new = new[~new.obs["cell_type"].isin(["stellate"])].copy()
    taught = ec.update(model, new, "cell_type", groups="donor", force=True, settings=quick_update(), shown=False)
    assert taught.sets is not None
    assert taught.sets.quantiles.shape[0] == len(taught.types)
    facts = taught.ledger.stages[-1].facts["unlearnt"]
    assert facts[0]["cells"] == new.n_obs and facts[0]["right"] > 50
    moves = [1.5, max(facts[0]["move"], 0.0)]
    assert taught.rejector is not None
    assert taught.rejector.allowance == pytest.approx(np.median(moves), abs=1e-5)


def quick_update() -> ec.UpdateSettings:
    """A short training."""
    return ec.UpdateSettings(training=replace(quick_settings().training, samples=1600))


def test_what_cannot_be_asked_for_is_told(model: Annotator, query: AnnData) -> None:
    with pytest.raises(SettingsError, match=r"sets is `1\.5`"):
        annotate(model, query, sets=1.5)
    with pytest.raises(ModelError, match="from which label sets are made"):
        annotate(replace(model, sets=None), query, sets=0.1)
    assert model.rejector is not None
    arrays = {name: one for name, one in model.rejector.arrays.items() if name != "known_medians"}
    with pytest.raises(ModelError, match="false-discovery rate"):
        annotate(replace(model, rejector=type(model.rejector)(arrays)), query, unknown_q=True)


def outputs(score: np.ndarray) -> Outputs:
    """Cells of one of two types with confidences that give these scores."""
    log_proba = np.log(np.column_stack([1 - score, score]))
    return Outputs(np.zeros((len(score), 1), np.float32), np.zeros((len(score), 2), np.float32), log_proba)


def test_false_discoveries_are_controlled_when_all_known_cells_are_shifted() -> None:
    """Known cells of the query score higher by 0.1, a tenth of the cells are unknown and score higher by 0.25."""
    from scipy.stats import false_discovery_control

    rng = np.random.default_rng(0)
    rejector = ConfidenceRejector.fitted(outputs(rng.uniform(0, 0.2, 10)), np.zeros(10, int))
    rejector = rejector.calibrated(outputs(rng.uniform(0.0, 0.1, 4000)))
    false, found = [], []
    for _ in range(50):
        known, unknown = rng.uniform(0.1, 0.2, 900), rng.uniform(0.25, 0.4, 100)
        score = np.concatenate([known, unknown])
        called = false_discovery_control(rejector.p_values(score, np.zeros(1000, int))) <= 0.1
        false.append(called[:900].sum() / max(called.sum(), 1))
        found.append(called[900:].mean())
    assert np.mean(false) <= 0.1
    assert np.mean(found) > 0.5
    without = (np.sum(score[:900] > rejector.threshold(0.02))) / 900
    assert without == 1.0  # the threshold alone would call all of them unknown


def test_cells_like_the_held_out_ones_give_even_p_values(model: Annotator) -> None:
    rng = np.random.default_rng(0)
    rejector = ConfidenceRejector.fitted(outputs(rng.uniform(0, 0.2, 10)), np.zeros(10, int))
    rejector = rejector.calibrated(outputs(rng.uniform(0, 0.4, 3000)))
    p = rejector.p_values(rng.uniform(0, 0.4, 3000), np.zeros(3000, int))
    for share in (0.01, 0.1, 0.5):
        assert (p <= share).mean() == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("name", sorted(REJECTORS))
def test_an_allowance_is_stored_and_moves_thresholds_alone(name: str) -> None:
    rng = np.random.default_rng(0)
    if not REJECTORS[name].per_cell or name in ("markers", "combined"):
        pytest.skip("takes more than confidences; the model of real cells above has it")
    rejector = REJECTORS[name].fitted(outputs(rng.uniform(0, 0.2, 50)), rng.integers(0, 2, 50))
    rejector = rejector.calibrated(outputs(rng.uniform(0, 0.4, 100)))
    wider = rejector.allowing(0.7)
    assert wider.threshold(0.1) == pytest.approx(rejector.threshold(0.1) + 0.7)
    again = rejector.calibrated_as(wider)
    assert again.allowance == pytest.approx(0.7)
    np.testing.assert_array_equal(again.arrays["known_quantiles"], rejector.arrays["known_quantiles"])


def test_the_command_line_writes_sets_and_q_values(run, model: Annotator, query: AnnData, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save(model, tmp_path / "model")
    query.write_h5ad(tmp_path / "query.h5ad")
    base = ["annotate", str(tmp_path / "query.h5ad"), "--model", str(tmp_path / "model"), "--output"]
    code, _, err = run(*base, str(tmp_path / "out.h5ad"), "--sets", "0.1", "--unknown-q")
    assert code == 0, err
    obs = read_h5ad(tmp_path / "out.h5ad").obs
    assert {"evercell_set", "evercell_lineage", "evercell_unknown_q"} <= set(obs)
    assert obs["evercell_unknown_q"].between(0, 1).all()
    code, _, err = run(*base, str(tmp_path / "labels"), "--sets", "0.1")
    assert code == 0, err
    stored = read_labels(tmp_path / "labels")["evercell_set"]
    assert (stored.astype(str).to_numpy() == obs["evercell_set"].astype(str).to_numpy()).all()
    code, _, err = run(*base, str(tmp_path / "labels"), "--unknown-q")
    assert code == 2 and "--unknown-q needs all cells of one file at once" in err
    code, _, err = run(*base, str(tmp_path / "out.csv"), "--sets", "2")
    assert code == 2 and "sets is `2.0`" in err
