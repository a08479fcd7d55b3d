"""Sphinx: the site of the package. ``make docs`` builds it, without a network."""

import base64
import inspect
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from sphinx.util import logging

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import _api  # noqa: E402  # after the path

import captum_priors  # noqa: E402  # after the path

project = "captum_priors"
author = "captum_priors contributors"
copyright = author  # noqa: A001  # Sphinx's name for it
version = release = captum_priors.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_nb",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["phone.css"]
html_title = f"captum_priors {release}"
html_copy_source = False

autodoc_typehints = "none"  # signatures are long; types stand in the arguments' descriptions
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # as written, not as printed
autosummary_generate = False  # the pages are made by _api, one for each public module
napoleon_google_docstring = True
napoleon_numpy_docstring = False

nb_execution_mode = "off"  # notebooks are executed by their tests
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4

# Names of other packages: their inventories are on the network, which a build does not use.
nitpick_ignore_regex = [(r"py:.*", r"(captum|torch|shap)\..*")]

logger = logging.getLogger(__name__)


def _missing_names(app: Any, env: Any) -> None:
    """Warn, which fails the build, of each public name that no page documents."""
    documented = env.get_domain("py").objects
    for name in _api.documented_names():
        if name not in documented:
            logger.warning("public name %s is on no page of the reference", name)


def _short_names(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Resolve ``ExpectedGradients`` and ``AttributionPrior.forward`` from any module's page."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target:
        return None
    for name in _api.spellings(target):
        if name in env.get_domain("py").objects:
            domain = env.get_domain("py")
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, node["reftype"], name, node, contnode
            )
    return None


def _callables_are_functions(app: Any, what: str, name: str, obj: Any, *rest: Any) -> Any:
    """Show the signature of an instance that is called as a function, without ``self``."""
    if what == "function" and not inspect.isroutine(obj) and callable(obj):
        return str(inspect.signature(obj)).partition(" ->")[0], None
    return None


def _last_picture(notebook: Path) -> bytes | None:
    """Return what a notebook shows last as an image, for the gallery."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
    found = [each["image/png"] for each in data if "image/png" in each]
    return base64.b64decode(found[-1]) if found else None


def setup(app: Any) -> None:
    """Write the pages that are made from something else, and connect the checks."""
    _api.write(HERE / "api")
    notebooks = HERE / "tutorials"
    notebooks.mkdir(exist_ok=True)
    for old in notebooks.iterdir():
        old.unlink()
    for notebook in sorted((ROOT / "tutorials").glob("*.ipynb")):
        shutil.copy(notebook, notebooks)
        if picture := _last_picture(notebook):
            (notebooks / notebook.name).with_suffix(".png").write_bytes(picture)
    app.connect("env-check-consistency", _missing_names)
    app.connect("missing-reference", _short_names)
    app.connect("autodoc-process-signature", _callables_are_functions)
