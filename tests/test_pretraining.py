"""Pretraining on unlabelled cells."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from sklearn.linear_model import LogisticRegression

import evercell as ec
from evercell import pretraining, pretraining_objective
from evercell.augmentation import Augmentation
from evercell.backbones import BACKBONES
from evercell.errors import CellsError, GenesError, LabelsError, ModelError, SettingsError
from evercell.finetuning import quick_settings as quick_training
from evercell.masking import Levels, MaskedExpression, Masking, mask_code, unit_bins
from evercell.pretraining import PretrainingSettings, pretrain, quick_settings
from evercell.pretraining_cells import PretrainingCells, study_shares
from evercell.pretraining_studies import cell_files, read_for_pretraining, split_studies, tissue_key
from evercell.testing import synthetic_cells
from evercell.tokenizers import TOKENIZERS, View
from evercell.tokenizers.bins import expression_bins
from evercell.training import fit


def few_steps(steps: int = 12, **changes: object) -> PretrainingSettings:
    quick = quick_settings()
    training = replace(quick.training, samples=32 * steps, batch_size=32, evaluations=3)
    return replace(quick, training=training, **changes)  # type: ignore[arg-type]


def figures(model: ec.Annotator) -> dict[str, float]:
    return model.ledger.stages[0].facts["metrics"]


@pytest.fixture(scope="module")
def studies() -> list[AnnData]:
    return [synthetic_cells(300, seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def pretrained(studies: list[AnnData]) -> ec.Annotator:
    quick = quick_settings()
    training = replace(quick.training, samples=5000, learning_rate=1e-2)
    return pretrain(studies, settings=replace(quick, training=training), names=["first", "second"])


def questions(name: str, backbone: str, **settings: object) -> tuple[Masking, View, sp.csr_matrix, object]:
    shallow = np.random.default_rng(0).binomial(synthetic_cells(40, n_genes=80, seed=3).X.toarray(), 0.05)
    counts = sp.csr_matrix(shallow.astype(np.float32))
    tokenizer = TOKENIZERS[name](**settings)
    made = BACKBONES[backbone](80, n_bins=tokenizer.n_bins)  # type: ignore[call-arg]
    return Masking(share=0.3, most=5, mask=mask_code(tokenizer, made)), View.whole(counts), counts, tokenizer


# ---- what is learnt


def test_masked_accuracy_beats_the_trivial_answers(pretrained: ec.Annotator) -> None:
    found = figures(pretrained)
    assert found["masked_accuracy"] > found["trivial_accuracy"] + 0.01
    rows = pretrained.ledger.stages[0].facts["history"]
    assert rows[-1]["held_out_loss"] < rows[0]["held_out_loss"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert found["loss"] < found["trivial_depth_loss"]


def test_what_other_genes_tell_is_learnt() -> None:
    """Half of the genes are high in one kind of cell and low in the other: gene and depth alone say nothing of it."""
    cells = synthetic_cells(300, n_genes=100, n_types=2, seed=1)
    rng = np.random.default_rng(0)
    high = (np.arange(100)[None, :] % 2) == (cells.obs["cell_type"].cat.codes.to_numpy()[:, None])
    cells.X = sp.csr_matrix(rng.poisson(np.where(high, 12.0, 0.7)))
    settings = few_steps(300, contrast=0.0)
    found = figures(
        pretrain(cells, settings=replace(settings, training=replace(settings.training, learning_rate=1e-2)))
    )
    assert max(found["trivial_accuracy"], found["trivial_depth_accuracy"]) < 0.8
    assert found["masked_accuracy"] > 0.85
    assert found["loss"] < found["trivial_depth_loss"] - 0.2


def test_representation_holds_the_types_of_an_unseen_study(pretrained: ec.Annotator) -> None:
    unseen = synthetic_cells(200, seed=9)
    states = ec.embed(pretrained, unseen)
    truth = unseen.obs["cell_type"].astype(str).to_numpy()
    probe = LogisticRegression(max_iter=500).fit(states[:100], truth[:100])
    assert probe.score(states[100:], truth[100:]) > 0.8


def test_the_trivial_answer_is_each_genes_most_frequent_bin() -> None:
    counts = sp.csr_matrix(np.array([[8, 1, 0], [8, 0, 0], [1, 8, 0]], dtype=np.float32))
    cells = PretrainingCells(("a",), (counts,), np.array([[True, True, False]]))
    bins = expression_bins(View.whole(counts))
    levels = Levels.of(cells)
    assert levels.genes[:2, 0].tolist() == [0, 1] and levels.genes[2].sum() == 0  # unmeasured is not unexpressed
    assert levels.genes[:, 1:].sum() == levels.units[:, 1:].sum() == counts.nnz
    assert levels.units[:, 0].sum() == 1
    assert levels.usual()[0] == np.bincount(bins[counts.indices == 0].astype(int)).argmax()
    of_genes, _ = levels.log_shares(1.0)
    np.testing.assert_allclose(np.exp(of_genes).sum(axis=1), 1.0)


def test_no_expressed_gene_is_below_the_bin_of_a_single_count() -> None:
    view = View.whole(sp.csr_matrix(synthetic_cells(40, n_genes=80, seed=3).X, dtype=np.float32))
    rows = np.repeat(np.arange(40), np.diff(view.counts.indptr))
    assert (expression_bins(view) >= unit_bins(view)[rows]).all()
    assert (expression_bins(view) == unit_bins(view)[rows])[view.counts.data == 1].all()


# ---- what is asked


def test_hidden_genes_leave_no_token_and_are_asked_with_their_bins() -> None:
    masking, view, counts, tokenizer = questions("values", "latent")
    question = masking.ask(view, counts, tokenizer, np.random.default_rng(0))  # type: ignore[arg-type]
    true_bins = sp.csr_matrix((expression_bins(view), counts.indices, counts.indptr), shape=counts.shape).toarray()
    asked = 0
    for cell in range(len(question.tokens)):
        seen = set(question.tokens.gene_ids[cell][question.tokens.mask[cell]].tolist())
        expressed = question.bins[cell] > 0
        hidden = question.genes[cell][expressed].tolist()
        assert len(hidden) == len(set(hidden)) <= 5
        assert not seen & set(hidden)
        assert question.bins[cell][expressed].tolist() == true_bins[cell, hidden].tolist()
        unexpressed = question.genes[cell][question.bins[cell] == 0].tolist()
        assert all(true_bins[cell, gene] == 0 for gene in unexpressed) and len(unexpressed) <= len(hidden)
        asked += len(unexpressed)
    assert asked > 40
    kept = int(question.tokens.mask.sum()) / counts.nnz
    assert kept == pytest.approx(0.7, abs=0.05)  # all hidden genes are hidden, not only those that are asked for


def test_genes_that_a_view_does_not_show_are_not_asked_as_unexpressed() -> None:
    masking, _, counts, tokenizer = questions("values", "latent")
    rng = np.random.default_rng(0)
    view = Augmentation(gene_dropout=0.9, panels=0.0).view(counts, np.ones(80, dtype=bool), rng)
    question = masking.ask(view, counts, tokenizer, rng)  # type: ignore[arg-type]
    cells, places = torch.nonzero(question.bins == 0, as_tuple=True)
    assert len(cells) and not counts.toarray()[cells.numpy(), question.genes[cells, places].numpy()].any()


@pytest.mark.parametrize("zeros", [False, True])
def test_nine_in_ten_hidden_genes_get_the_mask_bin(zeros: bool) -> None:
    masking, view, counts, tokenizer = questions("bins", "performer", zeros=zeros)
    assert masking.mask == 6
    many = replace(masking, most=80)
    question = many.ask(view, counts, tokenizer, np.random.default_rng(0))  # type: ignore[arg-type]
    tokens = question.tokens
    assert int(tokens.mask.sum()) == (counts.shape[0] * 80 if zeros else counts.nnz)
    share = float((tokens.values[tokens.mask] == 6).sum() / (question.bins >= 0).sum())
    assert share == pytest.approx(0.9, abs=0.05)
    assert bool((question.bins == 0).any()) is zeros  # without tokens of bin 0, the lack of one would tell
    plain = tokenizer.tokenize(view)  # type: ignore[attr-defined]
    unmasked = tokens.values != 6
    assert torch.equal(tokens.values[unmasked], plain.values[unmasked])


def test_contrast_is_lowest_where_views_of_a_cell_are_alike() -> None:
    backbone = BACKBONES["latent"](20, members=2, member_width=8, n_heads=2)  # type: ignore[call-arg]
    decoder = MaskedExpression(backbone, Levels(np.ones((20, 6)), np.ones((6, 6))), 1.0)
    first = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    assert decoder.contrast(first, first) < decoder.contrast(first, first.roll(1, 0))


def test_a_batch_comes_from_one_study_and_small_studies_are_drawn_more_often_than_by_size() -> None:
    class Drawn(PretrainingCells):
        def draw(self, study: int, n_cells: int, rng: np.random.Generator) -> tuple[sp.csr_matrix, np.ndarray]:
            asked.append(study)
            return super().draw(study, n_cells, rng)

    asked: list[int] = []
    counts = tuple(sp.csr_matrix(synthetic_cells(n, n_genes=60, seed=1).X) for n in (400, 25))
    cells = Drawn(("a", "b"), counts, np.ones((2, 60), dtype=bool))
    vocabulary = ec.pretrain(synthetic_cells(40, n_genes=60), settings=few_steps(1, least_cells=1)).vocabulary
    for balance, share in (("sqrt", 0.2), ("equal", 0.5), ("none", 0.06)):
        settings = few_steps(balance=balance)
        model = pretraining._new(vocabulary, settings, None, 0)
        objective = pretraining_objective.Objective(model, cells, settings, 0, torch.device("cpu"))
        rng = np.random.default_rng(0)
        asked.clear()
        with torch.no_grad():
            for _ in range(60):
                objective(rng)
        assert np.mean(asked) == pytest.approx(share, abs=0.12)


# ---- the run


def test_resumed_run_gives_the_weights_of_an_uninterrupted_one(
    studies: list[AnnData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = few_steps(12)
    whole = pretrain(studies, settings=settings, seed=4, state_folder=tmp_path / "whole")

    def interrupted(*args: object, **kwargs: object) -> object:
        on_step = kwargs.pop("on_step")

        def stop(done: int, steps: int, loss: float) -> None:
            on_step(done, steps, loss)  # type: ignore[operator]
            if done == 7:
                raise KeyboardInterrupt

        return fit(*args, on_step=stop, **kwargs)  # type: ignore[arg-type]

    folder = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(studies, settings=settings, seed=4, state_folder=folder)
    resumed = pretrain(studies, settings=settings, seed=4, state_folder=folder)
    assert resumed.fingerprint == whole.fingerprint
    assert resumed.ledger.head == whole.ledger.head

    logs = [
        [json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (tmp_path / "whole", folder)
    ]
    for log in logs:
        assert [row["step"] for row in log] == [4, 8, 12]
        for row in log:
            assert row.pop("seconds") >= 0
    assert logs[0] == logs[1]

    again = pretrain(studies, settings=settings, seed=4, state_folder=folder)  # a finished run is not trained further
    assert again.fingerprint == whole.fingerprint
    with pytest.raises(ModelError, match="other data, settings or seed"):
        pretrain(studies, settings=settings, seed=5, state_folder=folder)


def test_seed_decides_and_the_callers_random_state_stays(studies: list[AnnData]) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, two, three = (pretrain(studies, settings=few_steps(3), seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint == two.fingerprint != three.fingerprint
    assert torch.equal(torch.random.get_rng_state(), before)


def test_ledger_names_data_settings_and_figures(pretrained: ec.Annotator, studies: list[AnnData]) -> None:
    (stage,) = pretrained.ledger
    facts = stage.facts
    assert facts["verb"] == "pretrain" and facts["types_added"] == [] and facts["seed"] == 0
    assert [(one["name"], one["cells"], one["genes"]) for one in facts["data"]] == [
        ("first", 300, 300),
        ("second", 300, 300),
    ]
    assert facts["data"][0]["sha256"] != facts["data"][1]["sha256"]
    assert facts["settings"]["masked_share"] == 0.15
    assert set(facts["metrics"]) >= {"loss", "masked_accuracy", "trivial_accuracy"}
    assert len(facts["history"]) >= 4


# ---- the model


def test_saved_loaded_embedded_but_not_annotated(
    pretrained: ec.Annotator, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    ec.save(pretrained, tmp_path / "model")
    loaded = ec.load(tmp_path / "model")
    assert not [w for w in recwarn if "zero-element" in str(w.message)]
    assert loaded.fingerprint == pretrained.fingerprint
    assert len(loaded.types) == 0 and loaded.rejector is None and loaded.linear is None and len(loaded.bank) == 0
    query = synthetic_cells(30, seed=5)
    np.testing.assert_array_equal(ec.embed(loaded, query), ec.embed(pretrained, query))
    with pytest.raises(ModelError, match="no cell types"):
        ec.annotate(loaded, query)


def test_train_takes_the_pretrained_backbone_up(pretrained: ec.Annotator, tmp_path: Path) -> None:
    before = {name: array.copy() for name, array in pretrained.weights().items()}
    labelled = synthetic_cells(120, seed=6)
    settings = quick_training()
    few = replace(settings, training=replace(settings.training, samples=640), refit=False)
    model = ec.train(labelled, base=pretrained, settings=few)
    assert model.vocabulary == pretrained.vocabulary and len(model.types) == 4
    assert model.ledger.stages[0].facts["base"] == pretrained.fingerprint
    for name, array in pretrained.weights().items():
        np.testing.assert_array_equal(array, before[name])
    query = synthetic_cells(100, seed=7)
    result = ec.annotate(model, query, reject="off")
    assert (result.best_labels == query.obs["cell_type"].astype(str)).mean() > 0.8
    ec.save(model, tmp_path / "model")
    assert ec.load(tmp_path / "model").fingerprint == model.fingerprint


def test_pretraining_goes_on_from_a_base(pretrained: ec.Annotator) -> None:
    other = synthetic_cells(100, n_genes=250, seed=8)
    further = pretrain(other, base=pretrained, settings=few_steps(4, backbone="transformer"))
    assert further.vocabulary == pretrained.vocabulary and further.backbone.name == "latent"
    assert further.fingerprint != pretrained.fingerprint
    assert further.ledger.stages[0].facts["base"] == pretrained.fingerprint


@pytest.mark.parametrize("backbone", ["performer", "transformer", "latent"])
@pytest.mark.parametrize("zeros", [False, True])
def test_bins_with_every_backbone(backbone: str, zeros: bool) -> None:
    small = {"depth": 1, "n_heads": 2} | ({"member_width": 16} if backbone == "latent" else {"width": 16})
    settings = few_steps(
        3,
        tokenizer="bins",
        tokenizer_settings={"zeros": zeros},
        backbone=backbone,
        backbone_settings=small,
        contrast=0.0,
    )
    data = synthetic_cells(80, n_genes=60, seed=1)
    model = pretrain(data, settings=settings)
    assert model.tokenizer.settings == {"zeros": zeros} and model.backbone.name == backbone
    assert np.isfinite(figures(model)["loss"])
    first = pretraining._new(model.vocabulary, settings, None, 0).weights()["backbone.gene_embedding.weight"]
    assert not np.array_equal(first, model.weights()["backbone.gene_embedding.weight"])


# ---- files, species, gene sets


def test_files_of_two_species_and_different_genes(tmp_path: Path) -> None:
    human, mouse = synthetic_cells(80, seed=1), synthetic_cells(60, seed=2, species="mouse")[:, 100:].copy()
    human.write_h5ad(tmp_path / "human.h5ad")
    (tmp_path / "below").mkdir()
    mouse.write_zarr(tmp_path / "below" / "mouse.zarr")
    model = pretrain(tmp_path, settings=few_steps(3, least_cells=1))
    assert model.vocabulary.species == "human"
    assert set(model.vocabulary.symbols) <= set(human.var_names)  # mouse genes became their orthologues
    assert sorted(one["name"] for one in model.ledger.stages[0].facts["data"]) == ["human", "mouse"]
    assert ec.embed(model, mouse).shape == (60, 32)

    shared = pretrain([human, mouse], settings=few_steps(3, least_cells=1, vocabulary="intersection"))
    assert set(shared.vocabulary.symbols) <= set(human.var_names[100:]) and len(shared.vocabulary) > 150


def test_counts_are_held_small_and_empty_cells_left_out(tmp_path: Path) -> None:
    cells = synthetic_cells(50, seed=1)
    cells.X = sp.csr_matrix(np.minimum(cells.X.toarray(), 200), dtype=np.float32)
    cells.X = sp.diags((np.arange(50) != 3).astype(np.float32)) @ cells.X
    cells.write_h5ad(tmp_path / "a.h5ad")
    (study,) = read_for_pretraining([tmp_path / "a.h5ad"])
    assert study.counts.dtype == np.uint8 and len(study) == 49
    np.testing.assert_array_equal(study.counts.toarray(), np.delete(cells.X.toarray(), 3, axis=0))


def test_a_folder_gives_each_file_once(tmp_path: Path) -> None:
    synthetic_cells(20, seed=1).write_h5ad(tmp_path / "a.h5ad")
    assert cell_files([tmp_path, tmp_path / "a.h5ad", str(tmp_path / "a.h5ad")]) == [tmp_path / "a.h5ad"]


def test_held_out_cells_are_whole_studies_then_donors_then_cells() -> None:
    data = [synthetic_cells(60, seed=seed, n_donors=4) for seed in range(4)]
    names = ["a", "b", "c", "d"]

    split, (train, held) = split_studies(read_for_pretraining(data, names=names), share=0.2, seed=0)
    assert split.by == "studies" and len(split.held_out) == 1
    assert [len(t) + len(h) for t, h in zip(train, held, strict=True)] == [60] * 4
    assert all(len(t) == 0 or len(h) == 0 for t, h in zip(train, held, strict=True))

    split, _ = split_studies(read_for_pretraining(data[:1], names=["a"], groups="donor"), share=0.2, seed=0)
    assert split.by == "groups" and split.held_out[0].startswith("a/donor")
    split, _ = split_studies(read_for_pretraining(data[:2]), share=0.2, seed=0)
    assert split.by == "cells" and not set(split.train) & set(split.validation)

    model = pretrain(data[:2], names=["a", "b"], settings=few_steps(2, held_out_studies=("b",)))
    assert model.ledger.stages[0].facts["held_out"] == {"by": "studies", "groups": ["b"], "cells": 60, "note": ""}


def test_genes_are_chosen_on_training_cells_only() -> None:
    seen, held_out = synthetic_cells(60, n_genes=100, seed=1), synthetic_cells(60, n_genes=200, seed=2)
    model = pretrain([seen, held_out], names=["seen", "other"], settings=few_steps(2, held_out_studies=("other",)))
    assert set(model.vocabulary.symbols) <= set(seen.var_names)


def test_input_is_left_as_it_was() -> None:
    cells = synthetic_cells(60, seed=1)
    copy = cells.copy()
    pretrain(cells, settings=few_steps(2))
    assert (cells.X != copy.X).nnz == 0 and cells.obs.equals(copy.obs) and list(cells.uns) == list(copy.uns)


# ---- bad inputs


def test_bad_inputs(tmp_path: Path) -> None:
    cells = synthetic_cells(40, n_genes=60, seed=1)
    with pytest.raises(CellsError, match="no cells were given"):
        pretrain([])
    with pytest.raises(CellsError, match="does not exist"):
        pretrain(tmp_path / "none.h5ad")
    with pytest.raises(CellsError, match=r"no \.h5ad or \.zarr"):
        pretrain(tmp_path)
    scaled = cells.copy()
    scaled.X = cells.X.toarray() - 0.5
    with pytest.raises(CellsError, match="counts"):
        pretrain([cells, scaled], names=["good", "bad"])
    empty = AnnData(sp.csr_matrix((5, 60), dtype=np.float32), var=cells.var)
    with pytest.raises(CellsError):
        pretrain(empty)
    with pytest.raises(LabelsError, match="no data set has a column `person`"):
        pretrain(cells, groups="person")
    with pytest.raises(SettingsError, match="`c`"):
        pretrain([cells, cells.copy()], names=["a", "b"], settings=few_steps(held_out_studies=("c",)))
    with pytest.raises(SettingsError, match="every study"):
        pretrain([cells], names=["a"], settings=few_steps(held_out_studies=("a",)))
    with pytest.raises(GenesError, match="share no gene"):
        apart = [synthetic_cells(40, n_genes=120, seed=1)[:, part].copy() for part in (slice(0, 60), slice(60, 120))]
        pretrain(apart, settings=few_steps(vocabulary="intersection"))
    with pytest.raises(SettingsError, match="there is no backbone"):
        pretrain(cells, settings=few_steps(backbone="none"))


@pytest.mark.parametrize(
    "wrong", [{"masked_share": 0.0}, {"held_out": 1.0}, {"contrast": -1.0}, {"balance": "root"}, {"vocabulary": "all"}]
)
def test_bad_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        PretrainingSettings(**wrong)  # type: ignore[arg-type]


def test_the_genes_that_most_studies_express_are_kept() -> None:
    small, large = synthetic_cells(40, n_genes=60, seed=1), synthetic_cells(400, n_genes=60, seed=2)
    large = large[:, 30:].copy()
    rng = np.random.default_rng(0)
    small.X = sp.csr_matrix(rng.poisson(1.0, small.shape))
    large.X = sp.csr_matrix(rng.poisson(1.0, large.shape))
    model = ec.pretrain([small, large], settings=few_steps(1, most_genes=30))
    kept = set(model.vocabulary.symbols)
    assert kept == set(ec.pretrain([large], settings=few_steps(1)).vocabulary.symbols)
    with pytest.raises(SettingsError, match="most_genes"):
        few_steps(1, most_genes=0)


def test_tissues_weigh_alike_however_many_studies_they_have() -> None:
    sizes = (100, 100, 100, 400)
    cells = PretrainingCells(
        ("a", "b", "c", "d"),
        tuple(sp.csr_matrix((n, 3)) for n in sizes),
        np.ones((4, 3), dtype=bool),
        tissues=({"blood": 1.0}, {"blood": 1.0}, {"blood": 0.5, "lung": 0.5}, {"gut": 1.0}),
    )
    untold = replace(cells, tissues=())
    np.testing.assert_allclose(study_shares(untold, "sqrt", "equal"), [0.2, 0.2, 0.2, 0.4])
    np.testing.assert_allclose(study_shares(cells, "sqrt", "none"), [0.2, 0.2, 0.2, 0.4])
    # A third for each tissue: blood is shared as 1 : 1 : 0.5, lung has the half of a study, gut a whole one.
    np.testing.assert_allclose(study_shares(cells, "sqrt", "equal"), np.array([0.4, 0.4, 0.2 + 1.0, 1.0]) / 3)
    weights = np.sqrt([25, 5, 20])  # what the tissues' studies weigh together
    expected = np.array([0.4 * weights[0], 0.4 * weights[0], 0.2 * weights[0] + weights[1], weights[2]])
    np.testing.assert_allclose(study_shares(cells, "sqrt", "sqrt"), expected / expected.sum())


def test_tissues_are_read_and_named_in_the_ledger(studies: list[AnnData]) -> None:
    told = studies[0].copy()
    told.obs["tissue"] = ["Bone_marrow"] * 100 + ["bone marrow (left)"] * 100 + ["lung"] * 100
    assert tissue_key("Bone_marrow") == tissue_key("bone marrow (left)") == "bone marrow"
    model = pretrain([told, studies[1]], tissues="tissue", settings=few_steps(2))
    data = model.ledger.stages[0].facts["data"]
    assert data[0]["tissues"] == {"bone marrow": 200, "lung": 100} and "tissues" not in data[1]
    with pytest.raises(LabelsError, match="no data set has a column `tissue`"):
        pretrain(studies, tissues="tissue", settings=few_steps(2))
