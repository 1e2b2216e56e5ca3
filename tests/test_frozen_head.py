"""How much of a pretrained model is trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from anndata import AnnData

import evercell as ec
from evercell.errors import SettingsError
from evercell.finetuning import FEW_CELLS, quick_settings, settings_for, settled
from evercell.pretraining import quick_settings as quick_pretraining
from evercell.testing import synthetic_cells

QUICK = replace(quick_settings(), linear=False)


@pytest.fixture(scope="module")
def base() -> ec.Annotator:
    quick = quick_pretraining()
    settings = replace(quick, training=replace(quick.training, samples=6000))
    return ec.pretrain([synthetic_cells(300, seed=seed) for seed in (11, 12)], "cell_type", settings=settings)


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return synthetic_cells(160, seed=1)


def changed(base: ec.Annotator, model: ec.Annotator) -> set[str]:
    before = base.weights()
    return {
        name
        for name, array in model.weights().items()
        if name.startswith("backbone.") and not np.array_equal(array, before[name])
    }


def test_head_leaves_the_backbone_bit_equal_and_tells_types(base: ec.Annotator, cells: AnnData) -> None:
    model = ec.train(cells, base=base, settings=replace(QUICK, finetune="head"))
    assert changed(base, model) == set()
    metrics = model.ledger.stages[0].facts["metrics"]
    assert metrics["transformer"]["accuracy"] > 0.85
    again = ec.train(cells, base=base, settings=replace(QUICK, finetune="head"))
    assert again.fingerprint == model.fingerprint


def test_last_changes_the_last_block_and_norm_alone(base: ec.Annotator, cells: AnnData) -> None:
    model = ec.train(cells, base=base, settings=replace(QUICK, finetune="last"))
    last = len(base.backbone.blocks) - 1
    names = changed(base, model)
    assert names
    assert all(name.startswith((f"backbone.blocks.{last}.", "backbone.final_norm.")) for name in names)
    assert all(weight.requires_grad for weight in model.backbone.parameters())


def test_all_changes_the_genes_too(base: ec.Annotator, cells: AnnData) -> None:
    assert "backbone.gene_embedding.weight" in changed(base, ec.train(cells, base=base, settings=QUICK))


def test_a_frozen_backbone_must_be_a_trained_one(cells: AnnData) -> None:
    with pytest.raises(SettingsError, match="finetune=head"):
        ec.train(cells, settings=replace(QUICK, finetune="head"))
    with pytest.raises(SettingsError, match="`some`"):
        replace(QUICK, finetune="some")
    with pytest.raises(SettingsError, match="hidden"):
        replace(QUICK, finetune="head", hidden=(8,))


def test_training_from_a_base_leaves_it_as_it_was(base: ec.Annotator, cells: AnnData) -> None:
    before = base.fingerprint
    ec.train(cells, base=base, settings=QUICK)
    assert torch.isfinite(base.backbone.gene_embedding.weight).all()
    assert replace(base).fingerprint == before


def test_a_pretrained_model_is_trained_with_settings_of_its_own(base: ec.Annotator) -> None:
    settings = settings_for(base)
    assert settings.training.learning_rate < ec.ModelSettings().training.learning_rate
    assert settings_for(None) == ec.ModelSettings()
    with pytest.raises(SettingsError, match="linear_share"):
        replace(settings, linear_share=1.0)


def test_few_labelled_cells_get_a_head_alone(base: ec.Annotator, cells: AnnData) -> None:
    few = replace(settings_for(base), training=QUICK.training)
    model = ec.train(cells, base=base, settings=few)
    assert model.settings["finetune"] == model.ledger.stages[0].facts["settings"]["finetune"] == "head"
    assert changed(base, model) == set()
    assert [settled(few, base, FEW_CELLS - more).finetune for more in (0.1, 0)] == ["head", "all"]
    assert settled(few, None, 10).finetune == settled(replace(few, hidden=(8,)), base, 10).finetune == "all"
    assert settled(replace(few, finetune="last"), base, 10).finetune == "last"
