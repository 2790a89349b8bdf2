"""Small networks for jobs. `sample_jobs` copies this file beside the job file, where a user's own module would lie."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Cnn(nn.Module):
    """Plain, depthwise and transposed convolution, with and without batch norm and ReLU, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = F.relu(self.depthwise(x))
        return self.head(self.up(x).relu().mean(dim=(2, 3)))


class Attention(nn.Module):
    """One attention block over token ids. The output layer is tied to the embedding, `mix` runs twice."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        y = self.norm(x)
        scores = self.query(y) @ self.key(y).transpose(1, 2) / y.shape[-1] ** 0.5
        scores = scores.masked_fill(attention_mask[:, None, :] == 0, -1e9)
        x = x + self.mix(scores.softmax(dim=-1) @ self.value(y))
        return self.head(x + self.mix(F.relu(x)))


class Mlp(nn.Module):
    """Two linear layers; `second` and `third` share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)
        self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(F.relu(self.first(x)))))


class Wide(nn.Module):
    """Linear layers whose inputs come in blocks of 32: one for each float format, and one with integers."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = nn.Linear(8, 64)
        self.mxfp4 = nn.Linear(64, 32)
        self.mxfp8 = nn.Linear(32, 64)
        self.nvfp4 = nn.Linear(64, 32)
        self.fp4 = nn.Linear(32, 16)
        self.int4 = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mxfp4(F.relu(self.fp8(x)))
        x = self.nvfp4(F.relu(self.mxfp8(F.relu(x))))
        return self.int4(F.relu(self.fp4(F.relu(x))))


class Mixture(nn.Module):
    """Experts in one tensor, picked by a gate, and a weight that is stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(8, 8), nn.Linear(8, 3)
        self.experts, self.last = nn.Parameter(torch.randn(3, 6, 8) / 3), nn.Parameter(torch.randn(6, 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        weights, picked = self.gate(x).softmax(dim=-1).topk(2)
        share = torch.zeros_like(weights[:, :1]).repeat(1, 3).scatter(1, picked, weights)
        return torch.einsum("ne,eoi,ni->no", share, self.experts, x) @ self.last


def _seeded(build: type[nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        for buffer in model.buffers():
            if buffer.is_floating_point():
                nn.init.uniform_(buffer, 0.5, 1.5)
    return model


def cnn(seed: int = 0) -> nn.Module:
    return _seeded(Cnn, seed)


def attention(seed: int = 0) -> nn.Module:
    return _seeded(Attention, seed)


def mlp(seed: int = 0) -> nn.Module:
    return _seeded(Mlp, seed)


def wide(seed: int = 0) -> nn.Module:
    return _seeded(Wide, seed)


def mixture(seed: int = 0) -> nn.Module:
    return _seeded(Mixture, seed)


def unseeded() -> nn.Module:
    """Other weights in every process."""
    torch.seed()
    return Mlp()


def halved(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transform: pixels 0 to 255 under another name, as the model wants them."""
    return {"x": batch["pixels"].float() / 255}


def no_module() -> int:
    return 3


def failing() -> nn.Module:
    raise RuntimeError("no weights for you")
