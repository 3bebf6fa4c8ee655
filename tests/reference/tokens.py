"""Reference ids: every prompt of prompts.py through transformers' CLIPTokenizer, with the vocabulary of weights/mini.

tokens.safetensors: ids_1 and ids_2, (N, 77) int32; header: `prompts` (a JSON list of N) and the libraries' versions.
"""

from importlib.metadata import version
from pathlib import Path

MINI = Path(__file__).resolve().parents[2] / "weights" / "mini"


def make_tokens(path):
    import torch
    from prompts import PROMPTS
    from storage import write
    from transformers import CLIPTokenizer

    tensors = {}
    for name, folder in (("ids_1", "tokenizer"), ("ids_2", "tokenizer_2")):
        tokenizer = CLIPTokenizer.from_pretrained(MINI / folder)
        rows = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True).input_ids
        tensors[name] = torch.tensor(rows, dtype=torch.int32)
    write(path, tensors, {"tokenizers": version("tokenizers"), "prompts": PROMPTS})


if __name__ == "__main__":
    make_tokens(Path(__file__).with_name("tokens.safetensors"))
