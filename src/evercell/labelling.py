"""Label the cells of one source, a block at a time: what annotation in memory and annotation of a file share."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from evercell import __version__
from evercell.adaptation import fitted_to, lost_share, worth_fitting
from evercell.annotator import BATCH, Annotator
from evercell.cells import Counts
from evercell.colours import UNKNOWN
from evercell.counts import empty_note
from evercell.gene_names import canonical_genes
from evercell.genes import Alignment, align
from evercell.label_sets import lineages, set_names
from evercell.rejection import Outputs, Rejector
from evercell.threads import MOST_THREADS
from evercell.tokenizers import View
from evercell.training import choose_device

UNCALIBRATED = (
    "the model was imported without cells, so it has no threshold for unknown cells: every cell is labelled; "
    "`update` sets one"
)


@dataclass(frozen=True)
class Asked:
    """What `annotate` was asked for; `rate` is None where rejection is off, `sets` where no label sets are wanted."""

    rate: float | None
    layer: str | None
    species: str
    gene_column: str | None
    adapt: bool
    min_coverage: float
    empty_cells: str
    model_name: str
    chunk: int
    device: str
    shown: bool | None
    sets: float | None = None


@dataclass(frozen=True)
class Block:
    """What a model says of some cells, and which of them have no count (`empty`) or none it knows (`nothing`)."""

    outputs: Outputs
    score: np.ndarray | None
    empty: np.ndarray
    nothing: np.ndarray


@dataclass(frozen=True)
class Verdicts:
    """The columns of an annotation as numbers, each (B,): code, rejected or not, confidence, unknown score.

    `members` are the types in the set of each cell, a bit a type (B, ceil(K / 8)), where sets were asked for.
    """

    codes: np.ndarray
    rejected: np.ndarray
    confidence: np.ndarray
    score: np.ndarray
    members: np.ndarray | None = None


@dataclass(frozen=True)
class Labeller:
    """A model made ready for the genes of one source.

    Parameters
    ----------
    counts
        Counts of its cells.
    alignment
        Where its genes go in the model.
    model
        The model as it is stored, on the device.
    fitted
        The model fitted to the genes; `model` where it need not be.
    asked
        What was asked for.
    lost
        Share of the counts that the model was trained on, of genes that the source did not measure.
    """

    counts: Counts
    alignment: Alignment
    model: Annotator
    fitted: Annotator
    asked: Asked
    lost: float

    @classmethod
    def ready(cls, model: Annotator, counts: Counts, asked: Asked, name: str) -> Labeller:
        """Match the genes of a source, called `name` in messages, and fit the model to them where that helps."""
        alignment = align(
            counts.genes,
            model.vocabulary,
            species=asked.species,
            column=asked.gene_column,
            min_coverage=asked.min_coverage,
            name=name,
        )
        model = model.on(choose_device(asked.device))
        fits = asked.adapt and worth_fitting(model, alignment.measured)
        fitted = fitted_to(model, alignment.measured) if fits else model
        return cls(counts, alignment, model, fitted, asked, lost_share(model, alignment.measured))

    @property
    def rejector(self) -> Rejector:
        """What tells unknown cells."""
        if self.fitted.rejector is None:
            raise ValueError("the model has no rejector")
        return self.fitted.rejector

    def block(self, start: int, stop: int) -> Block:
        """What the model says of the cells `start` to `stop - 1`; the cells themselves are not kept."""
        counts = self.counts.rows(start, stop)
        view = View.whole(self.alignment.apply(counts), self.alignment.measured)
        outputs = self.fitted.outputs(view)
        score = self.rejector.score(outputs) if self.rejector.per_cell else None
        return Block(replace(outputs, view=None), score, np.diff(counts.indptr) == 0, view.totals == 0)

    def blocks(self, first: int, end: int) -> Iterator[tuple[int, int, Block]]:
        """`block` of the cells `first` to `end - 1`, in order: their start, their stop and what the model says of them.

        Several threads of the CPU each read, tokenise and label blocks of their own, so that one reads while another
        computes. What is in memory at a time stays `Asked.chunk` cells, give or take a block. The caller's number of
        threads (of torch) is how many there are, and changes no number; backbones that spread their own work have one.
        """
        n_threads = min(torch.get_num_threads(), MOST_THREADS) if self.fitted.backbone.threaded else 1
        spans = _spans(first, end, self.asked.chunk, n_threads)
        if n_threads == 1 or len(spans) == 1:
            yield from ((start, stop, self.block(start, stop)) for start, stop in spans)
            return
        before = torch.get_num_threads()
        under_way: deque[tuple[int, int, Future[Block]]] = deque()
        pool = ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,))
        try:
            for start, stop in spans:
                under_way.append((start, stop, pool.submit(self.block, start, stop)))
                if len(under_way) > n_threads:
                    one, last, block = under_way.popleft()
                    yield one, last, block.result()
            for one, last, block in under_way:
                yield one, last, block.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)

    def verdicts(self, block: Block, threshold: float) -> Verdicts:
        """Label, confidence and score of each cell of a block."""
        score = self.rejector.score(block.outputs) if block.score is None else block.score
        return Verdicts(
            block.outputs.codes,
            (score > threshold) | block.nothing,
            np.where(block.nothing, 0.0, block.outputs.confidence).astype(np.float32),
            score.astype(np.float32),
            self._members(block.outputs),
        )

    def _members(self, outputs: Outputs) -> np.ndarray | None:
        if self.asked.sets is None or self.fitted.sets is None:
            return None
        return np.packbits(self.fitted.sets.members(outputs.log_proba, self.asked.sets), axis=1)

    def threshold(self, block: Block | None = None) -> float:
        """Score above which a cell is called unknown; `block` is all cells, which only some rejectors need."""
        if self.asked.rate is None:
            return math.inf
        if self.rejector.per_cell or block is None:
            return self.rejector.threshold(self.asked.rate)
        return self.rejector.threshold_among(block.outputs, self.asked.rate)

    def info(self, threshold: float, *, empty: np.ndarray, nothing: int) -> dict[str, Any]:
        """What is written into ``uns``; `empty` (B,) are the cells without a count, `nothing` how many the model sees
        no count of.
        """
        rate, coverage, rejector = self.asked.rate, self.alignment.coverage, self.rejector
        notes = list(self.counts.notes)
        if not self.counts.looked_for_empty and empty.any():
            notes.append(empty_note(self.counts.cells, np.flatnonzero(empty)))
        if rate is not None and math.isinf(threshold):
            notes.append(UNCALIBRATED)
        adapted = self.fitted is not self.model
        if adapted:
            notes.append(
                f"the query did not measure genes that hold {100 * self.lost:.0f} % of the counts the model was "
                "trained on: the linear member was fitted again on the genes that are there"
            )
        if self.asked.species != "auto":
            found = canonical_genes(self.counts.genes, column=self.asked.gene_column).species
            if found != coverage.species:
                notes.append(
                    f"the genes were read as {coverage.species}, as --species says, but their names look {found}: only "
                    f"those with the same letters in both were found; pass --species {found}, or leave it out"
                )
        if not rejector.per_cell and rate is not None:
            notes.append(
                f"`{rejector.name}` calls a cell unknown by the other cells of the query, whatever the rate: "
                "it is there for comparison only"
            )
        if nothing:
            notes.append(f"{nothing:,} cells have no count of a gene that the model knows: called unknown")
        return {
            "model": self.asked.model_name,
            "model_fingerprint": self.model.fingerprint,
            "version": __version__,
            "stages": len(self.model.ledger),
            "species": coverage.species,
            "counts_source": self.counts.source,
            "counts_transform": self.counts.transform,
            "coverage": {**coverage.to_dict(), "sentence": coverage.sentence()},
            "rejector": rejector.name,
            "rejection_rate": "off" if rate is None else rate,
            "threshold": threshold,
            **self._info_of_sets(),
            "lost_share": self.lost,
            "adapted": adapted,
            "classes": list(self.model.types.names),
            "notes": notes,
        }

    def _info_of_sets(self) -> dict[str, Any]:
        rate, sets = self.asked.sets, self.fitted.sets
        if rate is None or sets is None:
            return {}
        few = np.flatnonzero(~sets.conditional(rate))
        return {"set_error_rate": rate, "set_too_few_cells": [self.model.types.names[code] for code in few]}


def _spans(first: int, end: int, chunk: int, n_threads: int) -> list[tuple[int, int]]:
    """Starts and stops of even blocks: about `chunk` cells in all threads; long blocks are of whole batches."""
    rounds = max(-(-(end - first) // max(chunk, 1)), 1)
    size = max(-(-(end - first) // (rounds * n_threads)), 1)
    if size > BATCH:
        size = -(-size // BATCH) * BATCH
    return [(start, min(start + size, end)) for start in range(first, end, size)]


def table(model: Annotator, verdicts: Verdicts, cells: pd.Index, key: str) -> pd.DataFrame:
    """The columns of ``obs``: label, confidence, unknown score, Cell Ontology id."""
    n_types = len(model.types.names)
    ids = [one or "" for one in model.types.ontology_ids]
    shown = list(dict.fromkeys([*ids, ""]))
    place = np.array([shown.index(one) for one in [*ids, ""]])
    codes = np.where(verdicts.rejected, n_types, verdicts.codes)
    found = pd.DataFrame(
        {
            key: pd.Categorical.from_codes(codes, categories=pd.Index([*model.types.names, UNKNOWN])),
            f"{key}_confidence": verdicts.confidence,
            f"{key}_unknown_score": verdicts.score,
            f"{key}_ontology_term_id": pd.Categorical.from_codes(place[codes], categories=pd.Index(shown)),
        },
        index=cells,
    )
    if verdicts.members is not None:
        for name, column in _columns_of_sets(model, verdicts.members, verdicts.rejected).items():
            found[f"{key}_{name}"] = column
    return found


def _columns_of_sets(model: Annotator, members: np.ndarray, rejected: np.ndarray) -> dict[str, pd.Categorical]:
    """The set of each cell, and what all of its types are; of rejected cells the set alone."""
    n_types = len(model.types.names)
    distinct, which = np.unique(members, axis=0, return_inverse=True)
    sets = np.unpackbits(distinct, axis=1, count=n_types).astype(bool)
    told = lineages(sets, model.types)
    names = np.array([*(name for name, _ in told), UNKNOWN], dtype=object)
    ids = np.array([*(id for _, id in told), ""], dtype=object)
    place = np.where(rejected, len(told), which.ravel())
    return {
        "set": pd.Categorical.from_codes(which.ravel(), categories=pd.Index(set_names(sets, model.types))),
        "lineage": pd.Categorical(names[place]),
        "lineage_ontology_term_id": pd.Categorical(ids[place]),
    }


def joined_info(parts: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """What is written into ``uns`` for merged cells, from that of their sources.

    What is one number for a file (coverage, threshold) is that of the source with the fewest genes of the model; those
    of all are in ``sources``.
    """
    if len(parts) == 1:
        return dict(parts[0][1])
    own = ("coverage", "threshold", "lost_share", "adapted", "counts_source", "counts_transform", "species")
    return {
        **min((info for _, info in parts), key=lambda info: info["coverage"]["share_of_model"]),
        "sources": {name: {key: info[key] for key in own} for name, info in parts},
        "notes": [f"{name}: {note}" for name, info in parts for note in info["notes"]],
    }
