"""How the documentation is built: `make docs`. Without a network it has no links to other pages."""

import re
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import lbw_optax

project = "lbw_optax"
author = "The lbw_optax authors"
copyright = author
release = version = lbw_optax.__version__

_LOG = logging.getLogger(__name__)

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "sphinx_book_theme"
html_title = "lbw_optax"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_theme_options = {"show_toc_level": 2}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"  # a cache would not see that the package has changed
nb_execution_raise_on_error = True
nb_execution_timeout = 300

INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "jax": "https://docs.jax.dev/en/latest/",
    "optax": "https://optax.readthedocs.io/en/latest/",
    "flax": "https://flax.readthedocs.io/en/latest/",
    "orbax": "https://orbax.readthedocs.io/en/latest/",
}


def _reachable() -> dict[str, tuple[str, str]]:
    """The pages that can be linked to from here: an inventory that is not to be had is no error."""
    folder, found = Path(tempfile.mkdtemp()), {}
    for name, url in INVENTORIES.items():
        path = folder / name
        try:
            with urllib.request.urlopen(url + "objects.inv", timeout=5) as reply:
                path.write_bytes(reply.read())
        except (urllib.error.URLError, OSError) as error:
            print(f"No links to {url}: {error}")
            continue
        found[name] = (url, str(path))
    return found


intersphinx_mapping = _reachable()


def setup(app: Sphinx) -> None:
    """What autodoc is told to read otherwise, and what the build checks."""
    app.connect("autodoc-process-docstring", _keep_bars)
    app.connect("autodoc-skip-member", _skip_fields)
    app.connect("env-check-consistency", _require_all)


def _require_all(app: Sphinx, env: BuildEnvironment) -> None:
    """A public name without an entry is a warning, and so an error of `make docs`."""
    entries = env.get_domain("py").objects
    for name in (*lbw_optax.__all__, "RollbackManager"):
        if f"lbw_optax.{name}" not in entries:
            _LOG.warning("api.md has no entry for lbw_optax.%s", name)


def _keep_bars(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings write |g| for a norm, which reStructuredText takes for a substitution."""
    indent: int | None = None  # of the equation that a line belongs to
    for i, line in enumerate(lines):
        margin = len(line) - len(line.lstrip())
        if indent is not None and line.strip() and margin <= indent:
            indent = None
        if line.strip().startswith(".. math::"):
            indent = margin
        if indent is None and not line.strip().startswith((">>>", "...")):
            lines[i] = re.sub(r"(``.*?``)|\|", lambda found: found[1] or r"\|", line)


def _skip_fields(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """The fields of a NamedTuple are in its docstring; autodoc knows only their numbers."""
    return True if type(obj).__name__ == "_tuplegetter" else None
