"""Models of other programs, brought into evercell's own form: nothing of theirs is executed."""

from evercell.importing.celltypist import import_celltypist
from evercell.importing.scbert import import_scbert

__all__ = ["import_celltypist", "import_scbert"]
