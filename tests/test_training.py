"""The training loop, on a small regression."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evercell.errors import ModelError, SettingsError
from evercell.training import STATE, History, TrainingSettings, choose_device, fit, seeded

SETTINGS = TrainingSettings(samples=640, batch_size=16, learning_rate=0.02, evaluations=8, patience=8)  # 40 steps


class Interrupted(Exception):
    """Stands for a killed process."""


def network() -> nn.Module:
    with seeded(0):
        return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 1))


def data(seed: int, n: int = 64) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32))
    return x, (x[:, :1] - x[:, 1:2] * 0.5)


def trained(
    model: nn.Module, settings: TrainingSettings = SETTINGS, stop_at: int | None = None, **arguments: object
) -> History:
    x, y = data(1)
    held_x, held_y = data(2)

    def loss(rng: np.random.Generator) -> Tensor:
        rows = torch.from_numpy(rng.integers(0, len(x), settings.batch_size))
        return nn.functional.mse_loss(model(x[rows]), y[rows])

    def validate() -> dict[str, float]:
        return {"loss": float(nn.functional.mse_loss(model(held_x), held_y))}

    def on_step(step: int, steps: int, value: float) -> None:
        if step == stop_at:
            raise Interrupted

    given = {"validate": validate, "on_step": on_step, **arguments}
    return fit(model, loss, settings, **given)  # type: ignore[arg-type]


def weights(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_training_lowers_the_loss_and_leaves_evaluation_mode() -> None:
    model = network()
    history = trained(model)
    held = [row["held_out_loss"] for row in history.rows]
    assert held[-1] < 0.5 * held[0]
    assert [row["step"] for row in history.rows] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert not model.training
    assert 0 < history.best_step <= history.steps == 40


def test_the_seed_decides_the_weights() -> None:
    results = []
    for seed in (1, 1, 2):
        model = network()
        trained(model, seed=seed)
        results.append(weights(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize("stop_at", [3, 12, 17, 31, 39])
@pytest.mark.parametrize("with_validation", [True, False])
def test_a_resumed_run_is_an_uninterrupted_one(stop_at: int, with_validation: bool, tmp_path: Path) -> None:
    """Invariant 8, bit for bit, with dropout, averaging and early stopping in play."""
    arguments: dict[str, object] = {"seed": 3} if with_validation else {"seed": 3, "validate": None}
    whole = network()
    expected = trained(whole, **arguments)

    broken = network()
    with pytest.raises(Interrupted):
        trained(broken, stop_at=stop_at, state_folder=tmp_path, **arguments)
    resumed = network()
    with torch.no_grad():
        resumed[0].weight.zero_()  # whatever it held, the stored state is taken up
    found = trained(resumed, state_folder=tmp_path, **arguments)
    if stop_at < 5:  # nothing was saved yet
        assert not same(weights(resumed), weights(whole))
    else:
        assert same(weights(resumed), weights(whole))
        assert found == expected


def test_a_finished_run_is_taken_up_as_it_is(tmp_path: Path) -> None:
    first, again = network(), network()
    history = trained(first, state_folder=tmp_path)
    steps: list[int] = []
    assert trained(again, state_folder=tmp_path, on_step=lambda step, *_: steps.append(step)) == history
    assert steps == []
    assert same(weights(first), weights(again))


@pytest.mark.parametrize("other", [{"seed": 9}, {"settings": replace(SETTINGS, learning_rate=0.01)}])
def test_the_state_of_another_run_is_refused(other: dict[str, object], tmp_path: Path) -> None:
    trained(network(), state_folder=tmp_path)
    with pytest.raises(ModelError, match="state of another run"):
        trained(network(), state_folder=tmp_path, **other)  # type: ignore[arg-type]


def test_a_damaged_state_is_told(tmp_path: Path) -> None:
    trained(network(), state_folder=tmp_path)
    file = tmp_path / STATE
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read"):
        trained(network(), state_folder=tmp_path)


def test_global_random_state_threads_and_flags_stay(tmp_path: Path) -> None:
    """Invariant 6."""

    def state() -> tuple[object, ...]:
        return (
            torch.random.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002 (the global state is what is looked at)
            random.getstate(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
        )

    before = state()
    trained(network(), state_folder=tmp_path)
    trained(network(), state_folder=tmp_path)
    with pytest.raises(Interrupted):
        trained(network(), stop_at=2)
    assert state() == before


def test_only_what_needs_a_gradient_is_trained() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone(), model[3].weight.clone()
    trained(model)
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[3].weight, before[1])


def test_training_stops_early_and_keeps_the_best_weights() -> None:
    model = network()
    seen: list[tuple[float, list[Tensor]]] = []

    def validate() -> dict[str, float]:
        loss = float([9, 9, 9, 2, 1, 3, 4, 5, 6, 7][len(seen)])
        seen.append((loss, weights(model)))
        return {"loss": loss}

    history = trained(model, replace(SETTINGS, evaluations=10, patience=3), validate=validate)
    assert history.stopped_early
    assert history.best_step == 20  # 36 steps would have followed; looks before half of the run do not count
    assert len(history.rows) == 8
    assert same(weights(model), seen[4][1])


def test_averaged_weights_are_taken_unless_a_look_was_better() -> None:
    for last, averaged in ((0.5, True), (50.0, False)):
        model = network()
        looks: list[list[Tensor]] = []

        def validate(
            model: nn.Module = model, looks: list[list[Tensor]] = looks, last: float = last
        ) -> dict[str, float]:
            looks.append(weights(model))
            return {"loss": last if len(looks) == 9 else 10.0 - len(looks)}

        history = trained(model, validate=validate)
        assert len(looks) == 9
        assert same(weights(model), looks[8] if averaged else looks[7])
        assert history.best_step == 40


def test_without_held_out_cells_the_average_of_the_last_steps_is_taken() -> None:
    model = network()
    passed: list[list[Tensor]] = []
    history = trained(model, validate=None, on_step=lambda *_: passed.append(weights(model)))
    assert history.best_step == 40
    expected = [torch.stack(one).mean(dim=0) for one in zip(*passed[28:], strict=True)]  # the last 30 % of 40 steps
    for found, mean in zip(weights(model), expected, strict=True):
        torch.testing.assert_close(found, mean, atol=1e-6, rtol=1e-5)
    plain = network()
    steps: list[list[Tensor]] = []
    trained(plain, replace(SETTINGS, averaging=0.0), validate=None, on_step=lambda *_: steps.append(weights(plain)))
    assert same(weights(plain), steps[-1])


def test_the_learning_rate_rises_and_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known fault of the published system: a schedule stepped through before training."""
    rates: list[float] = []
    original: Callable[..., object] = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return original(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    trained(network())
    assert len(rates) == 40
    assert int(np.argmax(rates)) in (3, 4)  # a tenth of the steps
    assert max(rates) == pytest.approx(0.02)
    assert (np.diff(rates[4:]) < 0).all()
    assert rates[0] < 0.3 * max(rates)
    assert rates[-1] < 0.02 * max(rates)


def test_seeded_gives_the_same_numbers_and_the_caller_keeps_theirs() -> None:
    torch.rand(3)
    before = torch.random.get_rng_state()
    drawn = []
    for _ in range(2):
        with seeded(7):
            drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(KeyError), seeded(8):
        raise KeyError
    assert torch.equal(torch.random.get_rng_state(), before)


def test_choose_device() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    with pytest.raises(SettingsError, match="`abacus` is no device"):
        choose_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match="no CUDA device") as caught:
            choose_device("cuda")
        assert "--device cpu" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"learning_rate": 3.0}, {"precision": "half"}]
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        TrainingSettings(**wrong)  # type: ignore[arg-type]
