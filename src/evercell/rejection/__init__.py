"""Rejectors: how unlike every known type a cell is.

A rejector gives each cell a score from that cell and the model alone, and the model stores the scores of held-out known
cells, so that a threshold can be taken for any rate of false rejections; `canal`, kept for comparison, judges a cell by
the other cells of the query. To add one: a new file here with a subclass of
`Rejector`, and its line in `REJECTORS`.
"""

from evercell.plugins import Registry
from evercell.rejection.base import DEFAULT_RATE, Outputs, Rejector
from evercell.rejection.leaving_out import best_rate

REJECTORS: Registry[Rejector] = Registry(
    "rejector",
    {
        "confidence": "evercell.rejection.confidence:ConfidenceRejector",
        "energy": "evercell.rejection.energy:EnergyRejector",
        "prototypes": "evercell.rejection.prototypes:PrototypesRejector",
        "markers": "evercell.rejection.markers:MarkersRejector",
        "canal": "evercell.rejection.canal:CanalRejector",
        "combined": "evercell.rejection.combined:CombinedRejector",
    },
)

__all__ = ["DEFAULT_RATE", "REJECTORS", "Outputs", "Rejector", "best_rate"]
