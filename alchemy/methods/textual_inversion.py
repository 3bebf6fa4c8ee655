"""Textual Inversion (Gal et al. 2022): a new word is learned, and nothing else.

The word is one or several new rows beside each text encoder's table of embeddings, which stays as it is to the bit; the loss is that of
all training, its gradient goes through UNet and text encoders to the rows alone.
"""

from dataclasses import replace

import torch
from torch import nn

from .. import dataset

OBJECT = (
    "a photo of a {}",
    "a picture of a {}",
    "a good photo of a {}",
    "a close photo of the {}",
    "a photo of one {}",
    "a photo of the {}, in the middle",
)
STYLE = (
    "a picture in the style of {}",
    "a painting in the style of {}",
    "a drawing of a place in the style of {}",
    "something small, in the style of {}",
    "a scene in the style of {}",
    "in the style of {}",
)


class ExtendedEmbedding(nn.Embedding):
    """A table of embeddings that keeps its weight, with `extra` (n, D) float32 rows for the ids from `first` on."""

    def __init__(self, table, first):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = table.weight.shape
        self.padding_idx = self.max_norm = None
        self.weight, self.first = table.weight, first
        self.extra = nn.Parameter(
            torch.zeros(0, self.embedding_dim, device=table.weight.device), requires_grad=False
        )

    def forward(self, ids):
        new = ids >= self.first
        known = nn.functional.embedding(ids.masked_fill(new, 0), self.weight)
        if not len(self.extra):
            return known
        return torch.where(
            new[..., None],
            nn.functional.embedding((ids - self.first).clamp(min=0), self.extra).to(known.dtype),
            known,
        )


def tables(sdxl):
    """Both text encoders' ExtendedEmbedding; put there, the first time."""
    found = []
    for encoder, tokenizer in zip(sdxl.text_encoders, sdxl.tokenizers):
        embeddings = encoder.text_model.embeddings
        if not isinstance(embeddings.token_embedding, ExtendedEmbedding):
            embeddings.token_embedding = ExtendedEmbedding(
                embeddings.token_embedding, max(tokenizer.id_to_token) + 1
            )
        found.append(embeddings.token_embedding)
    return found


def add_word(sdxl, token, rows):
    """Teach both tokenizers a token and give it its rows: for each encoder (n, D), of one n. Returns the parameters that hold all extra
    rows, one for each encoder. Raises ValueError where the token exists already or the rows do not fit."""
    both = tables(sdxl)
    shapes = [tuple(r.shape) for r in rows]
    if shapes[0][0] != shapes[1][0] or any(
        shape[1:] != (table.embedding_dim,) for shape, table in zip(shapes, both)
    ):
        raise ValueError(
            f"embeddings of shapes {shapes[0]} and {shapes[1]} do not fit text encoders of widths {both[0].embedding_dim} and {both[1].embedding_dim}"
        )
    for tokenizer in sdxl.tokenizers:
        tokenizer.add(token, shapes[0][0])
    for table, r in zip(both, rows):
        table.extra = nn.Parameter(
            torch.cat([table.extra.detach(), r.float().to(table.extra.device)]), requires_grad=False
        )
    return [table.extra for table in both]


def start_rows(sdxl, word, vectors):
    """Rows to start from: those of a word's pieces, over and over, for each encoder (vectors, D) float32."""
    made = []
    for tokenizer, table in zip(sdxl.tokenizers, tables(sdxl)):
        ids = [i for i, _ in tokenizer.tokens(word)]
        if not ids:
            raise ValueError(f"the word {word!r} to start from is empty")
        made.append(
            table(
                torch.tensor(
                    [ids[k % len(ids)] for k in range(vectors)], device=table.weight.device
                )
            )
            .detach()
            .float()
        )
    return made


class Live:
    """live[prompt] is its Conditioning, encoded when asked for, so that it follows what learns, and gradients go through it."""

    def __init__(self, sdxl, size):
        self.sdxl, self.size = sdxl, size

    def __getitem__(self, prompt):
        return self.sdxl.encode_prompt([prompt], self.size)


def stream(draw, prompts, seed, rank=0, world=1):
    """draw(step, part) with a prompt of `prompts` for each sample, chosen by chance."""

    def varied(step, part):
        batch = draw(step, part)
        count = len(batch.prompts)
        chosen = torch.randint(
            len(prompts), (world * count,), generator=dataset.generator(seed, 4, step, part)
        ).tolist()[rank * count :][:count]
        return replace(batch, prompts=[prompts[k] for k in chosen])

    return varied
