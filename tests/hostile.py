"""Hostile files for every loader. Run as a script: loads each of them and reports what came of it; `test_hostile_files.py` starts it."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

HUGE = 2**63


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def joined(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def parts(valid: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    size = struct.unpack("<Q", valid[:8])[0]
    return json.loads(valid[8 : 8 + size]), valid[8 + size :]


def containers(valid: bytes, canary: Path) -> Iterator[tuple[str, bytes]]:
    """Files that are no sound safetensors files."""
    header, data = parts(valid)
    first = next(name for name in header if name != "__metadata__")

    def changed(**entry: Any) -> bytes:
        return joined({**header, first: {**header[first], **entry}}, data)

    yield "empty", b""
    yield "seven bytes", valid[:7]
    yield "header only", joined(header, b"")
    yield "truncated", valid[:-1]
    yield "trailing bytes", valid + b"\0" * 64
    yield "header of 2^63 bytes", joined(header, data, HUGE)
    yield "header of 1 GB declared", joined(header, data, 10**9)
    yield "header that is no JSON", joined(b"{" * 1000, data)
    yield "header that is a list", joined([1, 2], data)
    yield "header nested 100,000 deep", joined(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, data)
    yield "header with a number of 100,000 digits", joined(b'{"a":' + b"9" * 100_000 + b"}", data)
    if len(header) > 2:
        yield "overlapping tensors", changed(data_offsets=[0, len(data)])
    yield "offsets beyond the end", changed(data_offsets=[0, 10**9], shape=[10**9 // 8])
    yield "1 GB declared in 1 kB", joined({first: {"dtype": "F64", "shape": [10**9 // 8], "data_offsets": [0, 10**9]}}, b"\0" * 1000)
    yield "negative offsets", changed(data_offsets=[-8, 0])
    yield "offsets backwards", changed(data_offsets=[8, 0])
    yield "a shape that overflows", changed(shape=[2**40, 2**40])
    yield "a negative shape", changed(shape=[-1, 8])
    yield "an unknown dtype", changed(dtype="X9")
    yield "a shape that is text", changed(shape="many")
    yield "a pickle", pickle.dumps(Canary(canary))
    yield "a zip archive", b"PK\x03\x04" + b"\0" * 200


def labels(valid: bytes) -> Iterator[tuple[str, bytes]]:
    """Files whose metadata are no sound JSON."""
    header, data = parts(valid)
    yield "metadata nested 50,000 deep", remetadata(header, data, '{"schema":1,"kind":' + "[" * 50_000 + "]" * 50_000 + "}")
    yield "metadata with a number of 100,000 digits", remetadata(header, data, '{"schema":' + "9" * 100_000 + "}")
    yield "metadata that are no JSON", remetadata(header, data, "{")
    yield "metadata that are a list", remetadata(header, data, "[]")
    yield "no metadata", joined({name: entry for name, entry in header.items() if name != "__metadata__"}, data)


def remetadata(header: dict[str, Any], data: bytes, text: str) -> bytes:
    """The same file with other metadata of nnato."""
    return joined({**header, "__metadata__": {"nnato": text}}, data)


STRANGE: tuple[Any, ...] = (None, True, -1, 10**30, 1e308, "", "../../etc/passwd", "\0", [], [[]], [["a", "b"]], {}, {"a": 1}, [None] * 3)
"""Values put in the place of every entry of the metadata."""


def contents(valid: bytes) -> Iterator[tuple[str, bytes]]:
    """Sound safetensors files of nnato with something else in their metadata."""
    header, data = parts(valid)
    metadata = json.loads(header["__metadata__"]["nnato"])
    for key in metadata:
        without = {name: value for name, value in metadata.items() if name != key}
        yield f"{key} missing", remetadata(header, data, json.dumps(without))
        for value in STRANGE:
            if value != metadata[key] and value not in harmless(key):
                yield f"{key} = {str(value)[:20]!r}", remetadata(header, data, json.dumps({**metadata, key: value}))
    yield "a newer schema", remetadata(header, data, json.dumps({**metadata, "schema": 10**6}))


def weights(valid: bytes) -> Iterator[tuple[str, bytes]]:
    """Sound safetensors files with other tensors than there should be."""
    header, data = parts(valid)
    for name in (name for name in header if name != "__metadata__"):
        start, end = header[name]["data_offsets"]
        code, integers = {"F64": ("<d", "I64"), "F32": ("<f", "I32")}[header[name]["dtype"]]
        size = struct.calcsize(code)
        for value in (float("nan"), float("inf")):
            if end > start:
                yield f"{value} in {name}", joined(header, data[:start] + struct.pack(code, value) + data[start + size :])
        fewer = copy.deepcopy(header)
        fewer[f"{name}x"] = fewer.pop(name)
        yield f"{name} has another name", joined(fewer, data)
        flat = copy.deepcopy(header)
        flat[name]["shape"] = [(end - start) // size]
        if flat != header:
            yield f"{name} has another shape", joined(flat, data)
        whole = copy.deepcopy(header)
        whole[name] |= {"dtype": integers}
        yield f"{name} is of integers", joined(whole, data)


def configurations(valid: bytes) -> Iterator[tuple[str, bytes]]:
    """JSON files that are none, or say something else."""
    yield "empty", b""
    yield "truncated", valid[:-1]
    yield "not UTF-8", b"\xff" + valid
    yield "nested 100,000 deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    yield "a number of 100,000 digits", b'{"a":' + b"9" * 100_000 + b"}"
    yield "17 MB of blanks", valid + b" " * (17 << 20)
    for value in ([1, 2], None, "text", 5):
        yield f"{value} instead", json.dumps(value).encode()
    record = json.loads(valid)
    if not isinstance(record, dict):
        return
    for inner in (None, "metadata"):
        entries = record if inner is None else record.get(inner, {})
        for key in entries:
            for value in (..., *STRANGE):
                if type(value) is bool and type(entries[key]) is bool:  # as good as the other one
                    continue
                changed = {name: entry for name, entry in entries.items() if name != key} | ({} if value is ... else {key: value})
                name = f"{key} missing" if value is ... else f"{key} = {str(value)[:20]!r}"
                yield name, json.dumps(changed if inner is None else {**record, inner: changed}).encode()


def archives(valid: bytes, canary: Path) -> Iterator[tuple[str, bytes]]:
    """Zip archives of tensors, those of numpy or torch, that are none or hold something else."""
    malicious = pickle.dumps(Canary(canary), protocol=2)
    yield "empty", b""
    yield "truncated", valid[: len(valid) // 2]
    yield "a pickle", malicious
    with zipfile.ZipFile(io.BytesIO(valid)) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}

    def packed(changed: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, data in changed.items():
                archive.writestr(name, data)
        return buffer.getvalue()

    for name, data in entries.items():
        numbers = name.endswith(".npy")
        if numbers or "/data" in name:
            yield f"{name} missing", packed({other: entry for other, entry in entries.items() if other != name})
            yield f"{name} truncated", packed({**entries, name: data[: len(data) // 2]})
            yield f"{name} empty", packed({**entries, name: b""})
        if numbers or name.endswith("data.pkl"):
            yield f"{name} is a pickle", packed({**entries, name: malicious})
        if numbers:
            for value in (np.full(np.load(io.BytesIO(data)).shape, np.nan, np.float32), np.zeros((3, 3, 3), np.float32), np.array(["a"])):
                yield f"{name} of {value.dtype} {value.shape}", packed({**entries, name: npy(value)})
            objects = io.BytesIO()
            np.save(objects, np.array([Canary(canary)], dtype=object), allow_pickle=True)
            yield f"{name} holds objects", packed({**entries, name: objects.getvalue()})
            for shape in ((10**9 // 4,), (10**14,), (2**40, 2**40), (-1,)):
                start = npy(np.zeros(1, np.float32))
                yield (
                    f"{name} declares {shape}",
                    packed({**entries, name: start.replace(b"(1,), }" + b" " * 40, f"{shape}, }}".encode().ljust(47))}),
                )
    yield "1 GB in 1 MB", packed({**entries, "big": bytes(10**9)}, zipfile.ZIP_DEFLATED)
    yield "a path that escapes", packed({**{f"../../{name}": data for name, data in entries.items()}})


def npy(array: np.ndarray) -> bytes:
    """An array as numpy saves it."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def harmless(key: str) -> tuple[Any, ...]:
    """Values that an entry may well have: free text, and numbers and records that are only shown."""
    records = dict.fromkeys(("provenance", "details", "model", "text", "request", "medians", "excluded"), ({}, {"a": 1}))
    return (records | {"name": ("", "../../etc/passwd", "\0"), "target": (10**30,), "last": (10**30,), "sinks": ([],)}).get(key, ())


Sound = tuple[Path, Callable[[], object]]
"""A sound file, and what loads it."""

# ---- the script ----------------------------------------------------------------------------------------------------------


def moments_of(name: str, folder: Path) -> Sound:
    """A folder that holds moments; the test made them."""
    from nnato.accumulation import load_moments

    file = folder / {"moments": "moments.safetensors", "part": "train.ordinary.0.safetensors"}[name]

    def load() -> object:
        moments = load_moments(folder).moments
        return [moments.of(split) for split in ("train", "validation", "test")], moments.shuffled

    return file, load


def operator_of(name: str, folder: Path) -> Sound:
    """An operator, or directions."""
    from nnato.edits import read_directions
    from nnato.operators import TransportOperator
    from nnato.sites import ResidualSite

    eye, zero = torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    if name == "operator":
        file = TransportOperator(ResidualSite(1), ResidualSite(2), eye, zero, zero + 1, details={"a": 1}).save(folder / "o.safetensors")
        return file, lambda: TransportOperator.load(file)
    file = folder / "d.safetensors"
    save_file({"directions": eye}, file, {"nnato": "{}"})
    return file, lambda: read_directions(file)


def lens_of(name: str, folder: Path) -> Sound:
    """A lens in nnato's format, or in that of the tuned-lens package."""
    from nnato.lens import Lens, import_lens, logit_lens

    if name == "lens":
        return logit_lens(3, 4).save(folder), lambda: Lens.load(folder)
    state = {f"{number}.{kind}": torch.ones(*shape) for number in range(3) for kind, shape in (("weight", (4, 4)), ("bias", (4,)))}
    torch.save(state, folder / "params.pt")
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 3, "d_model": 4, "bias": True, "base_model_name_or_path": "m"}))

    def load() -> object:
        return import_lens(folder, 3, 4).digest

    return folder / {"translators": "params.pt", "translators' config": "config.json"}[name], load


def dictionary_of(name: str, folder: Path) -> Sound:
    """An SAE of sae_lens, of the authors of multi-layer SAEs, or of Gemma Scope."""
    from nnato.dictionaries import load_dictionary

    generator = torch.Generator().manual_seed(0)
    encoder, decoder = (torch.randn(*shape, generator=generator) for shape in ((4, 12), (12, 4)))
    wide, narrow = torch.ones(12), torch.ones(4)
    if name.startswith("sae"):
        save_file({"W_enc": encoder, "W_dec": decoder, "b_enc": wide, "b_dec": narrow}, folder / "sae_weights.safetensors")
        about = {"sae_lens_version": "6.54.0", "hook_name": "blocks.1.hook_resid_post", "model_name": "m", "nnato_sites": [1, 2]}
        about |= {"nnato_model": {"name": "m"}, "nnato_lens": None, "neuronpedia_id": "m/1"}
        config = {"architecture": "topk", "d_in": 4, "d_sae": 12, "k": 3, "dtype": "float32", "device": "cpu", "metadata": about}
        config |= {"normalize_activations": "none", "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False}
        (folder / "cfg.json").write_text(json.dumps({**config, "reshape_activations": "none"}))
        file, reference = folder / {"sae weights": "sae_weights.safetensors", "sae config": "cfg.json"}[name], str(folder)
    elif name.startswith("mlsae"):
        state = {"encoder.weight": encoder.T.contiguous(), "decoder.weight": decoder.T.contiguous(), "pre_encoder_bias": narrow}
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"k": 3, "standardize": True, "n_latents": 12}))
        file, reference = folder / {"mlsae weights": "model.safetensors", "mlsae config": "config.json"}[name], f"mlsae:{folder}"
    else:
        file, reference = folder / "params.npz", str(folder / "params.npz")
        np.savez(file, w_enc=encoder, w_dec=decoder, b_enc=wide, b_dec=narrow, threshold=wide)
    return file, lambda: load_dictionary(reference).fingerprint()["digest"]


def layers_of(name: str, folder: Path) -> Sound:
    """What `mlsae layers` leaves."""
    from nnato.dictionaries import load_dictionary
    from nnato.multilayer import KIND, LayerStatistic, MultiLayerSAE, load_layer_activity
    from nnato.sites import ResidualSite
    from nnato.statistics import ResidualBatch
    from nnato.storage import write_artifact

    dictionary_of("mlsae weights", folder)
    sae = MultiLayerSAE(load_dictionary(f"mlsae:{folder}"), (ResidualSite(0), ResidualSite(1)))
    statistic, every = LayerStatistic(sae, 4), torch.ones(2, 5, dtype=torch.bool)
    residuals = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    documents = torch.zeros(2, 5, dtype=torch.int64)
    statistic.update(ResidualBatch(residuals, sae.sites, every, ~every, documents, "test", 0, documents))
    tensors, metadata = statistic.state()
    about = {"model": {"name": "m"}, "text": {"source": "t"}, "split": "test", "request": {}, "cursor": 1, "batches": 1}
    about |= {"medians": {}, "excluded": {}, "sinks": []}
    file = folder / "layers.safetensors"
    write_artifact(file, KIND, tensors, {**metadata, **about})
    return file, lambda: load_layer_activity(file, sae)


KINDS: dict[str, tuple[Callable[[str, Path], Sound], str]] = {
    "operator": (operator_of, "artefact"),
    "moments": (moments_of, "artefact"),
    "part": (moments_of, "artefact"),
    "lens": (lens_of, "artefact"),
    "layers": (layers_of, "artefact"),
    "directions": (operator_of, "container"),
    "sae weights": (dictionary_of, "weights"),
    "mlsae weights": (dictionary_of, "weights"),
    "sae config": (dictionary_of, "configuration"),
    "mlsae config": (dictionary_of, "configuration"),
    "translators' config": (lens_of, "configuration"),
    "translators": (lens_of, "archive"),
    "gemma scope": (dictionary_of, "archive"),
}
"""Kinds of files: what makes a sound one, and how hostile ones are made of it."""


def cases_of(form: str, valid: bytes, canary: Path) -> Iterator[tuple[str, bytes]]:
    """Hostile files of one form, by what is wrong with them."""
    if form == "configuration":
        yield from configurations(valid)
    elif form == "archive":
        yield from archives(valid, canary)
    else:
        yield from containers(valid, canary)
    if form == "artefact":
        yield from labels(valid)
        yield from contents(valid)
    if form in ("artefact", "weights"):
        yield from weights(valid)


def main() -> None:
    """Load every hostile file of each kind; print a JSON object per file: what was raised, CPU seconds, growth of memory."""
    for name in KINDS:
        folder = Path(sys.argv[1]) / name
        folder.mkdir(exist_ok=True)
        make, form = KINDS[name]
        file, load = make(name, folder)
        sound, valid, canary = load(), file.read_bytes(), folder / "canary"
        for case, data in cases_of(form, valid, canary):
            file.write_bytes(data)
            del data
            record = {"kind": name, "case": case, **attempt(load, sound), "canary": canary.exists()}
            # An entry of a configuration may be one that is only shown: then what is loaded is the same.
            record["same"] &= form == "configuration"
            print(json.dumps(record))
        file.unlink()
        for what in ("a folder", "a dangling link", "a link to a device"):
            file.mkdir() if what == "a folder" else file.symlink_to("/dev/zero" if what == "a link to a device" else folder / "nowhere")
            print(json.dumps({"kind": name, "case": what, **attempt(load, None), "same": False, "canary": False}))
            shutil.rmtree(file) if what == "a folder" else file.unlink()


def attempt(load: Callable[[], object], sound: object) -> dict[str, Any]:
    """What a loader raises, or `nothing`, with its message; whether it returns what the sound file holds; CPU seconds; memory in MB."""
    from nnato.errors import NnatoError

    Path("/proc/self/clear_refs").write_text("5")  # the largest memory so far is forgotten
    before, start = memory("VmRSS"), time.process_time()
    raised, message, same = "nothing", "", False
    try:
        same = load() == sound
    except NnatoError as error:
        raised, message = "NnatoError", str(error)[:300]
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is reported
        raised, message = type(error).__name__, str(error)[:300]
    seconds = time.process_time() - start
    return {"raised": raised, "message": message, "same": same, "seconds": seconds, "grown_mb": memory("VmHWM") - before}


def memory(which: str) -> float:
    """`VmRSS`, memory in use, or `VmHWM`, the most of it, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{which}:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
