"""The model card of a trained SAE, and which files belong on a hub. Nothing is sent anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnato.dictionaries import load_dictionary
from nnato.errors import DictionaryError
from nnato.layer_stats import layer_variance_intervals
from nnato.lens import FILE as LENS_FILE
from nnato.lens import Lens
from nnato.multilayer import FILE as LAYERS_FILE
from nnato.multilayer import LayerActivity, MultiLayerSAE, load_layer_activity
from nnato.storage import atomic, read_json

NAME = "README.md"
FILES = ("cfg.json", "sae_weights.safetensors", LENS_FILE)
"""What makes an SAE: the first two are sae_lens' format, the third belongs to it if it was trained behind a lens."""


@dataclass(frozen=True)
class Card:
    """What a hub repository of an SAE would hold.

    Attributes:
        path: The card that was written.
        files: Bytes of each file that belongs there, the card included, by name.
        left: Names of what else is in the folder, such as checkpoints.
        local: Paths of this machine that `cfg.json` names, which others would read.
    """

    path: Path
    files: dict[str, int]
    left: list[str]
    local: list[str]

    def to_json(self) -> dict[str, Any]:
        """As in `--json`."""
        return {"path": str(self.path), "files": self.files, "left": self.left, "local": self.local}


def write_card(folder: str | Path, numbers: str | Path | None = None) -> Card:
    """Write `README.md` into the folder of an SAE: what it is, how it was trained, how to load it, and what it does layer by layer.

    Args:
        folder: What `train_sae` or `import_mlsae` wrote.
        numbers: What `layer_activity` wrote for it, a file or its folder; by default what lies in the folder, if anything does.

    Raises:
        DictionaryError: The folder holds no SAE in sae_lens' format, or it was trained behind a lens that is not there.
        FileFormatError: The numbers cannot be read.
        MomentsError: They are of another SAE.
        OutputError: The card cannot be written.
    """
    folder = Path(folder).expanduser()
    if missing := [name for name in FILES[:2] if not (folder / name).is_file()]:
        raise DictionaryError(f"{folder} holds no {missing[0]}: give a folder of nnato mlsae train or import")
    dictionary, config = load_dictionary(folder), read_json(folder / FILES[0])
    lens = Lens.load(folder) if (folder / LENS_FILE).is_file() else None
    if dictionary.lens is not None and (lens is None or lens.digest != dictionary.lens):
        raise DictionaryError(f"{folder} was trained behind a lens, which is not there: put its {LENS_FILE} beside it")
    if numbers is None and (folder / LAYERS_FILE).is_file():
        numbers = folder
    activity = None if numbers is None else load_layer_activity(numbers, MultiLayerSAE(dictionary, dictionary.sites, lens))
    path = folder / NAME
    with atomic(path) as temporary:
        temporary.write_text(_text(config, activity, lens is not None))
    files = {name: (folder / name).stat().st_size for name in (NAME, *FILES) if (folder / name).is_file()}
    left = sorted(one.name for one in folder.iterdir() if one.name not in files)
    local = sorted(set(re.findall(r"(?<![\w:/.~-])[~/][\w.-]*/[^\s\"']*", json.dumps(config))))
    return Card(path, files, left, local)


def _text(config: Mapping[str, Any], activity: LayerActivity | None, lens: bool) -> str:
    about = config.get("metadata") or {}
    recipe, text, versions = (about.get(f"nnato_{name}") or {} for name in ("recipe", "text", "provenance"))
    name = str(about.get("model_name") or (about.get("nnato_model") or {}).get("name") or "")
    sites = about.get("nnato_sites") or []
    kind = "Multi-layer sparse autoencoder" if len(sites) != 1 else "Sparse autoencoder"
    facts = {
        "model": _short(name),
        "layers (block outputs)": ", ".join(map(str, sites)),
        "read through": "the lens in `lens.safetensors`" if lens else "",
        "architecture": config.get("architecture"),
        "latents": config.get("d_sae"),
        "active latents": config.get("k"),
        "inputs": "standardised one by one" if config.get("normalize_activations") == "layer_norm" else "as they are",
        "text": _short(str(text.get("source", ""))),
        "training tokens": recipe.get("tokens"),
        **{label: recipe.get(key) for key, label in (("rows", "rows of a step"), ("lr", "learning rate"), ("seed", "seed"))},
        "converted from": about.get("nnato_source"),
        "made with": ", ".join(f"{key} {versions[key]}" for key in ("nnato", "torch", "transformers") if key in versions),
    }
    base = [f"base_model: {json.dumps(name)}"] if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else []
    front = ["---", "library_name: sae_lens", *base, "tags:", "- sparse-autoencoder", "- interpretability", "---"]
    rows = [f"| {label} | {_cell(value)} |" for label, value in facts.items() if value not in (None, "")]
    parts = [*front, "", f"# {kind}" + (f" of {_cell(_short(name))}" if name else ""), "", "| | |", "|---|---|", *rows, "", _LOADING]
    return "\n".join([*parts, *(_numbers(activity) if activity is not None else [])])


def _short(name: str) -> str:
    """A hub id as it is; of a path its last part, since others do not have this machine's folders."""
    return Path(name).name if name.startswith(("/", "~", ".")) else name


def _cell(value: Any) -> str:
    return re.sub(r"[|\r\n]", " ", str(value))


def _numbers(activity: LayerActivity) -> list[str]:
    """Reconstruction by layer and the variance of the layer, from the stored sums."""
    ratio, rows = layer_variance_intervals(activity.folds)["ratio"], []
    for row in activity.metrics():
        fvu = row["fvu"]
        rows.append(f"| {row['site']} | {fvu.value:.3f} [{fvu.low:.3f}, {fvu.high:.3f}] | {row['fvu_mlsae']:.3f} | {row['l0']:.1f} |")
    return [
        f"## On {activity.stats.tokens:,} {activity.split} tokens of {_cell(_short(str(activity.text.get('source', ''))))}",
        "",
        "Variance left out about the mean of each coordinate, with 95 % intervals over folds of documents; jointly, as published; active",
        "latents.",
        "",
        "| layer | left out | joint | active |",
        "|---|---|---|---|",
        *rows,
        "",
        f"A latent's layer varies {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] times as much over the text as at one token, weighted",
        "by activation.",
        "",
    ]


_LOADING = """\
## Loading

```python
from sae_lens import SAE

sae = SAE.load_from_disk("FOLDER")  # the folder with these files
```

The input is the residual stream at the output of a block, before the final norm. With [nnato](https://pypi.org/project/nnato/), which also
knows the layers and a lens:

```console
$ nnato mlsae layers FOLDER
```
"""
