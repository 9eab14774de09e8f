"""Sphinx configuration. The build needs no network, and the pages it writes need none to be read."""

import builtins
import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "lightning-efficient"
author = "the lightning-efficient authors"
project_copyright = author
release = version = installed_version("lightning-efficient")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "mathml"]
exclude_patterns = ["_build", "_extensions"]
default_role = "code"

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"

html_theme = "furo"
html_title = f"lightning-efficient {release}"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False

# Every reference into this package must resolve. Those into other projects resolve where intersphinx may use the
# network (LE_DOCS_INTERSPHINX=1), and stay plain text otherwise.
nitpicky = True
nitpick_ignore = [("py:class", name) for name in dir(builtins)]
nitpick_ignore += [("py:exc", name) for name in [*dir(builtins), "MisconfigurationException"]]
nitpick_ignore_regex = [
    ("py:.*", r"(?!lightning_efficient\b)\w+(\.\w+)+"),
    ("py:class", r"lightning_efficient(\.\w+)*\.[A-Z]\w*T"),  # type variables
]
if os.environ.get("LE_DOCS_INTERSPHINX") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
    }


def _keep_property_sentences(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep napoleon from reading "Entropy, in nats: ..." as a type; our types are annotations."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def setup(app: Sphinx) -> None:
    """Connect ahead of napoleon, which has the default priority of 500."""
    app.connect("autodoc-process-docstring", _keep_property_sentences, priority=400)
