"""Types as a target of pretraining over many labelled studies, without settling their labels first.

A type has one row for all studies that name it (`pretraining_cells.type_key`), and a cell's type is asked for among the
types that its study shows. So cells of one type are brought together over studies, nothing is learnt by telling a study
from another, and `t cell` of one study is never held against `cd4_t` of another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evercell.backbones.base import Backbone
from evercell.heads import GrowingHead

if TYPE_CHECKING:
    from evercell.pretraining_cells import PretrainingCells


class TypeTargets(nn.Module):
    """Rows of the types, trained beside a backbone and thrown away.

    Parameters
    ----------
    backbone
        Tells number and width of the members.
    cells
        Cells to train on, with their types (K).
    """

    def __init__(self, backbone: Backbone, cells: PretrainingCells) -> None:
        super().__init__()
        self.members, self.types = backbone.members, cells.types
        self.head = GrowingHead(backbone.width, len(cells.types))

    def loss(self, representation: Tensor, codes: np.ndarray, shown: np.ndarray) -> Tensor:
        """Cross-entropy of the labelled cells among the types `shown` (K,) by their study, a mean over members.

        `representation` (B, D); `codes` (B,), -1 for cells without a label.
        """
        labelled = np.flatnonzero(codes >= 0)
        logits = self._among(self.head.member_logits(representation[labelled], self.members), shown)  # (B, S, K)
        truth = torch.from_numpy(codes[labelled]).to(logits.device).unsqueeze(1).expand(logits.shape[:2])
        return F.cross_entropy(logits.flatten(0, 1), truth.flatten())

    def told(self, representation: Tensor, shown: np.ndarray) -> np.ndarray:
        """Code of the likeliest type among those `shown` (K,) for each cell (B,)."""
        codes: np.ndarray = self._among(self.head(representation), shown).argmax(dim=-1).cpu().numpy()
        return codes

    def codes_of(self, cells: PretrainingCells, study: int) -> np.ndarray:
        """Codes here of the types of other cells of a study (N,); -1 without a label, or with a type not known here."""
        if not cells.codes:
            return np.full(cells.counts[study].shape[0], -1)
        place = {key: code for code, key in enumerate(self.types)}
        here = np.array([*(place.get(key, -1) for key in cells.types), -1], dtype=np.int64)
        found: np.ndarray = here[cells.codes[study]]
        return found

    def _among(self, logits: Tensor, shown: np.ndarray) -> Tensor:
        """Logits (..., K) with minus infinity for the types that are not shown."""
        return logits.float().masked_fill(torch.from_numpy(~shown).to(logits.device), -torch.inf)
