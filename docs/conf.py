import sys
from pathlib import Path

import nnato

sys.path.insert(0, str(Path(__file__).parent))  # for command_help, licences and written_figures

project = "nnato"
author = "The nnato developers"
copyright = "2026, The nnato developers"
release = version = nnato.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.doctest",
    "sphinx_gallery.gen_gallery",
    "command_help",
    "licences",
]
html_theme = "furo"
html_title = f"nnato {release}"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
sphinx_gallery_conf = {
    "ignore_repr_types": r"pathlib",  # pages show figures, not the names of their files
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("matplotlib", "written_figures.scrape"),
    "download_all_examples": False,
}
