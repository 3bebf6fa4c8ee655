"""Reference ids: the prompts of prompts.json through transformers' CLIPTokenizer.

prompts.json: {group: prompts}, at least one prompt for each rule; no character is newer than
Unicode 10 (2017), so Python's version of the tables does not matter.
tokens.safetensors: ids_1 and ids_2, (N, 77) int32, with the vocabulary of weights/mini; header:
`prompts` (a JSON list of N) and the libraries' versions.
"""

import itertools
import json
from importlib.metadata import version
from pathlib import Path

MINI = Path(__file__).resolve().parents[2] / "weights" / "mini"


def make_tokens(path):
    import torch
    from storage import write
    from transformers import CLIPTokenizer

    groups = json.loads(Path(__file__).with_name("prompts.json").read_text("utf-8"))
    prompts = list(itertools.chain(*groups.values()))
    tensors = {}
    for name, folder in (("ids_1", "tokenizer"), ("ids_2", "tokenizer_2")):
        tokenizer = CLIPTokenizer.from_pretrained(MINI / folder)
        rows = tokenizer(prompts, padding="max_length", max_length=77, truncation=True).input_ids
        tensors[name] = torch.tensor(rows, dtype=torch.int32)
    write(path, tensors, {"tokenizers": version("tokenizers"), "prompts": prompts})
