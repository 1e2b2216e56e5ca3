"""What a model does not know yet: clusters of unknown cells, clusters accepted as types, cells worth a label."""

from evercell.discovery.acceptance import accepted
from evercell.discovery.proposals import Discovery, discover
from evercell.discovery.selection import select

__all__ = ["Discovery", "accepted", "discover", "select"]
