"""How Sphinx builds the site: `make docs`. Nothing is fetched, and a warning is an error."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import generated
from sphinx_gallery.sorting import ExplicitOrder

from merge_rl.version import __version__

project = "merge_rl"
author = "The merge_rl authors"
copyright = author
release = version = __version__

TUTORIALS = [  # in the order to read them
    "first_merge.py",
    "own_network.py",
    "diffusers_unet.py",
    "posthoc_ema.py",
    "reward_alone.py",
]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
sphinx_gallery_conf = {  # every tutorial is run; one that fails ends the build
    "examples_dirs": "tutorials",
    "gallery_dirs": "learn",
    "filename_pattern": r"\.py$",
    "abort_on_example_error": True,
    "within_subsection_order": ExplicitOrder(TUTORIALS),
    "write_computation_times": False,
    "min_reported_time": 1,
    "download_all_examples": False,
    "show_memory": False,
}
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
exclude_patterns = ["tutorials", "learn/*.md", "sg_execution_times.rst"]
highlight_language = "console"
smartquotes = False  # two dashes are an option's
default_role = "code"  # docstrings say `name`

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"merge_rl {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False

generated.write(HERE / "reference")


def setup(app: object) -> None:
    """Docstrings are plain text with `names` and indented formulas: made reStructuredText."""
    app.connect("autodoc-process-docstring", generated.as_restructured, priority=100)  # type: ignore[attr-defined]
