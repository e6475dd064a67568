"""
Your own model
==============

Any decoder that transformers can load will do: a hub id, a folder, a ``.gguf`` file, or a module made here. This page makes a small Llama
with random weights and a tokenizer of letters, and treats it as one would a real model.
"""

# %%
# A model and a tokenizer. ``wrap`` checks that its blocks can be found and that no position sees a later one.
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nnato.models import describe, wrap

letters = ["<unk>", "<pad>", *map(chr, range(32, 127))]
spelling = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(letters)}, unk_token="<unk>"))
spelling.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling, unk_token="<unk>", pad_token="<pad>")
torch.manual_seed(0)
config = LlamaConfig(vocab_size=len(letters), hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4)
module = LlamaForCausalLM(config)
with torch.no_grad():
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15)  # else the blocks of an untrained model do next to nothing
model = wrap(module, tokenizer)
describe(model)

# %%
# Everything works as on the embedded model. Save it with ``module.save_pretrained(folder)`` and ``tokenizer.save_pretrained(folder)``, and
# the commands take the folder.
from pathlib import Path

from nnato import Corpus, accumulate, fit
from nnato.plots import r2_heat_maps

accumulated = accumulate(model, Corpus(tokens=40_000), [(source, target) for target in range(1, 6) for source in range(target)])
r2_heat_maps(fit(accumulated), Path("own.png"), "variance_weighted", "a random Llama of 6 blocks, letters of python-docs")

# %%
# **What this shows.** Even in an untrained model a linear map carries much from block to block, since the residual stream only adds. What a
# trained model transports has to be judged against that: hence the gain over the identity, on the right.
