"""A model in forms that other programs read: the way from tokens to types as ONNX, the linear weights as CSV."""

from __future__ import annotations

import copy
import csv
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evercell import __version__
from evercell.annotator import Annotator
from evercell.backbones.latent import LatentBackbone
from evercell.errors import ModelError, SettingsError
from evercell.outputs import atomic_path
from evercell.profiles import LEAST, NEVER
from evercell.tokenizers import TokenBatch

OPSET = 18
INTERCEPT = "(intercept)"


def export_csv(model: Annotator, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Write the weights of the linear member, a row a gene and a column a type.

    Lines that begin with ``#`` say how the table is used; `pandas.read_csv` passes over them with ``comment="#"``.

    Parameters
    ----------
    model
        A model with a linear member.
    path
        File to be written.

    Returns
    -------
    dict
        Numbers of ``genes`` and ``types`` that were written.

    Raises
    ------
    ModelError
        If the model has no linear member.
    """
    linear = model.linear
    if linear is None:
        raise ModelError(
            "the model has no linear member, and so no weights of genes"
            + ("" if len(model.types) else " and no types"),
            hint="export it as onnx, or train it with one",
        )
    rows = np.flatnonzero(linear.weight.any(axis=1))
    extra = {name: array for name, array in linear.arrays().items() if name in ("centre", "ceiling")}
    steps = ["x = log(1 + 10000 * count / total), the total over the cell's genes that the model knows"]
    if "ceiling" in extra:
        steps.append("x = min(x, ceiling)")
    if "centre" in extra:
        steps.append("x = x - centre, for the genes that were measured; others say nothing")
    steps.append(f"logit of a type = sum over genes of x * weight, plus the row {INTERCEPT}; then softmax over types")
    about = [
        f"linear member of an evercell model ({__version__}), fingerprint {model.fingerprint}",
        *steps,
        f"{len(model.vocabulary) - len(rows):,} genes of the model have no weight; they are part of the total",
    ]
    if not model.linear_only:
        about.append(
            "evercell averages its log-probabilities with those of a transformer, which this table does not hold"
        )
    with atomic_path(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as stream:
        stream.writelines(f"# {line}\n" for line in about)
        writer = csv.writer(stream, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")  # a name may hold a # or a comma
        writer.writerow(["gene", "id", *extra, *model.types.names])
        writer.writerow([INTERCEPT, "", *[0.0] * len(extra), *map(float, linear.bias)])
        symbols, names = model.vocabulary.symbols, model.vocabulary.names
        for row in rows:
            numbers = [*(float(array[row]) for array in extra.values()), *map(float, linear.weight[row])]
            writer.writerow([symbols[row], names[row], *numbers])
    return {"genes": [len(rows)], "types": [len(model.types)]}


def export_onnx(model: Annotator, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Write the way from tokens to log-probabilities as one ONNX file; batch and number of tokens stay open.

    Inputs are ``gene_ids`` (B, L) int64, ``values`` (B, L) float32 and ``mask`` (B, L) bool, as the model's tokenizer
    makes them; with other members beside a tokenizer of bins also ``logged`` (B, L), the log-normalised expression of
    each token; with profiles, or a linear member that has a centre, also ``measured`` (G,) bool, the genes that the
    study measured; where the backbone looks at the library size ``totals`` (B,), counts over the measured genes.
    Outputs are ``representation`` (B, D) and, of a model with types, ``logits`` (B, K) of the
    transformer and ``log_proba`` (B, K), the calibrated answer of the whole model. Genes, types and tokenizer are in
    the metadata of the file.

    Parameters
    ----------
    model
        Any model; it stays as it is.
    path
        File to be written.

    Returns
    -------
    dict
        Names of the ``inputs`` and ``outputs``.

    Raises
    ------
    SettingsError
        If the packages that write ONNX are not installed.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise SettingsError(f"the package `{package}` is needed to write ONNX", hint='pip install "evercell[onnx]"')
    whole = _Whole(model.on(torch.device("cpu"))).eval()
    tokens = {
        "gene_ids": torch.zeros(3, 5, dtype=torch.int64),
        "values": torch.ones(3, 5),
        "mask": torch.ones(3, 5) > 0,
    }
    tokens["mask"][0, 3:] = False
    if whole.asks_logged:
        tokens["logged"] = torch.ones(3, 5)
    batch, length = torch.export.Dim("cells", min=1), torch.export.Dim("tokens", min=1)
    shapes: dict[str, Any] = {name: {0: batch, 1: length} for name in tokens}
    if whole.asks_totals:
        tokens["totals"], shapes["totals"] = torch.ones(3), {0: batch}
    if whole.asks_measured:
        tokens["measured"], shapes["measured"] = torch.ones(len(model.vocabulary)) > 0, None
    outputs = ["representation", *(["logits", "log_proba"] if len(model.types) else [])]
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            whole,
            (),
            kwargs=tokens,
            input_names=list(tokens),
            output_names=outputs,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise ModelError("the model could not be written as ONNX", hint="report this with the version of torch")
    program.model.metadata_props.update(
        {
            "evercell": __version__,
            "fingerprint": model.fingerprint,
            "tokenizer": json.dumps(model.parts()["tokenizer"]),
            "genes": json.dumps(model.vocabulary.names),
            "symbols": json.dumps(model.vocabulary.symbols),
            "species": model.vocabulary.species,
            "types": json.dumps(model.types.names),
        }
    )
    with atomic_path(path) as unfinished:
        program.save(unfinished, external_data=False)
    return {"inputs": list(tokens), "outputs": outputs}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings on names of axes and on packages that no model of evercell needs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _Whole(nn.Module):
    """A model from tokens to log-probabilities, in operations that can be traced."""

    def __init__(self, model: Annotator) -> None:
        super().__init__()
        self.backbone, self.head = copy.deepcopy(model.backbone), copy.deepcopy(model.head)
        if isinstance(self.backbone, LatentBackbone):
            self.backbone.compiled = False  # compiled loops cannot be traced
        self.asks_totals = bool(self.backbone.settings.get("library_size"))
        self.n_types, self.temperature, self.share = len(model.types), model.temperature, model.linear_share
        self.linear = model.linear is not None
        other_members = self.linear or model.profiles is not None
        self.asks_logged = other_members and model.tokenizer.n_bins is not None
        self.asks_measured = model.profiles is not None or (
            model.linear is not None and model.linear.centre is not None
        )
        if model.linear is not None:
            for name, array in model.linear.arrays().items():
                self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)))
        self.profiles = {} if model.profiles is None else model.profiles.settings
        if model.profiles is not None:
            for name, array in model.profiles.arrays().items():
                self.register_buffer(f"profiles_{name}", torch.from_numpy(np.ascontiguousarray(array)))

    def forward(
        self,
        gene_ids: Tensor,
        values: Tensor,
        mask: Tensor,
        logged: Tensor | None = None,
        measured: Tensor | None = None,
        totals: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Representation (B, D), logits (B, K) and log-probabilities (B, K)."""
        representation = self.backbone(TokenBatch(gene_ids, values, mask, totals))
        if not self.n_types:
            return (representation,)
        logits = self.head(representation)
        log_proba = torch.log_softmax(logits, dim=1)
        expressed = (values if logged is None else logged) * mask
        if self.linear:
            told = torch.log_softmax(self._told(gene_ids, expressed, measured), dim=1)
            log_proba = (1 - self.share) * log_proba + self.share * told
        if self.profiles and measured is not None:
            share = self.profiles["share"]
            compared = torch.log_softmax(self._compared(gene_ids, expressed, measured), dim=1)
            log_proba = (1 - share) * log_proba + share * compared
        return representation, logits, torch.log_softmax(log_proba / self.temperature, dim=1)

    def _told(self, gene_ids: Tensor, expressed: Tensor, measured: Tensor | None) -> Tensor:
        """Logits of the linear member (B, K)."""
        buffers = dict(self.named_buffers(recurse=False))
        weight, offset = buffers["weight"], buffers["bias"]
        if "ceiling" in buffers:
            expressed = torch.minimum(expressed, buffers["ceiling"][gene_ids])
        if measured is not None and "centre" in buffers:
            offset = offset - (buffers["centre"] * measured) @ weight
        dense = torch.zeros(gene_ids.shape[0], weight.shape[0]).scatter_add(1, gene_ids, expressed)
        return dense @ weight + offset

    def _compared(self, gene_ids: Tensor, expressed: Tensor, measured: Tensor) -> Tensor:
        """Correlations with the profiles of the types (B, K), made to logits."""
        buffers = dict(self.named_buffers(recurse=False))
        genes, means = buffers["profiles_genes"], buffers["profiles_means"]
        counted = measured[genes].to(means.dtype)  # (M,)
        centre = means.mean(dim=1)
        about = (means - centre.unsqueeze(1)) * counted.unsqueeze(1)
        about = about / about.norm(dim=0).clamp(min=LEAST)
        dense = torch.zeros(gene_ids.shape[0], measured.shape[0]).scatter_add(1, gene_ids, expressed)
        cells = (dense[:, genes] - centre) * counted
        correlations = cells @ about / cells.norm(dim=1, keepdim=True).clamp(min=LEAST)
        return torch.where(buffers["profiles_known"], self.profiles["sharpness"] * correlations, NEVER)
