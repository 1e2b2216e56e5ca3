"""Settings of published systems."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import evercell as ec
from evercell.errors import SettingsError
from evercell.presets import PRESETS, preset
from evercell.testing import synthetic_cells
from evercell.updating import UpdateSettings

TINY = {"width": 20, "depth": 1, "n_heads": 2}


def test_a_preset_holds_what_the_paper_says() -> None:
    canal = preset("canal")
    assert (canal.model.variable_genes, canal.model.hidden, canal.model.bank) == (1000, (128, 64), 1000)
    assert (canal.model.training.learning_rate, canal.model.training.label_smoothing) == (2e-4, 0.1)
    assert (canal.update.selection, canal.update.distillation, canal.update.trained) == ("nearest", 0.1, "last layers")
    transanno = preset("transanno")
    assert (transanno.model.balance, transanno.model.variable_genes) == ("oversample", 16_906)
    assert (transanno.pretraining.training.learning_rate, transanno.pretraining.masked_share) == (1e-5, 0.15)
    for one in PRESETS.values():
        assert (one.model.tokenizer, one.model.backbone, one.model.linear) == ("bins", "performer", False)
        assert one.differs


def test_epochs_become_samples() -> None:
    found = preset("scbert").over(50)
    samples = [part.training.samples for part in (found.model, found.pretraining, found.update)]
    assert samples == [5000] * 3


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(SettingsError, match="no preset `scgpt`"):
        preset("scgpt")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_and_updates(name: str) -> None:
    cells = synthetic_cells(seed=1)
    found = preset(name).over(cells.n_obs)
    few = replace(found.model.training, samples=64, batch_size=32, evaluations=1)
    # from no pretrained model there is no layer to leave as it is; the packaged size would take minutes
    settings = replace(found.model, training=few, finetune="all", backbone_settings=TINY)
    model = ec.train(cells, groups="donor", settings=settings)
    assert model.linear is None
    assert model.backbone.settings["width"] == TINY["width"]
    update = replace(found.update, training=few)
    mapping = {name: name for name in model.types.names}
    new = ec.update(model, synthetic_cells(seed=2), groups="donor", settings=update, mapping=mapping, force=True)
    assert len(new.ledger) == 2


def test_a_share_for_the_bank_lies_between_0_and_1() -> None:
    assert UpdateSettings(replay=0.0).replay == 0
    with pytest.raises(SettingsError, match="replay"):
        UpdateSettings(replay=1.0)


def test_weights_in_the_loss_make_types_count_alike() -> None:
    from evercell.training_cells import TrainingCells

    nothing = np.zeros((1, 1), dtype=bool)
    codes = np.array([0] * 16 + [1] * 4)
    cells = TrainingCells(None, codes, np.zeros(20, dtype=int), nothing, None)  # type: ignore[arg-type]
    weights = cells.loss_weights("weights")
    assert weights is not None
    assert weights.mean() == pytest.approx(1)
    assert weights[:16].sum() == pytest.approx(weights[16:].sum())
    assert cells.loss_weights("sqrt") is None
    assert np.ptp(cells.sampling_weights("weights")) == 0
