"""Shows on a page of the gallery the figures that its example wrote beside itself."""

import shutil
from pathlib import Path

from sphinx_gallery.scrapers import figure_rst


def scrape(block, block_vars, gallery_conf):
    """Move the PNG files that a block of code wrote to where the page has its pictures."""
    moved = []
    for written in sorted(Path(block_vars["src_file"]).parent.glob("*.png")):
        moved.append(next(block_vars["image_path_iterator"]))
        shutil.move(written, moved[-1])
    return figure_rst(moved, gallery_conf["src_dir"])
