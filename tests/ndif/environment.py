"""`make ndif`: the environment of a real NDIF server (CPU), outside the tree; about 5.5 GB and 5 to 10 minutes, once.

Needs Python 3.12 or 3.13 (or NNATO_NDIF_PYTHON=/path/to/one) and redis-server from the system's packages. The folder is
NNATO_NDIF_ENV, or nnato-ndif in the user's cache folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# nnsight 0.8.1 breaks every deployment of ndif 0.1.2, and transformers 5.23 breaks weightless models of nnsight 0.8.
PACKAGES = ("ndif[api,ray]==0.1.2", "nnsight==0.8.0", "transformers==5.22.2", "moto[server]")
TORCH = "torch==2.13.0"
SUITABLE = "import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))"


def folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("NNATO_NDIF_ENV") or cache / "nnato-ndif").expanduser().absolute()


def missing() -> str | None:
    """Why the server cannot be started here; None if it can."""
    if not (folder() / "ready").is_file():
        return f"no NDIF environment in {folder()}: run `make ndif`"
    if shutil.which("redis-server") is None:
        return "redis-server is not installed: `apt-get install redis-server`, or the like for this system"
    return None


def find_python() -> str | None:
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    named = [os.environ.get("NNATO_NDIF_PYTHON", ""), "python3.12", "python3.13", "python3"]
    candidates = [*named, *sorted(map(str, pyenv.glob("versions/3.1[23].*/bin/python")))]
    for candidate in filter(None, map(shutil.which, filter(None, candidates))):
        if subprocess.run([candidate, "-c", SUITABLE], capture_output=True).returncode == 0:
            return candidate
    return None


def main() -> int:
    target = folder()
    python = target / "bin" / "python"
    if not (target / "ready").is_file():
        found = find_python()
        if found is None:
            print("make ndif: no Python 3.12 or 3.13 found, which ndif 0.1.2 needs; name one in NNATO_NDIF_PYTHON", file=sys.stderr)
            return 1
        print(f"making {target} with {found}", flush=True)
        subprocess.run([found, "-m", "venv", target], check=True)
        for packages in ((TORCH,), (TORCH, *PACKAGES)):
            subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *packages], check=True)
        (target / "ready").touch()
    print(missing() or f"ready: {target}", file=sys.stderr if missing() else sys.stdout)
    return int(missing() is not None)


if __name__ == "__main__":
    sys.exit(main())
