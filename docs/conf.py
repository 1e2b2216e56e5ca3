"""The documentation as a site: `python -m sphinx -W docs site`. Nothing is fetched, at the build or by a reader."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

from evercell import __version__

project = "evercell"
author = "The evercell developers"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "contents",
    "command_line",
    "python_names",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_extensions"]

default_role = "code"
smartquotes = False  # `--output` has two dashes
toc_object_entries = False  # names stand in headings
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
python_use_unqualified_type_names = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"evercell {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_js_files = ["accessible.js"]
html_copy_source = False
html_domain_indices = False
copybutton_exclude = ".linenos, .gp, .go"
