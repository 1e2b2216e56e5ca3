"""Annotator: everything that turns counts into cell types, and all that is saved of a model."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch.nn import functional as F

from evercell.backbones import Backbone
from evercell.bank import ExampleBank
from evercell.celltypes import CellTypes
from evercell.errors import MemoryWarning, ModelError
from evercell.genes import GeneVocabulary
from evercell.heads import GrowingHead
from evercell.label_sets import LabelSets
from evercell.ledger import Ledger
from evercell.linear import LinearModel
from evercell.profiles import ProfileModel
from evercell.rejection import Outputs, Rejector
from evercell.sketches import DRAWN, Sketch
from evercell.threads import threads_of
from evercell.tokenizers import TokenBatch, Tokenizer, View

EVEN = 0.5  # share of the linear member where both count alike
OUT_OF_MEMORY = torch.cuda.OutOfMemoryError  # of any GPU; never of the CPU
RAN_OUT = "the memory of the GPU ran out; it goes on with"
FEWEST = 16  # cells at a time on a GPU that has no room for more
BATCH = 128  # cells a forward pass; fixed, so that a cell always meets the same arithmetic


@dataclass(frozen=True)
class Annotator:
    """A trained model. Immutable: an update makes a new one.

    The type of a cell is told by two members whose log-probabilities are averaged: the transformer (backbone and head)
    and the linear model.

    Parameters
    ----------
    vocabulary
        Genes (G).
    types
        Cell types (K); a code means the same for ever.
    tokenizer, backbone, head
        The transformer's way from counts to logits.
    linear
        Linear member, or None for the transformer alone.
    temperature
        Divides the averaged log-probabilities; set on held-out cells.
    rejector
        Scores unknown cells, calibrated on held-out cells; None for a model that has no head trained yet.
    bank
        Example cells.
    ledger
        Stages.
    settings
        Whatever the run was asked for; JSON values.
    sealed
        Cells of every stage that no training has seen, to tell whether an update forgets; same layout as the bank.
    strategy_state
        Arrays that strategies of updating keep between stages, by name.
    sketch
        Of the stages whose cells were not to be kept; None where there are none.
    linear_share
        Weight of the linear member in the average of log-probabilities; the transformer has the rest. With 1 the linear
        member alone decides (`linear_only`).
    profiles
        Profiles of the types over marker genes, or None; their share of the average is their own.
    sets
        What sets of types at a chosen rate of errors are made from; None for a model without held-out cells.
    """

    vocabulary: GeneVocabulary
    types: CellTypes
    tokenizer: Tokenizer
    backbone: Backbone
    head: GrowingHead
    linear: LinearModel | None
    temperature: float
    rejector: Rejector | None
    bank: ExampleBank
    ledger: Ledger = field(default_factory=Ledger)
    settings: Mapping[str, Any] = field(default_factory=dict)
    sealed: ExampleBank | None = None
    strategy_state: Mapping[str, np.ndarray] = field(default_factory=dict)
    sketch: Sketch | None = None
    linear_share: float = EVEN
    profiles: ProfileModel | None = None
    sets: LabelSets | None = None

    @classmethod
    def begun(
        cls,
        vocabulary: GeneVocabulary,
        tokenizer: Tokenizer,
        backbone: Backbone,
        head: GrowingHead,
        types: CellTypes | None = None,
        **parts: Any,
    ) -> Annotator:
        """A model of a transformer alone, without rejector and bank: pretrained, or about to be trained."""
        return cls(
            vocabulary=vocabulary,
            types=types or CellTypes(()),
            tokenizer=tokenizer,
            backbone=backbone,
            head=head,
            linear=None,
            temperature=1.0,
            rejector=None,
            bank=empty_bank(len(vocabulary)),
            **parts,
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over genes, parts, weights and bank (hex): two models with one fingerprint say the same."""
        digest = hashlib.sha256(self.vocabulary.digest().encode())
        digest.update(json.dumps(self.parts(), sort_keys=True).encode())
        for name, array in sorted(self.weights().items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        counts = self.bank.counts  # for queries of few genes the light parts are fitted on the bank
        digest.update(counts.data.astype(np.float32).tobytes())
        for positions in (counts.indices, counts.indptr, self.bank.codes):
            digest.update(positions.astype(np.int64).tobytes())
        if self.sketch is not None:
            digest.update(json.dumps(self.sketch.facts(self.types.names)).encode())
            for name, array in sorted(self.sketch.arrays().items()):
                digest.update(name.encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @cached_property
    def examples(self) -> ExampleBank:
        """The bank, and made-up cells of the stages that are only sketched: the same ones at every call."""
        if self.sketch is None:
            return self.bank
        drawn = self.sketch.cells(self.sketch.numbers(DRAWN), np.random.default_rng(0))
        return self.bank.joined(drawn)

    def parts(self) -> dict[str, Any]:
        """What the model is made of besides genes and weights, as JSON holds it."""
        return {
            "tokenizer": {"name": self.tokenizer.name, "settings": self.tokenizer.settings},
            "backbone": {"name": self.backbone.name, "settings": self.backbone.settings},
            "head": {"hidden": list(self.head.hidden), "dropout": self.head.dropout.p},
            "linear": self.linear is not None,
            **({"linear_scaled": True} if self.linear is not None and self.linear.scaled else {}),
            **({"linear_share": self.linear_share} if self.linear_share != EVEN else {}),
            **({"profiles": self.profiles.settings} if self.profiles is not None else {}),
            **({"sets": True} if self.sets is not None else {}),
            "types": self.types.to_dict(),
            "temperature": self.temperature,
            "rejector": self.rejector.name if self.rejector is not None else None,
        }

    def weights(self) -> dict[str, np.ndarray]:
        """All learned arrays by name, as they are saved."""
        found = {f"backbone.{name}": t.detach().cpu().numpy() for name, t in self.backbone.state_dict().items()}
        found |= {f"head.{name}": t.detach().cpu().numpy() for name, t in self.head.state_dict().items()}
        if self.linear is not None:
            found |= {f"linear.{name}": array for name, array in self.linear.arrays().items()}
        if self.profiles is not None:
            found |= {f"profiles.{name}": array for name, array in self.profiles.arrays().items()}
        if self.sets is not None:
            found |= {f"sets.{name}": array for name, array in self.sets.arrays().items()}
        if self.rejector is not None:
            found |= {f"rejector.{name}": array for name, array in self.rejector.arrays.items()}
        return found | {f"strategy.{name}": array for name, array in self.strategy_state.items()}

    def frozen_copy(self) -> Annotator:
        """The model as a teacher: modules of its own, in evaluation mode, without gradients."""
        backbone, head = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
        return replace(self, backbone=backbone.eval().requires_grad_(False), head=head.eval().requires_grad_(False))

    def halved(self) -> Annotator:
        """The model with backbone, head and the other members rounded to half precision, in which it is then stored."""
        backbone, head = copy.deepcopy(self.backbone).half().float(), copy.deepcopy(self.head).half().float()
        linear = self.linear
        if linear is not None:
            weight, bias = (a.astype(np.float16).astype(np.float32) for a in (linear.weight, linear.bias))
            linear = replace(linear, weight=weight, bias=bias)
        profiles = self.profiles
        if profiles is not None:
            profiles = replace(profiles, means=profiles.means.astype(np.float16).astype(np.float32))
        return replace(self, backbone=backbone, head=head, linear=linear, profiles=profiles)

    def over_genes(self, columns: np.ndarray) -> Annotator:
        """A pretrained model with only the genes `columns`, for a smaller model to be trained from it.

        Raises
        ------
        ModelError
            If the model knows cell types: they are told by genes that would be lost.
        """
        if len(self.types):
            raise ModelError(f"a model of {len(self.types)} cell types cannot lose genes", hint="take a pretrained one")
        kept = torch.from_numpy(np.ascontiguousarray(columns, dtype=np.int64))
        with torch.random.fork_rng(devices=[]):
            backbone = type(self.backbone)(len(kept), n_bins=self.tokenizer.n_bins, **self.backbone.settings)
        state = self.backbone.state_dict()
        backbone.load_state_dict({n: array[kept] if n.startswith("gene_") else array for n, array in state.items()})
        vocabulary = self.vocabulary.taken(columns)
        return replace(self, vocabulary=vocabulary, backbone=backbone.eval(), bank=empty_bank(len(kept)))

    def on(self, device: torch.device) -> Annotator:
        """The model with its modules on `device`; itself if they are there."""
        if self.device == device:
            return self
        return replace(self, backbone=copy.deepcopy(self.backbone).to(device), head=copy.deepcopy(self.head).to(device))

    @property
    def linear_only(self) -> bool:
        """Whether the linear member alone knows the types, as in a model imported from a linear classifier."""
        return self.linear is not None and self.linear_share == 1.0

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.backbone.parameters()).device

    def represent(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        """Representations (B, D) and logits of the transformer (B, K), float32.

        Cells are taken in the order of their number of genes, so that little is padded, and always `BATCH` at a time; a
        last batch is filled with repeats. So the arithmetic of a cell does not depend on its neighbours.
        """
        n_cells = view.counts.shape[0]
        representation = np.zeros((n_cells, self.backbone.width), dtype=np.float32)
        logits = np.zeros((n_cells, self.head.n_types), dtype=np.float32)
        with torch.inference_mode(), threads_of(self.backbone):
            for rows in _batches(np.diff(view.counts.indptr)):
                representation[rows], logits[rows] = self._passed(self.tokenizer.tokenize(view.taken(rows)), BATCH)
        return representation, logits

    def _passed(self, tokens: TokenBatch, at_once: int) -> tuple[np.ndarray, np.ndarray]:
        """Representations and logits of a batch, `at_once` cells at a time.

        Where the memory of a GPU runs out, half as many at a time, padded as before, and at last the whole batch on the
        CPU. Either may change the last bits of a number.
        """
        parts = []
        try:
            for start in range(0, len(tokens), at_once):
                states = self.backbone(tokens.taken(slice(start, start + at_once)).to(self.device))
                parts.append((states.float().cpu().numpy(), self.head(states).float().cpu().numpy()))
        except OUT_OF_MEMORY:
            parts = []
        if parts:
            representation, logits = map(np.concatenate, zip(*parts, strict=True))
            return representation, logits
        # Out of the `except`, which keeps hold of what filled the memory.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if at_once > FEWEST:
            warnings.warn(f"{RAN_OUT} {at_once // 2} cells at a time", MemoryWarning, stacklevel=2)
            return self._passed(tokens, at_once // 2)
        warnings.warn(f"{RAN_OUT} {len(tokens)} cells on the CPU", MemoryWarning, stacklevel=2)
        return self._on_cpu._passed(tokens, len(tokens))

    @cached_property
    def _on_cpu(self) -> Annotator:
        """A copy of the model on the CPU, made once: where a GPU has no room, many batches need it."""
        cpu = torch.device("cpu")
        return replace(self, backbone=copy.deepcopy(self.backbone).to(cpu), head=copy.deepcopy(self.head).to(cpu))

    def averaged(self, log_proba: np.ndarray, view: View) -> np.ndarray:
        """Log-probabilities of the transformer (B, K), averaged with those of the other members of the same cells."""
        if self.linear is not None:
            log_proba = (1 - self.linear_share) * log_proba + self.linear_share * self.linear.log_proba(view)
        if self.profiles is not None:
            log_proba = (1 - self.profiles.share) * log_proba + self.profiles.share * self.profiles.log_proba(view)
        return log_proba

    def outputs(self, view: View, represented: tuple[np.ndarray, np.ndarray] | None = None) -> Outputs:
        """What the model says of the cells of a view (counts over the model's genes), `represented` before or not."""
        representation, logits = self.represent(view) if represented is None else represented
        log_proba = self.averaged(F.log_softmax(torch.from_numpy(logits), dim=1).numpy(), view)
        return Outputs(representation, logits, tempered(log_proba, self.temperature), view)


def tempered(log_proba: np.ndarray, temperature: float) -> np.ndarray:
    """Log-probabilities (B, K) divided by a temperature and normalised again."""
    scaled = log_proba / temperature
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    found: np.ndarray = (scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))).astype(np.float32)
    return found


def best_temperature(log_proba: np.ndarray, codes: np.ndarray) -> float:
    """Temperature with the smallest cross-entropy on held-out cells, between 0.2 and 5."""
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(codes))

    def cross_entropy(log_temperature: float) -> float:
        return -float(tempered(log_proba, float(np.exp(log_temperature)))[rows, codes].mean())

    found = minimize_scalar(cross_entropy, bounds=(np.log(0.2), np.log(5.0)), method="bounded")
    return float(np.exp(found.x))


def _batches(n_tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Row numbers, `BATCH` at a time, shortest cells first, the last batch filled with its last row."""
    order = np.argsort(n_tokens, kind="stable")
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        yield np.concatenate([rows, np.repeat(rows[-1:], BATCH - len(rows))])


def empty_bank(n_genes: int) -> ExampleBank:
    """A bank without cells."""
    nothing = np.zeros(0, dtype=np.int64)
    return ExampleBank(
        csr_matrix((0, n_genes), dtype=np.float32), nothing, nothing, nothing, np.zeros((0, n_genes), dtype=bool)
    )
