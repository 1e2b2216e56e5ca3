"""Updates: what is learnt, what is kept, what the gate lets through."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from anndata import AnnData

from evercell.annotation import annotate
from evercell.annotator import Annotator
from evercell.backbones import BACKBONES
from evercell.checkpoint import load, revert, save, stages_kept
from evercell.classification import Batch
from evercell.errors import GateError, LabelsError, ModelError, SettingsError
from evercell.examples import load_example
from evercell.finetuning import quick_settings, train
from evercell.testing import synthetic_cells
from evercell.tokenizers import View
from evercell.training import TrainingSettings
from evercell.training_cells import TrainingCells, gather, read_study
from evercell.updating import STRATEGIES, StageContext, Strategy, UpdateSettings
from evercell.updating.gate import ALL, RARE, tried_on_sealed
from evercell.updating.growth import grown
from evercell.updating.update import _attempts, update, without_sealed

SMALL = UpdateSettings(
    training=TrainingSettings(samples=1280, batch_size=32, learning_rate=3e-3, evaluations=2), refit=False
)
NEW_TYPES = ("acinar", "ductal", "endothelial")
OWN_NAMES = {name: name for name in NEW_TYPES}


def only(cells: AnnData, *types: str) -> AnnData:
    return cells[cells.obs["cell_type"].isin(types).to_numpy()].copy()


@pytest.fixture(scope="module")
def old() -> Annotator:
    return train(synthetic_cells(600, seed=1), settings=quick_settings())


@pytest.fixture(scope="module")
def new() -> AnnData:
    """Cells of new types alone."""
    return only(synthetic_cells(350, n_types=7, n_genes=330, seed=2), *NEW_TYPES)


def facts_of(model: Annotator) -> dict[str, object]:
    return dict(model.ledger.stages[-1].facts)


# --- gate


def test_the_gate_stops_a_model_that_forgets_and_takes_the_safer_setting(old: Annotator, new: AnnData) -> None:
    """A naive update on types of their own forgets all others; `analytic` does not."""
    model = update(old, new, strategy="naive", mapping=OWN_NAMES, settings=SMALL)
    facts = facts_of(model)
    naive, analytic = facts["tries"]  # type: ignore[misc]
    assert (naive["strategy"], naive["holds"]) == ("naive", False)
    assert ALL in naive["fallen"]
    assert naive["types"][ALL]["before"] > 0.9
    assert naive["types"][ALL]["after"] < 0.3
    assert (analytic["strategy"], analytic["holds"], analytic["fallen"]) == ("analytic", True, [])
    assert (facts["strategy"], facts["asked"]) == ("analytic", "naive")
    assert model.vocabulary == old.vocabulary  # what `naive` would have added of genes is gone again
    assert model.sealed is not None
    assert model.sealed.counts.shape[1] == model.bank.counts.shape[1] == len(model.vocabulary)
    query = synthetic_cells(210, n_types=7, seed=4)
    found = annotate(model, query, reject="off").best_labels
    assert (found == query.obs["cell_type"].astype(str)).mean() > 0.85


@pytest.mark.parametrize("strategy", ["canal", "replay"])
def test_replay_passes_the_gate(old: Annotator, new: AnnData, strategy: str) -> None:
    model = update(old, new, strategy=strategy, mapping=OWN_NAMES, settings=SMALL)
    (tried,) = facts_of(model)["tries"]  # type: ignore[misc]
    assert tried["holds"]
    assert facts_of(model)["strategy"] == strategy
    sealed = facts_of(model)["sealed"]["stages"]  # type: ignore[index]
    assert min(sealed.values()) > 0.9


@pytest.mark.parametrize(("stages", "replays"), [(1, [0.4, 0.8, 0.4]), (4, [0.4, 0.4])])
def test_a_try_that_would_be_the_same_training_is_left_out(old: Annotator, stages: int, replays: list[float]) -> None:
    """A bank of four earlier stages has four fifths of the draws, the most that is tried."""
    bank = replace(old.bank, stages=1 + np.arange(len(old.bank)) % stages)
    tries = _attempts(replace(old, bank=bank), "canal", SMALL, force=False)
    assert [settings.replay for _, settings in tries] == replays
    assert tries[-1][0] == "analytic"


def test_force_publishes_what_was_asked_for(old: Annotator, new: AnnData) -> None:
    facts = facts_of(update(old, new, strategy="naive", mapping=OWN_NAMES, settings=SMALL, force=True))
    (tried,) = facts["tries"]  # type: ignore[misc]
    assert (facts["strategy"], facts["forced"], tried["holds"]) == ("naive", True, False)


def test_where_nothing_holds_an_error_says_what_fell(
    old: Annotator, new: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "evercell.updating.update._attempts", lambda _, strategy, settings, force: [("naive", settings)] * 2
    )
    with pytest.raises(
        GateError, match=r"`all old types` from (1\.000|0\.9\d+) to 0\.\d+ \(\d+ sealed cells\)"
    ) as told:
        update(old, new, strategy="naive", mapping=OWN_NAMES, settings=SMALL)
    assert "--force" in str(told.value.hint)


def test_what_counts_as_a_fall(old: Annotator) -> None:
    """Types with enough sealed cells alone, rarer ones together; four cells may be chance."""
    assert old.sealed is not None
    assert tried_on_sealed(old, old, tolerance=0.0).holds
    right = old.outputs(View.whole(old.sealed.counts)).codes == old.sealed.codes
    sizes = np.bincount(old.sealed.codes[right], minlength=4)

    def with_wrong(wrong: int, most: int) -> Annotator:
        """The old model told of other truths: the first `wrong` right cells of type 0 count as type 1 for the new."""
        rows = np.flatnonzero(right & (old.sealed.codes == 0))[:wrong]  # type: ignore[union-attr]
        assert len(rows) == min(wrong, most)
        return _Mistaken(old, rows)  # type: ignore[return-value]

    verdict = tried_on_sealed(old, with_wrong(4, sizes[0]), tolerance=0.0)
    assert verdict.holds
    verdict = tried_on_sealed(old, with_wrong(5, sizes[0]), tolerance=0.0)
    assert verdict.fallen == (ALL,)  # every type has fewer than 20 sealed cells here
    assert RARE not in verdict.rows  # these would be the same cells
    assert verdict.rows["alpha"]["after"] < verdict.rows["alpha"]["before"]
    assert tried_on_sealed(old, with_wrong(5, sizes[0]), tolerance=0.5).holds


class _Mistaken:
    """A model that is wrong on some rows."""

    def __init__(self, model: Annotator, rows: np.ndarray) -> None:
        self.model, self.rows, self.vocabulary = model, rows, model.vocabulary

    def outputs(self, view: View) -> object:
        outputs = self.model.outputs(view)
        log_proba = outputs.log_proba.copy()
        log_proba[self.rows] = np.roll(log_proba[self.rows], 1, axis=1)
        return replace(outputs, log_proba=log_proba)


# --- analytic


def test_analytic_in_two_orders_is_the_head_of_joint_training(old: Annotator, new: AnnData) -> None:
    """Equal to 1e-5: the backbone is the same, and sums do not care for order."""
    settings = replace(SMALL, sealed=0, refit=True)
    one, two = only(new, "acinar", "ductal"), only(synthetic_cells(350, n_types=7, seed=3), "ductal", "endothelial")
    keywords = {"strategy": "analytic", "settings": settings, "force": True}

    def heads_of(*stages: list[AnnData]) -> dict[str, np.ndarray]:
        model = old
        for data in stages:
            held = {str(name) for adata in data for name in adata.obs["cell_type"].unique()}
            mapping = {name: name for name in NEW_TYPES if name in held}
            model = update(model, data, mapping=mapping, **keywords)  # type: ignore[arg-type]
        weight, bias = (part.detach().numpy() for part in (model.head.classifier.weight, model.head.classifier.bias))
        return {name: np.append(weight[code], bias[code]) for code, name in enumerate(model.types.names)}

    joint = heads_of([one, two])
    for found in (heads_of([one], [two]), heads_of([two], [one])):
        assert found.keys() == joint.keys()
        for name, row in found.items():
            np.testing.assert_allclose(row, joint[name], rtol=1e-5, atol=1e-5)


def test_analytic_leaves_the_backbone_as_it_is(old: Annotator, new: AnnData) -> None:
    more = synthetic_cells(200, n_types=5, n_genes=330, seed=6)
    model = update(old, more, strategy="analytic", mapping={"acinar": "acinar"}, settings=SMALL)
    assert model.vocabulary == old.vocabulary
    one, other = old.backbone.state_dict(), model.backbone.state_dict()
    assert all(bool((one[name] == other[name]).all()) for name in one)


# --- what strategies train and hold on to


def stage_of(old: Annotator, new: AnnData, name: str) -> tuple[Strategy, StageContext, Batch]:
    """A strategy that has begun, its stage, and a batch of cells as the untrained new model sees them."""
    study = read_study(new, "cell_type")
    types = old.types.extended(NEW_TYPES, 2)
    cells = gather([study], old.vocabulary, types)
    model = grown(old, types, old.vocabulary, seed=0)
    stage = StageContext(old.frozen_copy(), model, cells, old.bank, None, SMALL, 0)
    strategy = STRATEGIES[name]()
    strategy.begin(stage)
    return strategy, stage, batch_of(stage)


def batch_of(stage: StageContext) -> Batch:
    rows = np.arange(8)
    view = View.whole(stage.cells.counts[rows])
    model = stage.model
    representation = model.backbone(model.tokenizer.tokenize(view))
    return Batch(rows, view, representation, model.head.member_logits(representation, model.backbone.members))


@pytest.mark.parametrize("name", ["canal", "lwf", "ewc"])
def test_a_penalty_is_nothing_until_the_model_moves(old: Annotator, new: AnnData, name: str) -> None:
    strategy, stage, batch = stage_of(old, new, name)
    at_first = strategy.penalty(stage, batch)
    assert at_first is not None
    assert at_first.item() == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():
        for weight in (*stage.model.backbone.last_layers()[-1].parameters(), *stage.model.head.parameters()):
            weight.mul_(1.5)
    moved = strategy.penalty(stage, batch_of(stage))
    assert moved is not None
    assert moved.item() > 1e-3
    assert moved.requires_grad


def test_a_bank_that_is_large_enough_keeps_every_cell_it_had(old: Annotator, new: AnnData) -> None:
    """Those too that were looked at to stop early."""
    model = update(old, new, mapping=OWN_NAMES, settings=SMALL, bank_size=5000, force=True)
    assert (model.bank.stages == 1).sum() == len(old.bank)
    assert (model.bank.codes[model.bank.stages == 1] == old.bank.codes).all()


def test_replay_draws_the_share_of_the_earlier_stages_or_more_if_asked(old: Annotator, new: AnnData) -> None:
    strategy, stage, _ = stage_of(old, new, "replay")
    for stages, asked, share in ((1, 0.4, 1 / 2), (3, 0.4, 3 / 4), (3, 0.8, 0.8)):
        bank = replace(stage.bank, stages=1 + np.arange(len(stage.bank)) % stages)
        one = replace(stage, bank=bank, settings=replace(SMALL, replay=asked))
        drawn = strategy.training_cells(one)
        again = drawn.weights[: len(bank)]
        assert drawn.weights.sum() == pytest.approx(1.0)
        assert again.sum() == pytest.approx(share)
        for code in range(4):
            for number in range(1, stages + 1):
                kind = (bank.codes == code) & (bank.stages == number)
                assert again[kind].sum() == pytest.approx(share / (4 * stages))
    for name in ("naive", "lwf", "ewc"):
        strategy, stage, _ = stage_of(old, new, name)
        assert len(strategy.training_cells(stage).cells) == new.n_obs


def test_canal_as_published_trains_the_last_block_norms_and_head_of_every_member(old: Annotator, new: AnnData) -> None:
    one_study = new[:, :300].copy()  # no new genes
    model = update(old, one_study, mapping=OWN_NAMES, settings=replace(SMALL, trained="last layers"), force=True)
    before, after = old.backbone.state_dict(), model.backbone.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    members = {name.split(".")[2] for name in changed if name.startswith("blocks.")}
    assert members == {"0", "1"}
    last = f"blocks.{len(old.backbone.blocks) - 1}."
    assert changed
    assert all("norm" in name or name.startswith(last) for name in changed)
    assert any(name == "final_norm.weight" for name in changed)
    every = update(old, one_study, mapping=OWN_NAMES, settings=SMALL, force=True).backbone
    assert not torch.equal(every.gene_embedding.weight, old.backbone.gene_embedding.weight)


# --- labels, genes, cells


def test_labels_by_another_name_are_settled_before_training(old: Annotator) -> None:
    cells = synthetic_cells(200, seed=5)
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str).replace({"beta": "B-like", "alpha": "Alpha cells"})
    with pytest.raises(LabelsError, match=r"1 label must be settled .*`B-like` on `beta`"):
        update(old, cells, settings=SMALL)
    accepted = update(old, cells, settings=SMALL, accept_proposals=True)
    assert accepted.types.names == old.types.names
    rows = {row["label"]: row for row in facts_of(accepted)["labels"]}  # type: ignore[attr-defined]
    assert (rows["B-like"]["finding"], rows["B-like"]["to"]) == ("rename", "beta")
    assert (rows["Alpha cells"]["to"], rows["Alpha cells"]["by"]) == ("alpha", "plural")
    mapped = update(old, cells, settings=SMALL, mapping={"B-like": "beta"})
    assert mapped.types.names == old.types.names
    kept = update(old, cells, settings=SMALL, mapping={"B-like": "B-like"}, force=True)
    assert kept.types.names == (*old.types.names, "B-like")
    with pytest.raises(LabelsError, match="the mapping names `T-like`"):
        update(old, cells, settings=SMALL, mapping={"T-like": "beta"})


def test_a_coarser_label_gives_its_cells_the_finer_types(old: Annotator) -> None:
    cells = synthetic_cells(200, seed=5)
    fine = cells.obs["cell_type"].astype(str)
    cells.obs["cell_type"] = fine.replace({"beta": "hormonal", "alpha": "hormonal"})
    with pytest.raises(LabelsError, match="a coarser name for them"):
        update(old, cells, settings=SMALL)
    model = update(old, cells, settings=SMALL, accept_proposals=True)
    assert model.types.names == old.types.names
    second = np.bincount(model.bank.codes[model.bank.stages == 2], minlength=4)
    assert (second > 0).all()


def test_new_genes_are_learnt_behind_the_old_ones(old: Annotator) -> None:
    cells = synthetic_cells(240, n_genes=400, n_types=5, seed=6)
    model = update(old, cells, mapping={"acinar": "acinar"}, settings=replace(SMALL, trained="last layers"))
    n_old = len(old.vocabulary)
    assert facts_of(model)["genes_added"] == len(model.vocabulary) - n_old > 50
    assert model.linear is not None
    assert np.abs(model.linear.weight[n_old:]).max() > 0
    embedding, before = model.backbone.gene_embedding.weight, old.backbone.gene_embedding.weight
    assert bool((embedding[:n_old] == before).all())  # the rows of new genes only
    start = grown(old, model.types, model.vocabulary, seed=0).backbone.gene_embedding.weight
    assert not bool((embedding[n_old:] == start[n_old:]).all())
    assert update(old, cells, mapping={"acinar": "acinar"}, settings=replace(SMALL, new_genes=False)).vocabulary == (
        old.vocabulary
    )


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_a_grown_model_says_of_old_genes_what_it_said(backbone: str) -> None:
    sizes = {"latent": {"member_width": 8, "n_latents": 2, "depth": 1}}.get(
        backbone, {"width": 16, "depth": 1, "n_heads": 2}
    )
    settings = replace(
        quick_settings(), backbone=backbone, backbone_settings=sizes, linear=False, refit=False,
        training=TrainingSettings(samples=64, batch_size=32),
    )  # fmt: skip
    cells = synthetic_cells(120, n_genes=120, seed=1)
    old = train(cells, settings=settings)
    wider = old.vocabulary.extended(["ENSG1", "ENSG2", "ENSG3"])
    new = grown(old, old.types.extended(["mast"], 2), wider, seed=0)
    counts = old.bank.counts
    representation, logits = old.represent(View.whole(counts))
    again, more = new.represent(View.whole(old.bank.widened(len(wider)).counts))
    np.testing.assert_allclose(again, representation, atol=1e-6)
    np.testing.assert_allclose(more[:, :4], logits, atol=1e-6)
    new_cells = synthetic_cells(100, n_genes=150, n_types=5, seed=2)
    made = update(
        old, new_cells, mapping={"acinar": "acinar"}, accept_proposals=True, force=True,
        settings=replace(SMALL, training=TrainingSettings(samples=64, batch_size=32)),
    )  # fmt: skip
    assert len(made.types) == 5


def test_cells_of_one_type_are_enough(old: Annotator, new: AnnData) -> None:
    model = update(old, only(new, "acinar"), mapping={"acinar": "acinar"}, settings=SMALL)
    assert model.types.names == (*old.types.names, "acinar")
    assert facts_of(model)["tries"][-1]["holds"]  # type: ignore[index]


def test_sealed_cells_that_come_again_are_left_out(old: Annotator) -> None:
    assert old.sealed is not None
    first = synthetic_cells(600, seed=1)  # the very cells of stage 1
    model = update(old, first, settings=SMALL)
    pool = {row.tobytes() for row in old.sealed.counts.toarray()}
    assert not pool & {row.tobytes() for row in model.bank.counts[:, : len(old.vocabulary)].toarray()}
    cells = TrainingCells(old.sealed.counts, old.sealed.codes, old.sealed.studies, old.sealed.measured, None)
    assert len(without_sealed(cells, old.sealed)) == 0
    assert len(without_sealed(cells, None)) == len(cells)


def test_joint_needs_the_earlier_data(old: Annotator, new: AnnData) -> None:
    with pytest.raises(SettingsError, match="those of earlier stages were not given"):
        update(old, new, strategy="joint", mapping=OWN_NAMES, settings=SMALL)


def test_what_cannot_be_updated_or_chosen_is_told(old: Annotator, new: AnnData) -> None:
    with pytest.raises(SettingsError, match="no strategy `magic`"):
        update(old, new, strategy="magic")
    with pytest.raises(SettingsError, match="2 data sets with 1 names"):
        update(old, [new, new], names=["one"])
    for wrong in ({"replay": 1.0}, {"held_out": 0.0}, {"selection": "best"}, {"balance": "so-so"}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            UpdateSettings(**wrong)  # type: ignore[arg-type]


# --- stages of a model directory


def test_an_updated_directory_keeps_its_earlier_stages(old: Annotator, new: AnnData, tmp_path: Path) -> None:
    folder = tmp_path
    save(old, folder / "one", card="first")
    second = update(old, only(new, "acinar", "ductal"), strategy="analytic", settings=SMALL,
                    mapping={"acinar": "acinar", "ductal": "ductal"})  # fmt: skip
    save(second, folder / "two", previous=folder / "one")
    third = update(second, synthetic_cells(120, seed=8), strategy="analytic", settings=SMALL)
    save(third, folder / "three", previous=folder / "two")
    assert [stages_kept(folder / name) for name in ("one", "two", "three")] == [[], [1], [1, 2]]
    back = revert(folder / "three", 2, folder / "back")
    assert back.fingerprint == load(folder / "back").fingerprint == second.fingerprint
    assert stages_kept(folder / "back") == [1]
    revert(folder / "three", 1, folder / "first")
    assert load(folder / "first").fingerprint == old.fingerprint
    assert (folder / "first" / "MODEL_CARD.md").read_text() == "first"
    with pytest.raises(ModelError, match="does not keep stage 3; earlier stages kept: 1, 2"):
        revert(folder / "three", 3, folder / "no")
    assert not (folder / "no").exists()
    save(third, folder / "two", previous=folder / "two", overwrite=True)
    assert stages_kept(folder / "two") == [1, 2]  # in place


# --- real cells


def test_real_pancreas_learns_a_type_of_the_next_study() -> None:
    """Baron, then Fasolino with endothelial cells: they are learnt, nothing falls, as it is for a study never seen."""
    old = train(load_example("baron_stage1"), groups="donor", settings=replace(quick_settings(), refit=False))
    settings = replace(SMALL, training=TrainingSettings(samples=1920, batch_size=64, learning_rate=3e-3, evaluations=3))
    model = update(
        old,
        load_example("fasolino_stage2"),
        groups="donor",
        settings=settings,
        mapping={"stellate": "stellate", "endothelial": "endothelial"},
    )
    facts = facts_of(model)
    assert facts["types_added"] == ["endothelial", "stellate"]
    assert facts["tries"][-1]["holds"]  # type: ignore[index]
    unseen = load_example("muraro_stage3")
    truth = unseen.obs["cell_type"].astype(str)
    before, after = (annotate(one, unseen, reject="off").best_labels == truth for one in (old, model))
    shared = truth.isin(old.types.names)
    assert after[shared].mean() > before[shared].mean() - 0.05
    if (truth == "endothelial").any():
        assert after[truth == "endothelial"].mean() > 0.5
