"""The gather of `latent` on a CPU: gated sums of gene embeddings, compiled, with their gradient.

The same sums as two tensor operations would need a copy of the gene embeddings for every token, (B, L, D); these
loops read each embedding where it lies. A cell's result does not depend on the other cells of the batch or on padding, to the
last bit. Threads share out cells or columns, never the terms of one sum, so their number changes nothing either.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

_COLUMN_CHUNKS = 2


@numba.njit(parallel=True, cache=True, nogil=True)
def _forward(gene_ids, values, lengths, embedding, gene_gate, slope, bias, gates, sums):  # type: ignore[no-untyped-def]
    """Fill `gates` (B, L, M), the sigmoids, and `sums` (B, M, D)."""
    n_latents, width = gene_gate.shape[1], embedding.shape[1]
    for cell in numba.prange(gene_ids.shape[0]):
        sums[cell] = 0.0
        for token in range(lengths[cell]):
            gene, value = gene_ids[cell, token], values[cell, token]
            for m in range(n_latents):
                gate = np.float32(1.0) / (np.float32(1.0) + np.exp(-(gene_gate[gene, m] + slope[m] * value + bias[m])))
                gates[cell, token, m] = gate
                weight = gate * value
                for d in range(width):
                    sums[cell, m, d] += weight * embedding[gene, d]


@numba.njit(parallel=True, cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _backward_weights(gene_ids, lengths, embedding, grad_sums, grad_weight):  # type: ignore[no-untyped-def]
    """Fill `grad_weight` (B, L, M), the gradient of each token's weight in each latent."""
    n_latents, width = grad_sums.shape[1], embedding.shape[1]
    for cell in numba.prange(gene_ids.shape[0]):
        for token in range(lengths[cell]):
            row = embedding[gene_ids[cell, token]]
            for m in range(n_latents):
                grad = grad_sums[cell, m]
                dot = np.float32(0.0)
                for d in range(width):
                    dot += row[d] * grad[d]
                grad_weight[cell, token, m] = dot


@numba.njit(parallel=True, cache=True, nogil=True)
def _backward_embedding(gene_ids, values, lengths, gates, grad_sums, grad_embedding):  # type: ignore[no-untyped-def]
    """Fill `grad_embedding` (C, G, D / C), its columns in chunks so that threads never add to one place."""
    n_latents, width = grad_sums.shape[2], grad_sums.shape[3]
    for chunk in numba.prange(grad_embedding.shape[0]):
        for cell in range(gene_ids.shape[0]):
            for token in range(lengths[cell]):
                row = grad_embedding[chunk, gene_ids[cell, token]]
                value = values[cell, token]
                for m in range(n_latents):
                    weight = gates[cell, token, m] * value
                    grad = grad_sums[chunk, cell, m]
                    for d in range(width):
                        row[d] += weight * grad[d]


@numba.njit(cache=True, nogil=True)
def _backward_gates(  # type: ignore[no-untyped-def]
    gene_ids, values, lengths, gates, grad_weight, grad_gene_gate, grad_slope, grad_bias
):
    """Fill the gradients of the gate's parameters from `grad_weight` (B, L, M)."""
    n_latents = gates.shape[2]
    for cell in range(gene_ids.shape[0]):
        for token in range(lengths[cell]):
            gene, value = gene_ids[cell, token], values[cell, token]
            for m in range(n_latents):
                gate = gates[cell, token, m]
                grad = grad_weight[cell, token, m] * value * gate * (np.float32(1.0) - gate)
                grad_gene_gate[gene, m] += grad
                grad_slope[m] += grad * value
                grad_bias[m] += grad


class GatedSum(torch.autograd.Function):
    """``z[b, m] = sum_t sigmoid(a[g_t, m] + w_m v_t + b_m) v_t e[g_t]`` over the tokens of each cell.

    Tensors in float32 on the CPU: gene_ids (B, L) int64, values (B, L), lengths (B,) int64, embedding (G, D), gene_gate
    (G, M), slope (M,), bias (M,). Returns (B, M, D). Values get no gradient.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        gene_ids: Tensor,
        values: Tensor,
        lengths: Tensor,
        embedding: Tensor,
        gene_gate: Tensor,
        slope: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """Gated sums (B, M, D)."""
        parts = [x.detach().numpy() for x in (gene_ids, values, lengths, embedding, gene_gate, slope, bias)]
        n_latents = gene_gate.shape[1]
        gates = np.empty((*gene_ids.shape, n_latents), dtype=np.float32)
        sums = torch.empty(gene_ids.shape[0], n_latents, embedding.shape[1])
        _forward(*parts, gates, sums.numpy())
        ctx.save_for_backward(gene_ids, values, lengths, embedding, torch.from_numpy(gates))
        return sums

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of embedding, gene_gate, slope and bias."""
        gene_ids, values, lengths, embedding, gates = (x.detach().numpy() for x in ctx.saved_tensors)
        n_genes, n_latents = embedding.shape[0], gates.shape[2]
        n_chunks = _COLUMN_CHUNKS if embedding.shape[1] % _COLUMN_CHUNKS == 0 else 1
        grad_chunks = np.zeros((n_chunks, n_genes, embedding.shape[1] // n_chunks), dtype=np.float32)
        grad_weight = np.empty_like(gates)
        grads = grad_sums.contiguous().numpy()
        _backward_weights(gene_ids, lengths, embedding, grads, grad_weight)
        by_chunk = np.ascontiguousarray(grads.reshape(*grads.shape[:2], n_chunks, -1).transpose(2, 0, 1, 3))
        _backward_embedding(gene_ids, values, lengths, gates, by_chunk, grad_chunks)
        grad_embedding = grad_chunks.transpose(1, 0, 2).reshape(embedding.shape)
        grad_gate = np.zeros((n_genes, n_latents), dtype=np.float32)
        grad_slope, grad_bias = np.zeros((2, n_latents), dtype=np.float32)
        _backward_gates(gene_ids, values, lengths, gates, grad_weight, grad_gate, grad_slope, grad_bias)
        found = (torch.from_numpy(x) for x in (grad_embedding, grad_gate, grad_slope, grad_bias))
        return None, None, None, *found
