"""The doctor: is the installation sound, can a file be used, can its labels be believed, and what mends it.

A finding is a small object (`Finding`); every function here returns a list of them and changes nothing.
"""

from evercell.doctor.examination import examine
from evercell.doctor.files import check_cells
from evercell.doctor.finding import Finding, number_of
from evercell.doctor.installation import check_installation
from evercell.doctor.results import check_annotation, check_labels

__all__ = [
    "Finding", "check_annotation", "check_cells", "check_installation", "check_labels", "examine",
    "number_of",
]  # fmt: skip
