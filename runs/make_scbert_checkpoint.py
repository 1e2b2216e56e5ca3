"""Make a checkpoint of scBERT's layout with performer-pytorch itself, and what that package says of a few real cells.

    pip install --no-deps performer-pytorch==1.0.11 einops "local-attention<1.5" axial-positional-embedding==0.2.1
    python runs/make_scbert_checkpoint.py tests/importing              # the files of tests/importing/test_scbert.py
    python runs/make_scbert_checkpoint.py FOLDER --published --genes 2000

performer-pytorch is no dependency of evercell. scBERT's own class is a copy of about that version (Mar 2021) with a
table of gene2vec vectors as positions and a bias behind attention: the settings below give the same network, here with
random vectors. One step of Adam is taken, so that the optimiser's state is in the file as well; then it is saved as
scBERT saves it. The encodings are those of batches of a single cell: the package looks for the largest key in the whole
batch.

`--published` takes scBERT's sizes (width 200, depth 6, 10 heads of 64); the file is then 50 MB and more.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from performer_pytorch import PerformerLM

from evercell.examples import load_example

TINY = {"dim": 16, "depth": 2, "heads": 2, "dim_head": 8}
PUBLISHED = {"dim": 200, "depth": 6, "heads": 10, "dim_head": 64}
N_TOKENS = 7  # none, five levels, mask
N_CELLS = 4


def bins_of(counts: np.ndarray) -> torch.Tensor:
    """Tokens (B, G + 1) as scBERT's data set makes them of counts (B, G), the token behind the genes being 0."""
    scaled = 1e4 * counts / counts.sum(axis=1, keepdims=True)
    bins = np.minimum(np.log2(1 + scaled).astype(np.int64), N_TOKENS - 2)
    return torch.from_numpy(np.pad(bins, ((0, 0), (0, 1))))


def main() -> None:
    """Write checkpoint and expected encodings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--published", action="store_true", help="scBERT's sizes")
    parser.add_argument("--genes", type=int, default=60, help="number of genes")
    asked = parser.parse_args()
    cells = load_example("baron_stage1")[:N_CELLS]
    counts = cells.X.toarray().astype(np.float64)
    genes = np.sort(np.argsort(-counts.sum(axis=0), kind="stable")[: asked.genes])
    counts = counts[:, genes]

    torch.manual_seed(0)
    model = PerformerLM(
        num_tokens=N_TOKENS,
        max_seq_len=len(genes) + 1,
        **(PUBLISHED if asked.published else TINY),
        local_attn_heads=0,
        rotary_position_emb=False,  # a table of positions, as gene2vec is in scBERT
        attn_out_bias=True,
    )
    with torch.no_grad():
        model.pos_emb.emb.weight[-1] = 0.0  # scBERT's token behind the genes has no vector
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    tokens = bins_of(counts)
    model.train()
    loss = torch.nn.functional.cross_entropy(model(tokens).transpose(1, 2), tokens)
    loss.backward()
    optimizer.step()
    scheduler.step()
    model.eval()
    with torch.no_grad():
        encodings = torch.cat([model(cell[None], return_encodings=True) for cell in tokens])
    asked.folder.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "epoch": 1,
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "scheduler_state_dict": scheduler.state_dict(),
            "losses": loss.item(),
        },
        asked.folder / "scbert_checkpoint.pth",
    )
    np.savez_compressed(
        asked.folder / "scbert_expected.npz",
        genes=cells.var_names[genes].to_numpy(dtype=str),
        counts=counts.astype(np.int32),
        encodings=encodings.numpy(),
    )


if __name__ == "__main__":
    main()
