"""Sphinx: the API reference from the docstrings, and the pages that Git hosts show, at their links.

The source folder is the repository, so that the pages' relative links are the site's. `make docs`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from inspect import isfunction
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sphinx.util.nodes import make_refnode  # noqa: E402

import reasonkern as rk  # noqa: E402
from reasonkern.integrations import _peer  # noqa: E402
from reasonkern.policy_loss.metrics import Metrics  # noqa: E402

project = "reasonkern"
release = rk.__version__
author = "The reasonkern developers"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
html_theme = "furo"
html_title = f"reasonkern {release}"

root_doc = "README"
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "reasonkern/*/*.md"]
PAGES += ["benchmarks/results/README.md", "docs/*.md"]
include_patterns = [*PAGES, "docs/api/*.rst"]
exclude_patterns = [".git", ".venv*", "build", "dist", "docs/_build", "**/__pycache__", ".*_cache"]

# In the docstrings `Name` is an object of the library: one that does not exist fails the build.
default_role = "py:obj"
nitpicky = True
# Types of torch and of inner modules, in signatures.
nitpick_ignore_regex = [("py:class", r"(?!reasonkern\.).*|reasonkern\.\w+\.\w+\.\w+")]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_mock_imports = ["trl", "verl", "openrlhf", "transformers", "datasets", "vllm", "sglang"]
napoleon_use_rtype = False
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # CHANGELOG's headings repeat

SPACES: tuple[tuple[str, ModuleType], ...] = (
    ("reasonkern", rk), ("reasonkern.generation", rk.generation),
    ("reasonkern.shaping", rk.shaping), ("reasonkern.scaling", rk.scaling),
)  # fmt: skip


def room(thing: Any, space: str) -> str:
    """The family whose folder defines a public object of a name space."""
    package, *parts = getattr(thing, "__module__", "").split(".")
    if package != "reasonkern":  # a constant, or an alias of a type
        return space.split(".")[1]
    return "environment" if parts[0].startswith("_") else parts[0]


def directive(name: str, thing: Any) -> str:
    if isinstance(thing, type):
        # "Attributes:" in the docstring of a named tuple describes its members.
        members = "" if issubclass(thing, tuple) else "   :members:\n"
        if issubclass(thing, Metrics):
            members += "   :inherited-members:\n"
        return f".. autoclass:: {name}\n{members}   :show-inheritance:\n"
    return f".. auto{'function' if isfunction(thing) else 'data'}:: {name}\n"


# autodoc imports stand-ins for trainers and engines, which have no version and no signatures.
PEERS = ("transformers", "vllm", "sglang", "trl", "verl", "openrlhf", "slime")
_peer.import_peer = lambda module, tested: import_module(module)
_peer.require_arguments = lambda *_: None


def integrations() -> str:
    parts = ["integrations\n============\n"]
    for peer in PEERS:
        title = f"reasonkern.integrations.{peer}"
        parts.append(f"{title}\n{'-' * len(title)}\n\n.. automodule:: {title}\n   :members:\n")
    return "\n".join(parts)


def families() -> dict[str, str]:
    """Text of each family's page: every public name once, where it is defined."""
    pages = {"integrations": integrations()}
    for space, module in SPACES:
        for name in module.__all__:
            thing = getattr(module, name)
            if isinstance(thing, ModuleType):
                continue
            family = room(thing, space)
            if space != "reasonkern" and family != space.split(".")[1]:
                continue  # also under its own family's name
            head = f"{family}\n{'=' * len(family)}\n\n.. currentmodule:: {space}\n"
            page = pages.setdefault(family, head)
            pages[family] = f"{page}\n{directive(name, thing)}"
    return pages


def write_pages(app: Any, config: Any) -> None:
    folder = ROOT / "docs" / "api"
    folder.mkdir(exist_ok=True)
    pages = families()
    for old in folder.glob("*.rst"):
        if old.stem not in pages:
            old.unlink()
    for family, text in pages.items():
        path = folder / f"{family}.rst"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def add_contents(app: Any, docname: str, source: list[str]) -> None:
    """The start page's table of contents, which Git hosts would show as code."""
    if docname != root_doc:
        return
    readmes = sorted(p.relative_to(ROOT).with_suffix("") for p in ROOT.glob("reasonkern/*/*.md"))
    api = [f"docs/api/{family}" for family in families()]
    rest = ["CONTRIBUTING", "CHANGELOG", "docs/papers", "docs/tested", "docs/test-all"]
    rest += ["benchmarks/results/README"]
    for caption, pages in (("API", api), ("Families", readmes), ("Project", rest)):
        entries = "\n".join(str(page) for page in pages)
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def resolve(app: Any, env: Any, node: Any, content: Any) -> Any:
    """`Name` in a module of the integrations is one of the library, as in its other modules."""
    found = env.domains["py"].objects.get(f"reasonkern.{node['reftarget']}")
    if found is None or node["refdoc"] != "docs/api/integrations":
        return None
    return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, content)


def skip(app: Any, what: str, name: str, thing: Any, skipped: bool, options: Any) -> bool | None:
    """Members of a named tuple, see `directive`."""
    return isinstance(thing, type(rk.Draft.tokens)) or None


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", skip)
    app.connect("missing-reference", resolve)
    app.connect("config-inited", write_pages)
    app.connect("source-read", add_contents)
