"""The only training loop: seeded, resumable, stopped early on cells that were held out."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evercell import distributed
from evercell.errors import ModelError, SettingsError
from evercell.outputs import atomic_path

STATE = "training_state.safetensors"


@dataclass(frozen=True)
class TrainingSettings:
    """How `fit` optimises. The model stores these.

    Parameters
    ----------
    samples
        Training cells drawn in all, with repeats; steps are ``samples / (batch_size * batches_a_step)``.
    batch_size
        Cells a batch.
    batches_a_step
        Batches whose mean gradient is a step; several processes share them. Beyond 1, each batch has random numbers of
        its own, so that it does not matter which process draws it.
    learning_rate, weight_decay, warm_up, clip
        AdamW's rate at its peak; decay of all weights but those of genes, biases and norms; share of the steps in which
        the rate rises linearly before it falls as a cosine; largest gradient norm.
    label_smoothing
        Probability spread over all types.
    averaging
        Share of the last steps whose weights are averaged into the result, which steadies it from run to run. 0 for
        none.
    evaluations
        How many times the held-out cells are looked at.
    patience
        Stop after this many looks without a better one. Looks count from the second half of the run on: before, the
        rate is high and a good look is luck.
    precision
        ``"float32"`` or ``"bfloat16"`` (on a GPU, where it pays).
    """

    samples: int = 24_000
    batch_size: int = 128
    batches_a_step: int = 1
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warm_up: float = 0.1
    clip: float = 1.0
    label_smoothing: float = 0.05
    averaging: float = 0.3
    evaluations: int = 10
    patience: int = 5
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch_size < 1:
            raise SettingsError(
                f"samples and batch_size must be at least 1, not {self.samples} and {self.batch_size}",
                hint="pass --samples with a whole number from 1, or leave it out",
            )
        if self.batches_a_step < 1:
            raise SettingsError(f"batches_a_step must be at least 1, not {self.batches_a_step}")
        if not 0 < self.learning_rate < 1:
            raise SettingsError(f"learning_rate must lie between 0 and 1, not {self.learning_rate}")
        if self.precision not in ("float32", "bfloat16"):
            raise SettingsError(f"precision must be float32 or bfloat16, not `{self.precision}`")

    @property
    def steps(self) -> int:
        """Number of optimisation steps."""
        return max(math.ceil(self.samples / (self.batch_size * self.batches_a_step)), 1)


@dataclass
class History:
    """What happened in training: one row a look at the held-out cells."""

    rows: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    steps: int = 0
    stopped_early: bool = False


def choose_device(device: str = "auto") -> torch.device:
    """``auto`` takes a GPU where there is one, of several processes each its own. The only place that chooses a device.

    Raises
    ------
    SettingsError
        If a device is asked for that this machine does not have.
    """
    process = distributed.here()
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", *([process.local_rank % torch.cuda.device_count()] if process.size > 1 else []))
    if device == "auto":
        return torch.device("cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError("no CUDA device was found", hint="use --device cpu, or install a CUDA build of torch")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f"`{device}` is no device", hint="use auto, cpu or cuda") from error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers from `seed` inside, and leave the caller's random state as it was."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    if distributed.here().size > 1:  # the other GPUs are those of other processes
        devices = devices and [distributed.here().local_rank % len(devices)]
    with torch.random.fork_rng(devices=devices):
        torch.random.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        for device in devices:
            torch.cuda.set_rng_state(torch.Generator(f"cuda:{device}").manual_seed(seed).get_state(), device)
        yield


def fit(
    model: nn.Module,
    loss: Callable[[np.random.Generator], Tensor],
    settings: TrainingSettings,
    *,
    seed: int = 0,
    validate: Callable[[], dict[str, float]] | None = None,
    state_folder: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> History:
    """Minimise a loss over the parameters of `model` that need a gradient.

    Inside `distributed.together` the batches of each step are shared out. Every process has to call this with the same
    model, loss and settings.

    Parameters
    ----------
    model
        Module whose parameters are trained in place; left in evaluation mode.
    loss
        Called for each batch with the random generator to draw it from; returns the loss to be minimised.
    settings
        See `TrainingSettings`.
    seed
        Of batches, views and dropout.
    validate
        Returns figures of the held-out cells; the lowest ``"loss"`` decides which weights are kept. Without it the last
        (or averaged) weights are.
    state_folder
        Where the state is saved at every look, and taken up again if a state is there: an interrupted run that is
        resumed gives the numbers of an uninterrupted one. Several processes need one folder that all of them see.
    on_step
        Called with step, number of steps and loss, for a progress bar.

    Returns
    -------
    History

    Raises
    ------
    ModelError
        If the state is that of another run or cannot be read, or processes come to hold different weights.
    SettingsError
        If the batches of a step cannot be shared out among the processes.
    """
    run = _Run(model, settings, seed)
    if state_folder is not None and (state_folder / STATE).is_file():
        run.restore(state_folder)
    run.agree()
    look_every = max(settings.steps // max(settings.evaluations, 1), 1)
    with seeded(seed):
        run.set_random_state()
        while run.step < settings.steps and not run.history.stopped_early:
            value = run.advance(loss)
            if on_step is not None:
                on_step(run.step, settings.steps, value)
            if run.step % look_every == 0 or run.step == settings.steps:
                run.agree()
                run.look(value, validate)
                if state_folder is not None and distributed.here().first:
                    run.save(state_folder)
    run.finish(validate)
    return run.history


class _Run:
    """State of one training run; all that is needed to go on after an interruption."""

    def __init__(self, model: nn.Module, settings: TrainingSettings, seed: int) -> None:
        self.model, self.settings, self.seed = model, settings, seed
        self.batches = distributed.share(settings.batches_a_step)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        plain = [p for name, p in self.parameters.items() if p.ndim < 2 or "gene_" in name]
        decayed = [p for name, p in self.parameters.items() if not (p.ndim < 2 or "gene_" in name)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": plain, "weight_decay": 0.0},
                {"params": decayed, "weight_decay": settings.weight_decay},
            ],
            lr=settings.learning_rate,
        )
        self.rng = np.random.default_rng(seed)
        self.device = next(iter(self.parameters.values())).device
        self.random_state: dict[str, Tensor] = {}
        self.step = 0
        self.history = History(steps=settings.steps)
        self.best_loss = math.inf
        self.best: dict[str, Tensor] = {}
        self.average: dict[str, Tensor] = {}
        self.n_averaged = 0

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to a hundredth of the peak."""
        settings = self.settings
        warm_up = max(settings.warm_up * settings.steps, 1.0)
        if step < warm_up:
            return settings.learning_rate * (step + 1) / warm_up
        done = (step - warm_up) / max(settings.steps - warm_up, 1.0)
        return settings.learning_rate * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0))))

    def advance(self, loss: Callable[[np.random.Generator], Tensor]) -> float:
        """One optimisation step; returns the loss."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        value = self._backward(loss, self.rng) if self.settings.batches_a_step == 1 else self._mean_backward(loss)
        nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        self.optimizer.step()
        self.step += 1
        if self.step > (1.0 - self.settings.averaging) * self.settings.steps:
            self.n_averaged += 1
            with torch.no_grad():
                for name, p in self.parameters.items():
                    mean = self.average.setdefault(name, torch.zeros_like(p))
                    mean.add_(p - mean, alpha=1.0 / self.n_averaged)
        return float(value)

    def _backward(self, loss: Callable[[np.random.Generator], Tensor], rng: np.random.Generator) -> Tensor:
        """Set the gradient to that of one batch; returns the loss."""
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
                value = loss(rng)
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
        except torch.cuda.OutOfMemoryError as error:
            # Smaller batches would be other batches, with other numbers: that is for the user to choose.
            raise SettingsError(
                f"the memory of the GPU ran out at step {self.step + 1:,}, {self.settings.batch_size} cells a batch",
                hint="pass --device cpu, a smaller backbone such as --backbone-setting n_latents=8, or from Python a "
                "smaller batch_size",
            ) from error
        return value.detach()

    def _mean_backward(self, loss: Callable[[np.random.Generator], Tensor]) -> Tensor:
        """Set the gradient to the mean over all batches of the step, of which this process does its share.

        Returns
        -------
        Tensor
            The mean loss.
        """
        parameters, total = list(self.parameters.values()), distributed.PairedSum()
        for batch in self.batches:
            value = self._backward(loss, self._draws(batch))
            # A parameter that a batch does not touch has no gradient, which is not a gradient of zero to the optimiser.
            touched = torch.tensor([p.grad is not None for p in parameters], device=self.device)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            total.add(torch.cat([value.reshape(1), touched, *(grad.flatten() for grad in grads)]).float())
        mean = distributed.summed(total.total()) / self.settings.batches_a_step
        touched_by = mean[1 : len(parameters) + 1].tolist()
        parts = mean[len(parameters) + 1 :].split([p.numel() for p in parameters])
        for p, by, grad in zip(parameters, touched_by, parts, strict=True):
            p.grad = grad.view_as(p).to(p.dtype) if by > 0 else None
        return mean[0]

    def _draws(self, batch: int) -> np.random.Generator:
        """Random numbers of a batch of this step; torch's become those of the batch too."""
        seed = np.random.SeedSequence(self.seed, spawn_key=(self.step, batch))
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))  # inside `seeded`: the caller's stay as they were
        return np.random.default_rng(seed)

    def agree(self) -> None:
        """Check that all processes are at the same step with the same weights."""
        if distributed.here().size > 1:
            digest = hashlib.sha256(str(self.step).encode())
            for value in self.model.state_dict().values():
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
            distributed.agree(digest.digest(), f"weights at step {self.step:,}")

    def look(self, loss: float, validate: Callable[[], dict[str, float]] | None) -> None:
        """Write a row of the history; keep the weights if the held-out cells like them best."""
        row = {"step": float(self.step), "loss": loss}
        if validate is not None:
            row |= {f"held_out_{name}": value for name, value in self._validated(validate).items()}
            if self.step * 2 >= self.settings.steps and row["held_out_loss"] < self.best_loss:
                self.best_loss, self.history.best_step = row["held_out_loss"], self.step
                self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
            worse = sum(r["step"] > self.history.best_step > 0 for r in [*self.history.rows, row])
            self.history.stopped_early = worse >= self.settings.patience
        self.history.rows.append(row)

    def _validated(self, validate: Callable[[], dict[str, float]]) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            return distributed.of_first(validate())

    def finish(self, validate: Callable[[], dict[str, float]] | None) -> None:
        """Set the weights to the averaged ones, or to the best on the held-out cells if those are better."""
        if self.average and not self.history.stopped_early:
            self._set(self.average)
            if validate is None or self._validated(validate)["loss"] <= self.best_loss:
                self.best, self.history.best_step = {}, self.step
        else:
            self.history.best_step = self.history.best_step or self.step
        if self.best:
            self._set(self.best)
        self.model.eval()

    def _set(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(weights[name])

    def save(self, folder: Path) -> None:
        """Write the whole state: tensors as safetensors, numbers as JSON; the folder is replaced as one."""
        from safetensors.torch import save_file

        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        tensors["random.cpu"] = torch.random.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        numbers = {
            "run": self._identity(),
            "step": self.step,
            "rng": self.rng.bit_generator.state,
            "n_averaged": self.n_averaged,
            "best_loss": None if math.isinf(self.best_loss) else self.best_loss,
            "history": {
                "rows": self.history.rows,
                "best_step": self.history.best_step,
                "stopped_early": self.history.stopped_early,
            },
        }
        folder.mkdir(parents=True, exist_ok=True)
        contiguous = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        # One file holds all, so that a kill leaves the state of this look or of the one before.
        with atomic_path(folder / STATE) as path:
            save_file(contiguous, path, metadata={"numbers": json.dumps(numbers)})

    def _identity(self) -> dict[str, Any]:
        """What a run must share with a stored one to be its continuation."""
        weights = sum(p.numel() for p in self.parameters.values())
        return {"settings": asdict(self.settings), "seed": self.seed, "weights": weights}

    def set_random_state(self) -> None:
        """Take up torch's random state of the stored run, if there is one."""
        if "cpu" in self.random_state:
            torch.random.set_rng_state(self.random_state["cpu"])
        if "cuda" in self.random_state and self.device.type == "cuda":
            torch.cuda.set_rng_state(self.random_state["cuda"], self.device)

    def restore(self, folder: Path) -> None:
        """Take up the state in `folder`."""
        from safetensors import safe_open

        try:
            with safe_open(folder / STATE, "pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
                numbers = json.loads(stored.metadata()["numbers"])
        except Exception as error:  # the reader has an error class of its own
            raise ModelError(f"`{folder / STATE}` cannot be read ({error})", hint="remove it to start again") from error
        if numbers["run"] != self._identity():
            raise ModelError(
                f"`{folder}` holds the state of another run: {numbers['run']}, not {self._identity()}",
                hint="resume with the settings and the seed it was begun with, or choose another folder",
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t.to(self.device) for n, t in tensors.items() if n.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        self.best, self.average = part("best."), part("average.")
        state: dict[int, dict[str, Any]] = {}
        for key, value in part("optimizer.").items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value.cpu() if name == "step" else value
        stored_optimizer = copy.deepcopy(self.optimizer.state_dict())
        stored_optimizer["state"] = state
        self.optimizer.load_state_dict(stored_optimizer)
        self.rng.bit_generator.state = numbers["rng"]
        self.random_state = {n.removeprefix("random."): t for n, t in tensors.items() if n.startswith("random.")}
        self.step, self.n_averaged = numbers["step"], numbers["n_averaged"]
        self.best_loss = math.inf if numbers["best_loss"] is None else numbers["best_loss"]
        history = numbers["history"]
        self.history = History(history["rows"], history["best_step"], self.settings.steps, history["stopped_early"])
