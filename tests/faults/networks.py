"""A small transformer for fault trials. `jobs` copies it beside the job file, where a user's module would lie."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH = 60, 24


class Block(nn.Module):
    """Attention with padding masked out, then a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.mix = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        y = self.norm(x)
        scores = self.query(y) @ self.key(y).transpose(1, 2) / WIDTH**0.5
        scores = scores.masked_fill(attention_mask[:, None, :] == 0, -1e9)
        x = x + self.mix(scores.softmax(dim=-1) @ self.value(y))
        return x + self.down(F.gelu(self.up(self.norm_after(x))))


class Transformer(nn.Module):
    """Two blocks over token ids, and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, attention_mask)
        return self.head(x)


def transformer() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Transformer()
