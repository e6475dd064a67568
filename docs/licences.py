"""The licences of everything that installing nnato brings along, from the metadata of what is installed.

python docs/licences.py          # a table
python docs/licences.py demo     # with those of an extra
"""

import configparser
import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def required(name, extras=()):
    """What a distribution requires here, by name with the extras asked for."""
    for text in metadata.requires(name) or ():
        one = Requirement(text)
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield one.name, one.extras


def roots(extras=()):
    """What setup.cfg requires, by name with the extras asked for: what is installed may be of an older one."""
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    lists = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in extras)]
    return [(one.name, one.extras) for text in lists for one in map(Requirement, text.split("\n")[1:])]


def closure(waiting):
    """All distributions that these bring along, themselves among them, and that are installed; in alphabetical order."""
    found, waiting = {}, list(waiting)
    while waiting:
        one, asked = waiting.pop()
        key = re.sub(r"[-_.]+", "-", one).lower()
        if key in found and set(asked) <= found[key]:
            continue
        try:
            metadata.distribution(one)
        except metadata.PackageNotFoundError:
            continue
        found[key] = found.get(key, set()) | set(asked)
        waiting.extend(required(one, asked))
    return sorted(found)


def licence(name):
    """What a distribution says of its licence: the expression, the classifiers, or the first line of the text."""
    about = metadata.metadata(name)
    classifiers = [text.split(" :: ")[-1] for text in about.get_all("Classifier") or () if text.startswith("License :: OSI")]
    text = (about.get("License") or "").strip().splitlines()
    return about.get("License-Expression") or "; ".join(classifiers) or (text[0] if text else "") or "not declared"


def table(extras=()):
    """Rows of (name, version, licence)."""
    return [(name, metadata.version(name), licence(name)) for name in closure(roots(extras))]


def markdown(extras=()):
    """The table as a page has it."""
    rows = [("package", "version", "licence"), ("---",) * 3, *table(extras)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def setup(app):
    """Register the directive `licences EXTRA…`, which puts the table of what is installed where the documents are built."""
    from docutils import nodes
    from docutils.statemachine import StringList
    from sphinx.util.docutils import SphinxDirective

    class Licences(SphinxDirective):
        optional_arguments = 1

        def run(self):
            node = nodes.container()
            lines = markdown(self.arguments[0].split() if self.arguments else ()).splitlines()
            self.state.nested_parse(StringList(lines), self.content_offset, node)
            return node.children

    app.add_directive("licences", Licences)
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    print(markdown(sys.argv[1:]))
