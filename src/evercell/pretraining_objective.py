"""What `pretrain` minimises: masked expression, the contrast of two views, and types; and how it is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evercell.annotator import Annotator
from evercell.errors import SettingsError
from evercell.masking import Levels, MaskedExpression, Masking, Question, mask_code
from evercell.pretraining_cells import PretrainingCells, study_shares
from evercell.training import seeded
from evercell.type_targets import TypeTargets

if TYPE_CHECKING:
    from evercell.pretraining import PretrainingSettings

VALIDATION_CELLS, BATCH = 1000, 128
TERMS = ("masked_loss", "contrast_loss", "type_loss")


class Objective:
    """The loss of a training step: masked expression, the contrast of two views, and types."""

    def __init__(
        self, model: Annotator, cells: PretrainingCells, settings: PretrainingSettings, seed: int, device: torch.device
    ) -> None:
        self.model, self.cells, self.settings, self.device = model, cells, settings, device
        with seeded(seed + 1):
            self.levels = Levels.of(cells)
            self.decoder = MaskedExpression(model.backbone, self.levels, settings.zero_queries).to(device)
            self.types = TypeTargets(model.backbone, cells).to(device)
        self.module = nn.ModuleDict({"backbone": model.backbone, "decoder": self.decoder, "types": self.types})
        weights = study_shares(cells, settings.balance, settings.tissue_balance)
        if settings.masked == 0 and settings.contrast == 0:  # a study without labels teaches nothing then
            weights = weights * (cells.shown.any(axis=1) & (settings.supervised > 0))
        if not weights.any():
            raise SettingsError(
                "there is nothing to learn: masked, contrast and supervised have no weight on any study",
                hint="name the column of labels, or give masked or contrast a weight",
            )
        self.shares = weights / weights.sum()
        mask = mask_code(model.tokenizer, model.backbone)
        self.masking = Masking(settings.masked_share, settings.most_asked, settings.zero_queries, mask)
        self.terms: list[tuple[float, ...]] = []  # losses of the steps since they were last logged, see `TERMS`

    def __call__(self, rng: np.random.Generator) -> Tensor:
        settings, model = self.settings, self.model
        study = int(rng.choice(len(self.shares), p=self.shares))
        counts, codes = self.cells.draw(study, settings.training.batch_size, rng)
        measured = self.cells.measured[study]
        view = settings.augmentation.view(counts, measured, rng)
        masked = contrast = told = torch.zeros((), device=self.device)
        if settings.masked > 0:
            question = self.masking.ask(view, counts, model.tokenizer, rng).to(self.device)
            states, mask = model.backbone.states(question.tokens)
            masked = self.decoder.loss(self.decoder.logits(model.backbone, states, mask, question), question.bins)
            representation = model.backbone.pool(states, mask)
        else:
            representation = model.backbone(model.tokenizer.tokenize(view).to(self.device))
        if settings.contrast > 0:
            other = model.tokenizer.tokenize(settings.augmentation.view(counts, measured, rng)).to(self.device)
            contrast = self.decoder.contrast(representation, model.backbone(other))
        if settings.supervised > 0 and (codes >= 0).any():
            told = self.types.loss(representation, codes, self.cells.shown[study])
        self.terms.append(tuple(float(term.detach()) for term in (masked, contrast, told)))
        return settings.masked * masked + settings.contrast * contrast + settings.supervised * told

    def answers(self, question: Question) -> tuple[Tensor, Tensor]:
        """Logits of the members' mean answer (B, Q, levels), and the representations (B, D)."""
        question = question.to(self.device)
        states, mask = self.model.backbone.states(question.tokens)
        logits = self.decoder.logits(self.model.backbone, states, mask, question).float().mean(dim=0).cpu()
        return logits, self.model.backbone.pool(states, mask)


def validation(objective: Objective, held_out: PretrainingCells, seed: int) -> Callable[[], dict[str, float]]:
    """Figures of held-out cells, seen whole but for what is hidden; the same genes at every look."""
    rng = np.random.default_rng([seed, 1])
    # Enough genes for a good answer, and a bound on the time of a look.
    whole = replace(objective.settings.augmentation, gene_dropout=0.0, thinning=0.0, panels=0.0)
    masking = replace(objective.masking, replaced=1.0)
    usual = torch.from_numpy(objective.levels.usual())
    with torch.random.fork_rng():
        untrained = MaskedExpression(objective.model.backbone, objective.levels, masking.zeros)
    questions, of_gene, of_depth = [], [], []
    truth, shown = [], []  # of each question: codes of its cells (B,), types that its study shows (K,)
    for study, rows, counts in held_out.spread(VALIDATION_CELLS):
        codes = objective.types.codes_of(held_out, study)
        shows = np.bincount(codes[codes >= 0], minlength=len(objective.types.types)) > 0
        for start in range(0, counts.shape[0], BATCH):
            part = counts[start : start + BATCH]
            view = whole.view(part, held_out.measured[study], rng)
            question = masking.ask(view, part, objective.model.tokenizer, rng)
            questions.append(question)
            truth.append(codes[rows[start : start + BATCH]])
            shown.append(shows)
            of_gene.append((usual[question.genes] == question.bins)[question.bins > 0])
            of_depth.append(untrained.known(question)[question.bins >= 0].detach())
    bins = torch.cat([question.bins[question.bins >= 0] for question in questions])
    trivial = {f"trivial_depth_{name}": value for name, value in _judged(torch.cat(of_depth), bins).items()}
    trivial["trivial_accuracy"] = float(torch.cat(of_gene).float().mean())
    labelled = any((codes >= 0).any() for codes in truth)

    def validate() -> dict[str, float]:
        answers, right, losses = [], [], []
        for question, codes, shows in zip(questions, truth, shown, strict=True):
            logits, representation = objective.answers(question)
            answers.append(logits[question.bins >= 0])
            if (codes >= 0).any():
                right.append((objective.types.told(representation, shows) == codes)[codes >= 0])
                losses.append(float(objective.types.loss(representation, codes, shows)))
        found = _judged(torch.cat(answers), bins)
        figures = {"loss": found.pop("loss"), **{f"masked_{name}": value for name, value in found.items()}, **trivial}
        if labelled:
            figures["type_accuracy"] = float(np.concatenate(right).mean())
            figures["loss"] = objective.settings.masked * figures["loss"] + objective.settings.supervised * float(
                np.mean(losses)
            )
        return figures

    return validate


def _judged(logits: Tensor, bins: Tensor) -> dict[str, float]:
    """Figures of the answers (Q, levels) to the bins (Q,); the accuracy is that among expressed genes."""
    expressed = bins > 0
    level = logits[expressed][:, 1:].argmax(dim=1) + 1
    present = logits[:, 0] < logits[:, 1:].logsumexp(dim=1)
    return {
        "loss": float(F.cross_entropy(logits, bins)),
        "accuracy": float((level == bins[expressed]).float().mean()),
        "presence": float((present == expressed).float().mean()),
    }
