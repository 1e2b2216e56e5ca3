"""The gather of `latent` on a CPU: gated sums of gene embeddings, compiled, with their gradient.

The same sums as two tensor operations would need a copy of the gene embeddings for every token, (B, L, D); these loops
read each embedding where it lies. A cell's result does not depend on the other cells of the batch or on padding, to the
last bit. Threads share out cells or members, never the terms of one sum, so their number changes nothing either.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from evercell.threads import shared_out

_MOST = 40.0  # exponents beyond this are cut off: the product of two such factors is still a number
_KNOWN = 8  # values of tokens whose part of the gates is kept


@numba.njit(cache=True, nogil=True)
def _add(embedding, genes, weights, sums):  # type: ignore[no-untyped-def]
    """Add the rows of four genes to `sums` (S, M, D / S), with weights (S * M, 4).

    One after the other, as single tokens would be; but a sum is read and written once for four.
    """
    n_latents, width = sums.shape[1], sums.shape[2]
    for member in range(sums.shape[0]):
        own = slice(member * width, (member + 1) * width)
        row0, row1, row2, row3 = (
            embedding[genes[0], own], embedding[genes[1], own], embedding[genes[2], own], embedding[genes[3], own],
        )  # fmt: skip
        for m in range(n_latents):
            k = member * n_latents + m
            w0, w1, w2, w3 = weights[k, 0], weights[k, 1], weights[k, 2], weights[k, 3]
            into = sums[member, m]
            for d in range(width):
                into[d] = (((into[d] + w0 * row0[d]) + w1 * row1[d]) + w2 * row2[d]) + w3 * row3[d]


@numba.njit(cache=True, nogil=True)
def _forward(  # type: ignore[no-untyped-def]
    start, stop, gene_ids, values, lengths, embedding, gene_gate, slope, bias, gates, sums
):
    """Fill `gates` (B, L, S * M), the sigmoids, and `sums` (B, S, M, D / S), for the cells `start` to `stop`."""
    n_gates = gates.shape[2]
    weights = np.zeros((n_gates, 4), dtype=np.float32)
    genes = np.zeros(4, dtype=np.int64)
    for cell in range(start, stop):
        sums[cell] = 0.0
        for first in range(0, lengths[cell], 4):
            for j in range(4):
                if first + j >= lengths[cell]:
                    weights[:, j] = 0.0
                    continue
                gene, value = gene_ids[cell, first + j], values[cell, first + j]
                genes[j] = gene
                for k in range(n_gates):
                    exponent = -(gene_gate[gene, k] + slope[k] * value + bias[k])
                    gate = np.float32(1.0) / (np.float32(1.0) + np.exp(exponent))
                    gates[cell, first + j, k] = gate
                    weights[k, j] = gate * value
            _add(embedding, genes, weights, sums[cell])


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _backward_weights(  # type: ignore[no-untyped-def]
    start, stop, gene_ids, lengths, embedding, grad_sums, grad_weight
):
    """Fill `grad_weight` (B, L, S * M), the gradient of each token's weight, for the cells `start` to `stop`."""
    n_latents, width = grad_sums.shape[2], grad_sums.shape[3]
    for cell in range(start, stop):
        for token in range(lengths[cell]):
            gene = gene_ids[cell, token]
            for k in range(grad_weight.shape[2]):
                member = k // n_latents
                row = embedding[gene, member * width : (member + 1) * width]
                grad = grad_sums[cell, member, k % n_latents]
                dot = np.float32(0.0)
                for d in range(width):
                    dot += row[d] * grad[d]
                grad_weight[cell, token, k] = dot


@numba.njit(cache=True, nogil=True)
def _backward_embedding(  # type: ignore[no-untyped-def]
    start, stop, gene_ids, values, lengths, gates, grad_sums, grad_embedding
):
    """Fill `grad_embedding` (S, G, D / S) for the members `start` to `stop`; no two threads add to one place."""
    n_latents, width = grad_sums.shape[2], grad_sums.shape[3]
    for member in range(start, stop):
        for cell in range(gene_ids.shape[0]):
            for token in range(lengths[cell]):
                row = grad_embedding[member, gene_ids[cell, token]]
                value = values[cell, token]
                for m in range(n_latents):
                    weight = gates[cell, token, member * n_latents + m] * value
                    grad = grad_sums[cell, member, m]
                    for d in range(width):
                        row[d] += weight * grad[d]


@numba.njit(cache=True, nogil=True)
def _backward_gates(  # type: ignore[no-untyped-def]
    gene_ids, values, lengths, gates, grad_weight, grad_gene_gate, grad_slope, grad_bias
):
    """Fill the gradients of the gate's parameters from `grad_weight` (B, L, S * M)."""
    for cell in range(gene_ids.shape[0]):
        for token in range(lengths[cell]):
            gene, value = gene_ids[cell, token], values[cell, token]
            for k in range(gates.shape[2]):
                gate = gates[cell, token, k]
                grad = grad_weight[cell, token, k] * value * gate * (np.float32(1.0) - gate)
                grad_gene_gate[gene, k] += grad
                grad_slope[k] += grad * value
                grad_bias[k] += grad


@numba.njit(cache=True, nogil=True)
def _gather(  # type: ignore[no-untyped-def]
    start, stop, gene_ids, values, lengths, embedding, gene_factor, slope, sums
):
    """Fill `sums` (B, S, M, D / S) for the cells `start` to `stop`, with the gene's part of each gate given.

    Most tokens of a cell hold one of a few small counts, so the value's part of the gates is kept for the last few.
    """
    n_gates = sums.shape[1] * sums.shape[2]
    known = np.empty(_KNOWN, dtype=np.float32)
    value_factor = np.empty((_KNOWN, n_gates), dtype=np.float32)
    weights = np.zeros((n_gates, 4), dtype=np.float32)
    genes = np.zeros(4, dtype=np.int64)
    for cell in range(start, stop):
        sums[cell] = 0.0
        known[:] = -1.0
        oldest = 0
        for first in range(0, lengths[cell], 4):
            for j in range(4):
                if first + j >= lengths[cell]:
                    weights[:, j] = 0.0
                    continue
                gene, value = gene_ids[cell, first + j], values[cell, first + j]
                genes[j] = gene
                place = 0
                while place < _KNOWN and known[place] != value:
                    place += 1
                if place == _KNOWN:
                    place, oldest = oldest, (oldest + 1) % _KNOWN
                    known[place] = value
                    for k in range(n_gates):
                        exponent = min(max(-slope[k] * value, np.float32(-_MOST)), np.float32(_MOST))
                        value_factor[place, k] = np.exp(exponent)
                for k in range(n_gates):
                    weights[k, j] = value / (np.float32(1.0) + gene_factor[gene, k] * value_factor[place, k])
            _add(embedding, genes, weights, sums[cell])


def gated_sums(
    gene_ids: Tensor,
    values: Tensor,
    lengths: Tensor,
    embedding: Tensor,
    gene_gate: Tensor,
    slope: Tensor,
    bias: Tensor,
    members: int,
) -> Tensor:
    """What `GatedSum` gives, to rounding, for annotation: no gradient, and about half the time.

    ``sigmoid(a + w v + b) = 1 / (1 + exp(-a - b) exp(-w v))``: the first factor belongs to the gene and is made once a
    batch, the second to the value.
    """
    genes, token_values, n_tokens, rows, slopes = (
        x.detach().numpy() for x in (gene_ids, values, lengths, embedding, slope)
    )
    gene_factor = np.exp(np.clip(-(gene_gate + bias).detach().numpy(), -_MOST, _MOST))
    shape = (gene_ids.shape[0], members, gene_gate.shape[1] // members, embedding.shape[1] // members)
    sums = np.empty(shape, dtype=np.float32)

    def work(start: int, stop: int) -> None:
        _gather(start, stop, genes, token_values, n_tokens, rows, gene_factor, slopes, sums)

    shared_out(len(sums), work)
    return torch.from_numpy(sums)


class GatedSum(torch.autograd.Function):
    """``z[b, s, m] = sum_t sigmoid(a[g_t, s, m] + w_sm v_t + b_sm) v_t e[g_t, s]`` over the tokens of each cell.

    Tensors in float32 on the CPU: gene_ids (B, L) int64, values (B, L), lengths (B,) int64, embedding (G, D), gene_gate
    (G, S * M), slope and bias (S * M,); then the number of members S. Returns (B, S, M, D / S). Values get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gene_ids: Tensor,
        values: Tensor,
        lengths: Tensor,
        embedding: Tensor,
        gene_gate: Tensor,
        slope: Tensor,
        bias: Tensor,
        members: int,
    ) -> Tensor:
        """Gated sums (B, S, M, D / S)."""
        ids, tokens, ends, genes, gate, factor, offset = (
            x.detach().numpy() for x in (gene_ids, values, lengths, embedding, gene_gate, slope, bias)
        )
        n_latents, width = gene_gate.shape[1] // members, embedding.shape[1] // members
        gates = np.empty((*gene_ids.shape, gene_gate.shape[1]), dtype=np.float32)
        sums = torch.empty(gene_ids.shape[0], members, n_latents, width)
        into = sums.numpy()
        shared_out(len(ids), lambda i, j: _forward(i, j, ids, tokens, ends, genes, gate, factor, offset, gates, into))
        ctx.save_for_backward(gene_ids, values, lengths, embedding, torch.from_numpy(gates))
        return sums

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of embedding, gene_gate, slope and bias."""
        gene_ids, values, lengths, embedding, gates = (x.detach().numpy() for x in ctx.saved_tensors)
        grads = grad_outputs[0].contiguous().numpy()
        n_genes, (members, _, width) = embedding.shape[0], grads.shape[1:]
        by_member = np.zeros((members, n_genes, width), dtype=np.float32)
        grad_weight = np.empty_like(gates)
        shared_out(
            len(gene_ids), lambda i, j: _backward_weights(i, j, gene_ids, lengths, embedding, grads, grad_weight)
        )
        shared_out(members, lambda i, j: _backward_embedding(i, j, gene_ids, values, lengths, gates, grads, by_member))
        grad_embedding = by_member.transpose(1, 0, 2).reshape(embedding.shape)
        grad_gate = np.zeros((n_genes, gates.shape[2]), dtype=np.float32)
        grad_slope, grad_bias = np.zeros((2, gates.shape[2]), dtype=np.float32)
        _backward_gates(gene_ids, values, lengths, gates, grad_weight, grad_gate, grad_slope, grad_bias)
        found = (torch.from_numpy(x) for x in (grad_embedding, grad_gate, grad_slope, grad_bias))
        return None, None, None, *found, None
