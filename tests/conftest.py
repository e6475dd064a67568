"""Tiny random models of five architectures, a word-level tokenizer, and small texts: no hub, no downloads."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from nnato.corpus import Corpus
from nnato.models import wrap
from nnato.operators import TransportOperator
from nnato.sites import ResidualSite
from nnato.storage import cache_dir
from nnato.trace import TransformersModel

VOCABULARY = 97
WIDTH = 16
BLOCKS = 4
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {"num_key_value_heads": 1, "head_dim": 8}
ARCHITECTURES = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**COMMON, **GQA, sliding_window=16)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**COMMON, **GQA, sliding_window=16)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, **GQA)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=BLOCKS, n_head=2, n_positions=512, bos_token_id=1, eos_token_id=2)
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**COMMON)),
}


def make_tokenizer(bos=True):
    words = ["<pad>", "<bos>", "<eos>", "<unk>"] + [f"w{i}" for i in range(VOCABULARY - 4)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def make_module(name, seed=0):
    torch.manual_seed(seed)
    module = ARCHITECTURES[name]()
    with torch.no_grad():  # the default initialisation is so small that blocks hardly do anything
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return module.eval()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(params=list(ARCHITECTURES))
def any_model(request, tokenizer):
    return wrap(make_module(request.param), tokenizer)


@pytest.fixture
def model(tokenizer):
    return wrap(make_module("gemma2"), tokenizer)


def random_words(rng, count):
    return " ".join(f"w{i}" for i in rng.integers(0, VOCABULARY - 4, count))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """60 documents of 20 to 120 words, one .txt file each."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("text")
    for number in range(60):
        (folder / f"{number:03}.txt").write_text(random_words(rng, int(rng.integers(20, 120))))
    return folder


@pytest.fixture(scope="session")
def corpus(text):
    return Corpus(str(text), context=32, per_document=None)


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory, tokenizer):
    """A tiny Gemma 2 in a folder, as a user has one."""
    folder = tmp_path_factory.mktemp("model")
    make_module("gemma2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Tiny models gain nothing from threads, and crawl when other processes compete. Set here, before any fixture starts a server.
THREADS = torch.get_num_threads()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def all_threads_for_real_models(request, monkeypatch):
    if "model" in request.keywords:
        torch.set_num_threads(THREADS)
        yield
        torch.set_num_threads(1)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the processes that tests start
        yield


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path, monkeypatch):
    """Tests keep out of the user's cache, except for the embedded models, which are slow to convert."""
    if "model" in request.keywords:
        models = cache_dir() / "models"
        models.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "models").symlink_to(models)
    monkeypatch.setenv("NNATO_CACHE", str(tmp_path / "cache"))


def hook_residuals(module, ids, edits=(), **forward):
    """Residuals of every block by plain forward hooks, and the logits: the independent reference. edits: {block: function}."""
    blocks = next(m for n, m in module.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == BLOCKS)
    seen, handles = {}, []

    def before(_, args, kwargs):
        seen["embed"] = args[0] if args else kwargs["hidden_states"]
        if "embed" in dict(edits):
            seen["embed"] = dict(edits)["embed"](seen["embed"], seen)
            return ((seen["embed"], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": seen["embed"]})
        return None

    handles.append(blocks[0].register_forward_pre_hook(before, with_kwargs=True))
    for number, block in enumerate(blocks):

        def after(_, __, output, number=number):
            value = output[0] if isinstance(output, tuple) else output
            if number in dict(edits):
                value = dict(edits)[number](value, seen)
                output = (value, *output[1:]) if isinstance(output, tuple) else value
            seen[number] = value
            return output

        handles.append(block.register_forward_hook(after))
    try:
        with torch.no_grad():
            logits = module(input_ids=ids, use_cache=False, **forward).logits
    finally:
        for handle in handles:
            handle.remove()
    return seen, logits


def make_operator(source, target):
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((WIDTH, WIDTH), (WIDTH,), (WIDTH,))]
    return TransportOperator(ResidualSite.parse(source), ResidualSite.parse(target), *tensors, details={"secret": "stays here"})


def supply(*pairs, seed=7):
    """Everything that some intervention needs at random: (keyword arguments of ablate, tensors for a reference at the last pair)."""
    generator = torch.Generator().manual_seed(seed)
    features, vector, left, right = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, WIDTH), (WIDTH,), (WIDTH, 3), (3, WIDTH))
    )
    controls, subspaces = [], {}
    for pair in pairs:
        for number, name in enumerate(("shuffled", "shrunk_to_identity", "rank_2"), 3):
            operator = make_operator(*map(ResidualSite, pair))
            controls.append(dataclasses.replace(operator, weight=operator.weight / number, name=name))
        subspaces[controls[-1].pair] = (left, right)
    given = {"features": features, "steering": vector, "subspaces": subspaces, "controls": controls}
    return given, {"vector": vector, "projector": left @ right, "D": features, **{one.name: one for one in controls}}


def put(positions, value):
    """A hook's edit: `value`, or a function of the residuals seen so far, at positions of the sequence that exist already."""

    def edit(residual, seen):
        new = value(seen) if callable(value) else value
        at = range(residual.shape[1])[positions] if isinstance(positions, slice) else [p for p in positions if p < residual.shape[1]]
        residual = residual.clone()
        residual[:, list(at)] = new[:, list(at)] if isinstance(new, torch.Tensor) and new.dim() == 3 else torch.as_tensor(new).to(residual)
        return residual

    return edit


def hook_generate(module, ids, edits, steps):
    """Greedy generation without a cache and without end: one full pass per token, edited by forward hooks."""
    for _ in range(steps):
        logits = hook_residuals(module, ids, edits)[1][:, -1].clone()
        logits[:, 2] = -torch.inf  # the end of the sequence
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


# ---- a real NDIF server ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ndif_host():
    """The address of an NDIF server, started for this run. Skips with the reason where its environment is missing."""
    if os.environ.get("CI") and not os.environ.get("NNATO_NDIF_IN_CI"):
        pytest.skip("a whole NDIF server is not part of CI (NNATO_NDIF_IN_CI=1 makes it one); after `make ndif`: pytest -m ndif")
    command = [sys.executable, str(Path(__file__).parent / "ndif" / "server.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as server:
        line = server.stdout.readline()
        if not line:
            reason = server.stderr.read()
            if server.wait() == 3:
                pytest.skip(reason.strip())
            pytest.fail(f"the NDIF server did not start: {reason}")
        try:
            yield json.loads(line)["host"]
        finally:
            server.stdin.close()  # the server stops
            server.wait(90)


@pytest.fixture(scope="session")
def ndif_models(ndif_host, tmp_path_factory):
    """By architecture, what `on_ndif` gives: made once, since the server loads a model when it is first asked for its folder."""
    from nnsight import CONFIG
    from nnsight.modeling import huggingface

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CONFIG.API, "HOST", ndif_host)
        patch.setattr(CONFIG.API, "APIKEY", None)
        patch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)
        served = {}
        for name in ("gemma2", "gpt2"):
            folder, module = str(tmp_path_factory.mktemp(f"ndif-{name}")), make_module(name)
            module.save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
            patch.setitem(huggingface._ID_CACHE, folder, folder)  # a folder needs no look-up on the hub
            served[name] = TransformersModel(folder, task="text-generation", tokenizer=make_tokenizer()), module, ndif_host
        yield served


@pytest.fixture(params=["gemma2", "gpt2"])
def on_ndif(request, ndif_models):
    """(a model without weights, the same module here, the host): `remote=True` runs on the host."""
    return ndif_models[request.param]


@pytest.fixture(params=["trusted", "sandboxed"])
def either_way(request, monkeypatch):
    """Requests run in the process of the model, as those of trusted keys do, and in a sandbox, as all others."""
    from nnsight.schema.request import RequestModel

    envelope = RequestModel.metadata
    answer = request.param == "trusted"
    monkeypatch.setattr(RequestModel, "metadata", lambda self: json.dumps({**json.loads(envelope(self)), "trusted": answer}))
    return request.param
