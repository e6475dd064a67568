"""The documents: links lead somewhere, names are documented, pages of the gallery keep their rules, doctests run."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

import nnato
from nnato.cli import COMMANDS

ROOT = Path(nnato.__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(ROOT.glob("examples/*.py"))
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the documents are not part of an installed package")


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path = page.parent / target.split("#")[0]
        if target.startswith("gallery/"):
            path = ROOT / "examples" / (Path(target).stem + ".py") if Path(target).stem != "index" else ROOT / "examples"
        assert path.exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_index():
    index = (DOCS / "index.md").read_text()
    for page in DOCS.glob("*.md"):
        assert page.stem == "index" or re.search(rf"^{page.stem}$", index, re.MULTILINE), page.name


def test_every_public_name_has_an_entry():
    api = (DOCS / "api.rst").read_text()
    for name in set(nnato.__all__) - {"__version__"}:
        assert re.search(rf":: nnato\.{name}$", api, re.MULTILINE), name


def test_every_command_is_described():
    commands = (DOCS / "commands.md").read_text()
    for command in COMMANDS:
        assert f"`nnato {command}" in commands, command


def test_all_that_is_required_has_a_licence_that_allows_its_use(monkeypatch):
    """Permissive ones, or the MPL, which binds changed files only. The weights' packages declare none: their terms are shown by nnato."""
    monkeypatch.syspath_prepend(str(DOCS))
    licences = importlib.import_module("licences")
    rows = licences.table(("demo",))
    names = {name for name, _, _ in rows}
    assert {"torch", "nnsight", "sae-lens", "transformers", "click", "scipy"} <= names
    fine = re.compile(r"MIT|Apache|BSD|PSF|Python Software Foundation|ISC|Mozilla|MPL", re.IGNORECASE)
    unclear = [(name, licence) for name, _, licence in rows if not fine.search(licence) or re.search(r"\b[AL]?GPL", licence)]
    assert [one for one in unclear if "-gguf" not in one[0]] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_of_the_gallery_have_a_title_and_say_what_they_show(page):
    text = page.read_text()
    title, line = ast.get_docstring(ast.parse(text)).splitlines()[:2]
    assert len(line) >= len(title)
    assert set(line) == {"="}
    if page.name.startswith("plot_"):
        assert "**What this shows.**" in text
        assert re.search(r"plt\.show\(\)|Path\(\"\w+\.png\"\)", text), "no picture"
    else:
        assert "not executed" in text


def test_pages_that_refer_to_each_other_exist():
    for page in PAGES:
        for target in re.findall(r":doc:`(?:[^<`]*<)?/?([\w/]+)>?`", page.read_text()):
            name = target.removeprefix("gallery/")
            assert (ROOT / "examples" / f"{name}.py").exists() or list(DOCS.glob(f"{name}.*")), f"{page.name}: {target}"


@pytest.mark.parametrize("path", sorted(path for path in Path(nnato.__file__).parent.rglob("*.py") if ">>> " in path.read_text()), ids=str)
def test_doctests(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert doctest.testmod(module).failed == 0
