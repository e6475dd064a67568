"""The package as a whole: lazy import, one-way rooms, documented names."""

from __future__ import annotations

import ast
import configparser
import inspect
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import nnato

ROOT = Path(nnato.__file__).parent
ROWS = [
    {"errors"},
    {"sites", "storage", "notebook"},
    {"embedded", "corpus", "shards", "checkpoints"},
    {"nnsight_setup", "pages"},
    {"remote"},
    {"blocks", "passes", "residuals"},
    {"trace", "statistics"},
    {"dry_run", "progress", "coding"},
    {"models", "moments"},
    {"dictionaries", "transport_moments", "reduction", "linalg", "regression", "intervals", "dip"},
    {"remote_jobs", "metrics", "operators", "layer_stats", "sums", "explanations"},
    {"remote_moments", "remote_layers", "streaming", "ridge", "sparse", "verdicts", "active_scores"},
    {"accumulation", "feature_traits"},
    {"lowrank", "positions", "cca", "sae_training", "merging"},
    {"selection", "losses", "ray_engine"},
    {"fitting", "efficiency", "edits"},
    {"effects", "controls", "scaling", "lens", "features"},
    {"perplexity", "lens_training", "multilayer", "feature_pass"},
    {
        "plots",
        "generation",
        "report",
        "fidelity",
        "similarity",
        "top_examples",
        "prompts",
        "steering",
        "sweep",
        "latent_transport",
        "feature_selection",
        "feature_controls",
        "layer_merging",
    },
    {"layer_plots", "feature_plots", "feature_page", "serving", "published", "cards"},
    {"cli"},
]


def imports(path):
    """nnato modules that a file imports, anywhere but for type checking."""
    tree = ast.parse(path.read_text())
    skipped = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in skipped and (node.module or "").startswith("nnato."):
            yield node.module.split(".")[1]


def test_rooms_import_only_from_rows_above():
    rank = {name: number for number, row in enumerate(ROWS) for name in row}
    files = [path for path in ROOT.rglob("*.py") if path.name != "__init__.py" or path.parent != ROOT]
    assert {path.stem if path.parent == ROOT else "cli" for path in files} == set(rank)
    for path in files:
        name = path.stem if path.parent == ROOT else "cli"
        for imported in imports(path):
            assert rank[imported] < rank[name] or imported == name == "cli", f"{name} imports {imported}"


def test_the_map_of_the_house_is_true():
    lines = (ROOT.parent / "CONTRIBUTING.md").read_text().splitlines()
    found = [re.match(r"\| (\d*) ?\| `(\w+)/?` \|", line) for line in lines]
    rows: list[set[str]] = []
    for match in filter(None, found):
        if match[1]:
            assert int(match[1]) == len(rows)
            rows.append(set())
        rows[-1].add(match[2])
    assert rows == ROWS


def test_importing_nnato_loads_nothing_heavy():
    heavy = ["torch", "nnsight", "sae_lens", "transformers", "numpy", "datasets", "matplotlib", "rich"]
    code = f"import sys, nnato; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("first", ["nnsight", "nnato.trace"])
def test_nnsight_may_be_imported_before_or_after(first):
    code = f"import {first}, nnsight, nnato.trace; print(nnato.ATOTrace.__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "ATOTrace\n"


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom nnato.cli import main\nmain(['--help'], standalone_mode=False)\n"
        "assert not {'torch', 'nnsight', 'numpy', 'rich'} & set(sys.modules), 'heavy'"
    )
    assert "nnato demo" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_public_names_exist_and_are_documented():
    assert len(nnato.__all__) == len(set(nnato.__all__))
    assert dir(nnato) == sorted(nnato.__all__)
    for name in nnato.__all__:
        value = getattr(nnato, name)
        if name == "__version__":
            continue
        assert inspect.getdoc(value), name
        members = inspect.getmembers(value, lambda m: inspect.isfunction(m) or isinstance(m, property)) if inspect.isclass(value) else []
        for member, function in members:
            if not member.startswith("_") and getattr(function, "__module__", "nnato").startswith("nnato"):
                assert inspect.getdoc(function), f"{name}.{member}"
    with pytest.raises(AttributeError, match="module 'nnato' has no attribute 'nothing'"):
        nnato.nothing  # noqa: B018


def test_functions_are_not_shadowed_by_modules():
    """Importing nnato.x sets the attribute x of the package, so no module may be called like a public function."""
    for path in ROOT.glob("*.py"):
        assert path.stem not in nnato.__all__


def test_version_is_that_of_the_distribution():
    assert nnato.__version__ == metadata.version("nnato")


def test_what_is_imported_is_required_and_installed_within_bounds():
    """Of every package imported anywhere; those of extras, and of the standard library, aside."""
    from packaging.requirements import Requirement

    setup = ROOT.parent / "setup.cfg"
    if not setup.exists():
        pytest.skip("setup.cfg is not part of an installed package")
    config = configparser.ConfigParser()
    config.read(setup)
    required = [Requirement(line) for line in config["options"]["install_requires"].split()]
    for one in required:
        assert metadata.version(one.name) in one.specifier, one
    owners = metadata.packages_distributions()
    trees = [ast.walk(ast.parse(path.read_text())) for path in ROOT.rglob("*.py")]
    nodes = [node for tree in trees for node in tree]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    packages = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"nnato", "ray", "gguf", "IPython"}
    missing = {
        name for name in packages if not {one.name for one in required} & {owner.lower().replace("_", "-") for owner in owners[name]}
    }
    assert missing == set()


def test_no_asserts_and_no_pickle_in_the_package():
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), path
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "pickle" not in ast.unparse(node), path
