"""Several processes that train one model: the numbers are those of one (invariant 8)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, multiprocessing, nn

from evercell import __main__ as program
from evercell import distributed
from evercell.distributed import PairedSum, Process, share, started, together
from evercell.errors import ModelError, SettingsError
from evercell.testing import synthetic_cells
from evercell.training import TrainingSettings, fit, seeded

Run = Callable[..., tuple[int, str, str]]

SETTINGS = TrainingSettings(samples=1280, batch_size=8, batches_a_step=8, learning_rate=0.02, evaluations=5)  # 20 steps
SMALL = ["--backbone-setting", "members=2", "--backbone-setting", "member_width=16", "--backbone-setting", "depth=1"]

# One of two processes is killed at a step after some looks, once. What is said of the steps shows that none was done
# again before the last look.
WORKER = """
import os, signal, sys
from pathlib import Path
from evercell import training
from evercell.cli import main

advance, folder, first_time = training._Run.advance, Path(sys.argv[1]), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

def watched(self, loss):
    if os.environ["RANK"] == "1":
        with (folder / "steps").open("a") as steps:
            print(self.step, file=steps)
        if first_time and self.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
    return advance(self, loss)

training._Run.advance = watched
for words in " ".join(sys.argv[2:]).split(" then "):
    if code := main(words.split()):
        sys.exit(code)
"""


class Network(nn.Module):
    """A regression with dropout, and a part that some batches leave untouched."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(0):
            self.usual = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 1))
            self.seldom = nn.Linear(4, 1)


def trained(settings: TrainingSettings = SETTINGS) -> tuple[Network, list[dict[str, float]]]:
    model = Network()
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(64, 4)).astype(np.float32))
    y = x[:, :1] - x[:, 1:2] * 0.5

    def loss(rng: np.random.Generator) -> Tensor:
        rows = torch.from_numpy(rng.integers(0, len(x), settings.batch_size))
        answer = model.usual(x[rows])
        if rng.random() < 0.05:
            answer = answer + model.seldom(x[rows])
        return nn.functional.mse_loss(answer, y[rows])

    def validate() -> dict[str, float]:
        return {"loss": float(nn.functional.mse_loss(model.usual(x), y))}

    return model, fit(model, loss, settings, seed=3, validate=validate).rows


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def one_of_four(rank: int, port: int, folder: Path) -> None:
    """What each of four processes does; what it finds lies in the folder."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    with together("cpu", batches=8) as process:
        model, rows = trained()
        found = {
            "rows": rows,
            "figures": distributed.of_first({"loss": float(rank)}),
            "path": distributed.of_machine(f"/é/{rank}"),
            "all": distributed.of_all(np.full((2, 1), rank)).ravel().tolist(),
            "size": process.size,
        }
        distributed.agree(b"same", "words")
        with pytest.raises(ModelError, match="process 2 has other words than process 0") as caught:
            distributed.agree(b"other" if rank == 2 else b"same", "words")
        found["hint"] = caught.value.hint
        torch.save(model.state_dict(), folder / f"{rank}.pt")
        (folder / f"{rank}.json").write_text(json.dumps(found))


def test_four_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    """Invariant 8, bit for bit, with dropout and with parameters that a batch does not touch."""
    multiprocessing.spawn(one_of_four, (free_port(), tmp_path), nprocs=4)
    model, rows = trained()
    for rank in range(4):
        assert same(model.state_dict(), torch.load(tmp_path / f"{rank}.pt", weights_only=True))
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["rows"] == rows
        assert found["figures"] == {"loss": 0.0}  # the first decides
        assert found["path"] == f"/é/{rank - rank % 2}"  # two machines of two
        assert found["all"] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert found["size"] == 4
        assert "--resume" in found["hint"]
    untouched = Network().seldom.weight
    assert not torch.equal(model.seldom.weight, untouched)


def test_a_killed_process_changes_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 8: started by torchrun, one of two killed midway, restarted; and `train` beside it."""
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        synthetic_cells(120, seed=seed, n_genes=100).write_h5ad(f"{seed}.h5ad")
    for folder in ("store", "alone", "both"):
        Path(folder).mkdir()
    Path("worker.py").write_text(WORKER)

    def commands(to: str) -> list[list[str]]:
        shared = ["--labels", "cell_type", "--batches-a-step", "2"]
        pretrain = ["pretrain", "1.h5ad", "2.h5ad", *shared, *SMALL, "--samples", "5120", "--resume", f"{to}/state"]
        train = ["train", "1.h5ad", *shared, *SMALL, "--samples", "1024"]
        return [[*pretrain, "--output", f"{to}/pretrained"], [*train, "--output", f"{to}/model"]]

    first, second = commands("both")
    started_as = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    started_as += ["--max-restarts", "1", "worker.py", "both", *first, "--store", "store", "then", *second]
    threads = {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(started_as, env=os.environ | threads, stderr=subprocess.PIPE, text=True) as several:
        for words in commands("alone"):
            code, _, err = run(*words)
            assert code == 0, err
        _, err = several.communicate(timeout=120)
    assert several.returncode == 0, err
    steps = [int(line) for line in Path("both/steps").read_text().split()]
    assert steps[:20] == [*range(8), *range(7, 19)]  # a look after every step

    for model in ("pretrained", "model"):
        files = [Path(to, model, "annotator.json") for to in ("alone", "both")]
        one, other = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        assert other["fingerprint"] == one["fingerprint"]
        assert other["settings"]["training"]["batches_a_step"] == 2
        assert same(*(load_file(file.with_name("weights.safetensors")) for file in files))
    ledgers = [Path(to, "pretrained", "ledger.jsonl").read_text() for to in ("alone", "both")]
    assert ledgers[0] == ledgers[1]
    logs = [
        [json.loads(line) for line in Path(to, "state", "log.jsonl").read_text().splitlines()]
        for to in ("alone", "both")
    ]
    assert [row | {"seconds": 0} for row in logs[0]] == [row | {"seconds": 0} for row in logs[1]]
    assert not list(Path("store").iterdir())  # the killed run left no counts behind either


def test_batches_have_random_numbers_of_their_own() -> None:
    """The batches of a step differ, in cells and in dropout, and a step of one batch is drawn as it always was."""
    drawn: list[float] = []
    weight = nn.Linear(1, 1)

    def loss(rng: np.random.Generator) -> Tensor:
        drawn.extend((float(rng.random()), float(torch.rand(1))))
        return weight(torch.ones(1, 1)).sum()

    fit(weight, loss, replace(SETTINGS, samples=48, batches_a_step=3), seed=5)
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 3
    drawn.clear()
    fit(weight, loss, replace(SETTINGS, samples=8, batches_a_step=1), seed=5)
    with seeded(5):
        assert drawn == [np.random.default_rng(5).random(), float(torch.rand(1))]


def test_a_step_is_the_mean_of_its_batches() -> None:
    grads, weight = iter([1.0, 2.0, 6.0]), nn.Linear(1, 1, bias=False)

    def loss(rng: np.random.Generator) -> Tensor:
        return weight.weight.sum() * next(grads)

    before = float(weight.weight.detach())
    rows = fit(weight, loss, replace(SETTINGS, samples=24, batches_a_step=3, clip=100.0)).rows
    assert weight.weight.grad is not None
    assert float(weight.weight.grad) == 3.0
    assert rows[0]["loss"] == pytest.approx(3.0 * before)


def test_sums_of_parts_are_terms_of_the_whole() -> None:
    terms = [torch.tensor(value) for value in (1e8, 1.0, -1e8, 1.0, 3e7, 0.1, 7.0, 1e-3)]

    def of(some: list[Tensor]) -> Tensor:
        paired = PairedSum()
        for term in some:
            paired.add(term)
        return paired.total()

    for part in (1, 2, 4):
        assert of([of(terms[start : start + part]) for start in range(0, 8, part)]) == of(terms)
    for n in range(1, 8):
        torch.testing.assert_close(of(terms[4 : 4 + n]), torch.stack(terms[4 : 4 + n]).sum())


def test_batches_that_cannot_be_shared_are_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, str(value))
    assert started() == Process(1, 4, 1, 2)
    for batches, fitting in ((1, 4), (6, 8)):
        with pytest.raises(SettingsError, match=f"4 processes cannot share a step of {batches}") as caught:
            together(batches=batches).__enter__()
        assert f"--batches-a-step {fitting}" in (caught.value.hint or "")
    assert distributed.here() == Process()
    assert share(3) == range(3)


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")  # some schedulers set it for processes that know nothing of each other
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert started() == Process()
    with together() as process:
        assert process.first
    with pytest.raises(SettingsError, match="batches_a_step"):
        TrainingSettings(batches_a_step=0)


def test_other_processes_speak_late_and_only_of_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(program.time, "sleep", waits.append)

    def ending(code: int) -> Callable[[], int]:
        def main() -> int:
            print("error: no such file", file=sys.stderr)
            return code

        return main

    monkeypatch.setattr(program, "main", ending(0))
    assert program.beside_the_first() == 0
    assert capsys.readouterr().err == "" and not waits
    monkeypatch.setattr(program, "main", ending(2))
    assert program.beside_the_first() == 2
    assert "error: no such file" in capsys.readouterr().err
    assert waits == [program.PATIENCE]
