"""The old model grown to new types and genes, as a stage of learning starts from it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from evercell.annotator import Annotator
from evercell.backbones import BACKBONES, Backbone
from evercell.celltypes import CellTypes
from evercell.genes import GeneVocabulary, canonical_genes
from evercell.training import seeded

if TYPE_CHECKING:
    from evercell.training_cells import Study

NEW_ROWS = 0.1
"""Rows of new genes start at this share of what a new model draws: they change little before they are learnt."""


def with_genes_of(
    vocabulary: GeneVocabulary, studies: Sequence[Study], *, species: str = "auto", column: str | None = None
) -> GeneVocabulary:
    """The vocabulary with the further genes of the studies appended; those of another species are not added."""
    for study in studies:
        found = canonical_genes(study.counts.genes, species=species, column=column)
        if found.species == vocabulary.species:
            vocabulary = vocabulary.extended(found.names.tolist())
    return vocabulary


def grown(old: Annotator, types: CellTypes, vocabulary: GeneVocabulary, *, seed: int) -> Annotator:
    """A copy of the model that knows more types and genes; rows of old ones are bit-equal."""
    head = copy.deepcopy(old.head)
    head.grow(len(types), seed=seed)
    return replace(
        old,
        vocabulary=vocabulary,
        types=types,
        backbone=_grown_backbone(old, len(vocabulary), seed),
        head=head,
        linear=None,
        profiles=None,
        rejector=None,
        sets=None,
        temperature=1.0,
        bank=old.bank.widened(len(vocabulary)),
        sketch=None if old.sketch is None else old.sketch.widened(len(vocabulary)),
        strategy_state={},
    )


def _grown_backbone(old: Annotator, n_genes: int, seed: int) -> Backbone:
    if n_genes == len(old.vocabulary):
        return copy.deepcopy(old.backbone)
    with seeded(seed):
        new = BACKBONES[old.backbone.name](n_genes, n_bins=old.tokenizer.n_bins, **old.backbone.settings)
    new = new.to(old.device)
    before = old.backbone.state_dict()
    with torch.no_grad():
        for name, weight in new.state_dict().items():
            n = len(before[name]) if before[name].ndim else 0
            if weight.shape == before[name].shape:
                weight.copy_(before[name])
            else:
                weight[:n] = before[name]
                weight[n:] *= NEW_ROWS
    return new.eval()
