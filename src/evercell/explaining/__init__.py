"""Why the model says what it says: genes behind a label, the runner-up, what would flip it, why a cell is unknown."""

from evercell.explaining.reasons import explain
from evercell.explaining.result import Explanation

__all__ = ["Explanation", "explain"]
