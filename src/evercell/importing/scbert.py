"""Checkpoints of the scBERT family: weights of a performer-pytorch ``PerformerLM`` over gene tokens.

scBERT (Yang et al., Nature Machine Intelligence 2022), CANAL (Wan et al., Briefings in Bioinformatics 2024) and
TransAnno-Net (2025) save such a model with ``torch.save``. Only tensors are read from the file (``weights_only``);
`backbones.performer` gives the same numbers with settings that follow from their shapes.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evercell.annotator import Annotator
from evercell.backbones.performer import PerformerBackbone
from evercell.errors import GenesError, ModelError, words_of
from evercell.heads import GrowingHead
from evercell.importing.genes import gene_order, vocabulary_of
from evercell.ledger import Ledger
from evercell.tokenizers.bins import N_BINS, BinsTokenizer
from evercell.training import seeded

NESTED = ("model_state_dict", "state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")  # of torch's parallel and compiled wrappers
TOKENS = {
    True: "every measured gene has a token, as in training of the checkpoint",
    False: "expressed genes only have tokens, where in training of the checkpoint all genes had",
}
TWICE = "performer.proj_updater.instance."  # the blocks again, as performer-pytorch 1.0.11 names them
ATTENTION, FORWARD = "performer.net.layers.{}.0", "performer.net.layers.{}.1"


def import_scbert(
    path: str | os.PathLike[str],
    genes: str | os.PathLike[str] | Sequence[str],
    *,
    species: str = "auto",
    zeros: bool = False,
) -> Annotator:
    """Read a checkpoint of the scBERT family as a pretrained model, for `train` to start from.

    Parameters
    ----------
    path
        File that ``torch.save`` wrote: weights by name, also under ``model_state_dict`` or behind ``module.``.
    genes
        Genes in the order of the checkpoint's table of positions, which does not name them: a list, a text file with
        one a line, or an ``.h5ad`` file whose ``var_names`` they are. For scBERT's own checkpoint these are the 16,906
        genes of its ``panglao`` file. The table may have one row more, for the token that is added to every cell.
    species
        ``human``, ``mouse`` or ``auto``.
    zeros
        Every measured gene has a token, as in training of the checkpoint: with scBERT's sizes 20 seconds a cell on one
        core, and about 60 GB for the 128 cells that are embedded at a time. By default expressed genes only have
        tokens, which is a tenth of that and an input that the checkpoint was not trained on: train on from there.

    Returns
    -------
    Annotator
        A model without types. Token states, under its final norm, are those of the checkpoint for one cell at a time,
        with the stored projections of its attention. Left out are the decoder over bins and the classifier, whose types
        are not named in the file; the representation is the mean of the tokens. Genes that a query did not measure have
        no token, where scBERT takes them as not expressed.

    Raises
    ------
    ModelError
        If the file holds more than tensors, or another network than this one.
    GenesError
        If the genes are not as many as the table of positions has rows.
    """
    path = Path(path)
    state = _Weights(_tensors(path), path)
    table, positions = state.take("token_emb.weight"), state.take("pos_emb.emb.weight", "pos_emb.weight")
    if len(table) != N_BINS:
        raise ModelError(
            f"`{path}` has {len(table)} values of expression; evercell's bins have {N_BINS}: none, five levels, mask",
            hint="only checkpoints with bin_num 5 can be imported",
        )
    names = gene_order(genes) if isinstance(genes, str | os.PathLike) else list(genes)
    if len(names) not in (len(positions), len(positions) - 1):
        raise GenesError(
            f"{len(names):,} genes were given, but `{path}` has positions for {len(positions) - 1:,} genes and the "
            f"token that is added to every cell, or for {len(positions):,} genes without it",
            hint="give --genes the list that it was trained with, in that order",
        )
    extra = len(names) == len(positions) - 1
    vocabulary, rows, dropped = vocabulary_of(names, species=species)
    settings, weights = _blocks(state, width=table.shape[1])
    weights |= {"value_encoder.table.weight": table, "gene_embedding.weight": positions[torch.from_numpy(rows)]}
    weights |= {"final_norm.weight": state.take("norm.weight"), "final_norm.bias": state.take("norm.bias")}
    if extra:
        settings["extra_token"] = True
        weights["extra_embedding"] = positions[-1]
    left_out = state.left_out()
    tokenizer = BinsTokenizer(zeros=zeros, raised=False)
    with seeded(0):
        backbone = PerformerBackbone(len(vocabulary), n_bins=tokenizer.n_bins, **settings)
        head = GrowingHead(backbone.width, 0)
    try:
        backbone.load_state_dict({name: array.float() for name, array in weights.items()})
    except RuntimeError as error:
        raise ModelError(
            f"the weights of `{path}` do not fit together: {words_of(error)}",
            hint="download it again",
        ) from error
    facts = {
        "verb": "import",
        "source": {"format": "scbert", "name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        "data": [],
        "types_added": [],
        "settings": {"zeros": zeros, "backbone": backbone.settings},
        "genes": len(vocabulary),
        "notes": [*_notes(names, dropped, left_out, extra=extra), TOKENS[zeros]],
    }
    return Annotator.begun(vocabulary, tokenizer, backbone.eval(), head.eval(), ledger=Ledger().appended(facts))


class _Weights:
    """Tensors of a checkpoint by name; each is taken once, and what is left must be known."""

    def __init__(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        self.tensors, self.path = dict(tensors), path

    def take(self, *names: str) -> Tensor:
        """The tensor under the first of the names that is there."""
        for name in names:
            if name in self.tensors:
                return self.tensors.pop(name)
        raise ModelError(
            f"`{self.path}` has no weights `{names[0]}`: it is no PerformerLM with a table of positions",
            hint="give a checkpoint of scBERT, CANAL or TransAnno-Net",
        )

    def left_out(self) -> list[str]:
        """Names of what evercell has no use for: decoder, classifier and counters.

        Raises
        ------
        ModelError
            If there is something else, without which the numbers would be others.
        """
        known = [
            name for name in self.tensors if name.startswith("to_out.") or name.endswith("calls_since_last_redraw")
        ]
        if strange := sorted(set(self.tensors) - set(known)):
            raise ModelError(
                f"`{self.path}` holds `{strange[0]}`, which evercell's performer has no place for",
                hint="only plain PerformerLM blocks can be imported: no local attention, ReZero, ScaleNorm or GLU",
            )
        return sorted(name for name in known if name.startswith("to_out."))


def _tensors(path: Path) -> dict[str, Tensor]:
    """Weights by name, without the prefixes of wrappers. Nothing but tensors and plain containers is read."""
    if not path.is_file():
        raise ModelError(f"there is no checkpoint `{path}`", hint="check the path")
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise errors of many classes
        more = re.search(r"GLOBAL ([\w.]+)|unrecognized (?:class|function)|Can only build", str(error))
        if more:
            named = f" (`{more[1]}`)" if more[1] else ""
            raise ModelError(
                f"`{path}` holds more than weights{named}; reading it could run code",
                hint="where the file is trusted, save its weights alone: torch.save({'model_state_dict': "
                "torch.load(FILE, weights_only=False)['model_state_dict']}, 'weights.pth')",
            ) from error
        raise ModelError(
            f"`{path}` cannot be read as a checkpoint of torch: {words_of(error)}",
            hint="copy or download it again",
        ) from error
    while isinstance(found, Mapping) and (inner := next((key for key in NESTED if key in found), None)) is not None:
        found = found[inner]
    if not isinstance(found, Mapping):
        raise ModelError(f"`{path}` holds no weights by name", hint="give the file that training wrote")
    tensors = {}
    for name, value in found.items():
        if isinstance(value, Tensor):
            plain = str(name)
            while prefix := next((one for one in PREFIXES if plain.startswith(one)), None):
                plain = plain.removeprefix(prefix)
            if not plain.startswith(TWICE):
                tensors[plain] = value
    return tensors


def _blocks(state: _Weights, *, width: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of the blocks, as `PerformerBackbone` names them."""
    pattern = re.compile(re.escape(ATTENTION).replace(r"\{\}", r"(\d+)") + r"\.norm\.weight")
    depth = len({found[1] for name in state.tensors if (found := pattern.fullmatch(name))})
    if not depth:
        raise ModelError(
            f"`{state.path}` has no blocks `{ATTENTION.format(0)}` with a layer norm before their attention",
            hint="reversible blocks, ReZero and ScaleNorm cannot be imported",
        )
    weights: dict[str, Tensor] = {}
    shapes = set()
    for number in range(depth):
        old, forward, new = ATTENTION.format(number), FORWARD.format(number), f"blocks.{number}"
        projection = state.take(f"{old}.fn.fast_attention.projection_matrix")
        parts = [state.take(f"{old}.fn.to_{one}.weight") for one in "qkv"]
        biases = [state.tensors.pop(f"{old}.fn.to_{one}.bias", torch.zeros(len(parts[0]))) for one in "qkv"]
        inner = len(parts[0])
        up, down = (
            [state.take(*(f"{forward}.{fn}.{one}.{kind}" for fn in ("fn.fn", "fn"))) for kind in ("weight", "bias")]
            for one in ("w1", "w2")
        )
        if len(up[0]) != down[0].shape[1] or inner % projection.shape[1]:
            raise ModelError(
                f"block {number} of `{state.path}` is of another kind: w1 has {len(up[0])} rows for {down[0].shape[1]} "
                f"columns of w2, to_q {inner} rows for heads of {projection.shape[1]}",
                hint="gated feed-forward networks and local attention cannot be imported",
            )
        shapes.add((inner // projection.shape[1], projection.shape[1], len(projection), len(up[0]) // width))
        weights |= {
            f"{new}.attention.projection": projection,
            f"{new}.attention.query_key_value.weight": torch.cat(parts),
            f"{new}.attention.query_key_value.bias": torch.cat(biases),
            f"{new}.feed_forward.up.weight": up[0],
            f"{new}.feed_forward.up.bias": up[1],
            f"{new}.feed_forward.down.weight": down[0],
            f"{new}.feed_forward.down.bias": down[1],
        }
        weights[f"{new}.attention.output.weight"] = state.take(f"{old}.fn.to_out.weight")
        weights[f"{new}.attention.output.bias"] = state.tensors.pop(f"{old}.fn.to_out.bias", torch.zeros(width))
        for kind in ("weight", "bias"):
            weights[f"{new}.norm_attention.{kind}"] = state.take(f"{old}.norm.{kind}")
            weights[f"{new}.norm_feed_forward.{kind}"] = state.take(f"{forward}.norm.{kind}")
    if len(shapes) > 1:
        raise ModelError(f"the blocks of `{state.path}` are of several sizes", hint="they must be alike to be imported")
    n_heads, head_width, n_features, expansion = shapes.pop()
    settings = {"width": width, "depth": depth, "n_heads": n_heads, "expansion": expansion, "published_kernel": True}
    if n_heads * head_width != width:
        settings["head_width"] = head_width
    if n_features != max(int(head_width * math.log(head_width)), 1):
        settings["n_features"] = n_features
    return settings, weights


def _notes(names: Sequence[str], dropped: Sequence[str], left_out: Sequence[str], *, extra: bool) -> list[str]:
    """What the user is to be told of the import."""
    found = [f"{len(names):,} genes in the order of the checkpoint"]
    if extra:
        found.append("the last position is that of the token which is added to every cell; it is kept as such")
    if dropped:
        shown = ", ".join(dropped[:5]) + (" and others" if len(dropped) > 5 else "")
        found.append(f"{len(dropped):,} names mean a gene that is there under another name and are left out: {shown}")
    if left_out:
        classifier = any(name.startswith(("to_out.fc", "to_out.conv")) for name in left_out)
        what = "a classifier, whose types the file does not name" if classifier else "the decoder over bins"
        found.append(f"left out: {what}")
    return [*found, "attention with softmax features was taken for granted: the file does not name its kernel"]
