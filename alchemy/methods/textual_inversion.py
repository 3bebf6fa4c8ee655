"""Textual Inversion (Gal et al. 2022): the embedding of a new token is trained, and nothing else.

The embedding is one or several new rows beside each text encoder's table, which stays as it is to
the bit. The loss is that of all training; its gradient goes through the UNet and the text encoders
to the new rows.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import dataset
from ..dataset import GetBatch
from ..sdxl import SDXL

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
    """An embedding table that keeps its weight, with `extra` (n, D) float32 rows for the ids from
    `first` on."""

    def __init__(self, table: nn.Embedding, first: int):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = table.weight.shape
        self.padding_idx = self.max_norm = None
        self.weight, self.first = table.weight, first
        empty = torch.zeros(0, self.embedding_dim, device=table.weight.device)
        self.extra = nn.Parameter(empty, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        is_new = ids >= self.first
        known = nn.functional.embedding(ids.masked_fill(is_new, 0), self.weight)
        if not len(self.extra):
            return known
        new = nn.functional.embedding((ids - self.first).clamp(min=0), self.extra)
        return torch.where(is_new[..., None], new.to(known.dtype), known)


def tables(sdxl: SDXL) -> list[ExtendedEmbedding]:
    """Both text encoders' ExtendedEmbedding, which replaces the plain table at the first call."""
    found = []
    for encoder, tokenizer in zip(sdxl.text_encoders, sdxl.tokenizers, strict=True):
        embeddings = encoder.text_model.embeddings
        if not isinstance(embeddings.token_embedding, ExtendedEmbedding):
            first = max(tokenizer.id_to_token) + 1
            embeddings.token_embedding = ExtendedEmbedding(embeddings.token_embedding, first)
        found.append(embeddings.token_embedding)
    return found


def add_word(sdxl: SDXL, token: str, rows: Sequence[Tensor]) -> list[nn.Parameter]:
    """Add a token to both tokenizers and its rows (n, D) to each encoder, n the same for both.

    Returns the parameters that hold all extra rows. Raises ValueError where the token exists or
    the rows do not fit.
    """
    both = tables(sdxl)
    shapes = [tuple(r.shape) for r in rows]
    widths = [table.embedding_dim for table in both]
    same_count = shapes[0][0] == shapes[1][0]
    if not same_count or [shape[1:] for shape in shapes] != [(width,) for width in widths]:
        raise ValueError(
            f"embeddings of shapes {shapes[0]} and {shapes[1]} do not fit text encoders of "
            f"widths {widths[0]} and {widths[1]}"
        )
    for tokenizer in sdxl.tokenizers:
        tokenizer.add(token, shapes[0][0])
    for table, new in zip(both, rows, strict=True):
        extra = torch.cat([table.extra.detach(), new.float().to(table.extra.device)])
        table.extra = nn.Parameter(extra, requires_grad=False)
    return [table.extra for table in both]


def start_rows(sdxl: SDXL, word: str, vectors: int) -> list[Tensor]:
    """Initial rows (vectors, D) float32 for each encoder: those of the word's tokens, repeated."""
    rows = []
    for tokenizer, table in zip(sdxl.tokenizers, tables(sdxl), strict=True):
        ids = [token_id for token_id, _ in tokenizer.tokens(word)]
        if not ids:
            raise ValueError(f"--init-word {word!r} has no token; give another word")
        repeated = (ids * vectors)[:vectors]
        rows.append(table(torch.tensor(repeated, device=table.weight.device)).detach().float())
    return rows


def build_prompts(token: str, style: bool) -> list[str]:
    """The templates with the token; raises ValueError where one contains the token already."""
    if any(token.lower() in template for template in (*OBJECT, *STYLE, "a photo of a car")):
        raise ValueError(
            f"--token {token!r} is a word of the training prompts; choose another, like <my-dog>"
        )
    templates = STYLE if style else OBJECT
    return [template.format(token) for template in templates]


def start(sdxl: SDXL, token: str, init_word: str, vectors: int, prompts: list[str]) -> None:
    """Add the token with its initial rows; raises ValueError where a prompt becomes too long."""
    add_word(sdxl, token, start_rows(sdxl, init_word, vectors))
    if any(sdxl.tokenizers[0].truncated_text(prompt) for prompt in prompts):
        raise ValueError(
            f"--vectors {vectors} is too many; the token has to fit into the 77 tokens of "
            f"{max(prompts, key=len)!r}"
        )


def vary_prompts(
    get_batch: GetBatch, prompts: Sequence[str], seed: int, rank: int = 0, world: int = 1
) -> GetBatch:
    """get_batch with a random one of the prompts for each sample."""

    def get_varied(step, micro_step):
        batch = get_batch(step, micro_step)
        count = len(batch.prompts)
        rng = dataset.generator(seed, 4, step, micro_step)
        chosen = torch.randint(len(prompts), (world * count,), generator=rng).tolist()
        mine = chosen[rank * count :][:count]
        return replace(batch, prompts=[prompts[k] for k in mine])

    return get_varied
