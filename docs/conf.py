"""Configuration of the site, which ``sphinx-build -W --keep-going docs docs/_build/html`` builds.

The extra ``docs`` installs what it needs.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from measured import substitutions
from scipy.sparse.linalg import LinearOperator
from sphinx.util.inspect import signature, stringify_signature

import curvop

project = "curvop"
author = "The curvop authors"
version = release = curvop.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
    "mathml",
    "drawn",
    "measured",
]
exclude_patterns = ["_build", "_templates", "examples"]
templates_path = ["_templates"]
rst_epilog = substitutions()
html_math_renderer = "mathml"

# A name in single backticks becomes a link if it can be resolved, and is set in italics otherwise (`A` in a docstring).
default_role = "autolink"
nitpicky = True
nitpick_ignore = [
    ("py:obj", "numpy.allclose"),  # no inventory of another package is fetched
    ("py:obj", "differing"),  # a private name, in the docstring of curvop.storage.fingerprint.fingerprint
]

autosummary_generate = True
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings give types, with shapes and units
autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"
numpydoc_show_class_members = False  # _templates/autosummary/class.rst lists them
numpydoc_xref_param_type = False

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",  # run every example: two to three minutes in total
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": False,
    "write_computation_times": False,
    "download_all_examples": True,
    "remove_config_comments": True,
}

#: Pages without a list of their sections, because their tables need its room.
WIDE = ["comparison", "curvlinops", "eigenthings", "index", "pyhessian"]

html_theme = "pydata_sphinx_theme"
html_title = "curvop"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "secondary_sidebar_items": {"**": ["page-toc"]} | {page: [] for page in WIDE},
    "header_links_before_dropdown": 7,
    "navbar_persistent": ["search-button"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": True,
}
html_sidebars = {"index": [], "start": []}


def constructor_signature(_: Any, what: str, name: str, obj: Any, *rest: Any) -> tuple[str, None] | None:
    """Return the signature of ``__init__``. Autodoc shows that of ``LinearOperator.__new__``, which is ``(*args)``."""
    if what != "class" or not issubclass(obj, LinearOperator):
        return None
    return stringify_signature(signature(obj.__init__, bound_method=True), show_annotation=False), None


def setup(app: Any) -> None:
    """Register the handler of signatures."""
    app.connect("autodoc-process-signature", constructor_signature)
