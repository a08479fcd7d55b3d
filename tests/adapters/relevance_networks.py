"""Small networks of the kinds that people explain, each with what Captum's LRP does not cover."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, channels: int, add: nn.Module | None = None) -> None:
        super().__init__()
        conv = {"kernel_size": 3, "padding": 1, "bias": False}
        self.first, self.one = nn.Conv2d(channels, channels, **conv), nn.BatchNorm2d(channels)
        self.second, self.two = nn.Conv2d(channels, channels, **conv), nn.BatchNorm2d(channels)
        # Captum's hooks do not take a module twice.
        self.relu, self.last, self.add = nn.ReLU(), nn.ReLU(), add

    def forward(self, x: Tensor) -> Tensor:
        out = self.two(self.second(self.relu(self.one(self.first(x)))))
        if self.add is not None:
            return self.last(self.add(out, x))
        out += x
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    """A stem, two residual blocks, a head."""

    def __init__(self, add: Callable[[], nn.Module | None] = lambda: None) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.blocks = nn.Sequential(Residual(4, add()), Residual(4, add()))
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


class Attention(nn.Module):
    """Heads of attention by one function, or step by step."""

    def __init__(self, width: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.fused = heads, fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class ViT(nn.Module):
    """Patches, a class token, positions, two blocks with GELU."""

    def __init__(self, *, fused: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.attention = nn.ModuleList(Attention(8, 2, fused=fused) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(5))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, 8))
            for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.positions
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlps, strict=True)):
            h = h + attention(self.norms[2 * i](h))
            h = h + mlp(self.norms[2 * i + 1](h))
        return self.head(self.norms[4](h)[:, 0])


class Encoder(nn.Module):
    """Torch's own encoder, with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        padded = torch.zeros(x.shape[:2], dtype=torch.bool)
        padded[:, -1] = True
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padded)[:, 0])


class Gated(nn.Module):
    """RMSNorm written out, a gate in place, GroupNorm, tanh, a squared activation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(5, 8), Attention(8, 1, fused=False)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.gate, self.up, self.down = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.groups, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 3)

    def _norm(self, x: Tensor) -> Tensor:
        return self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.attention(self._norm(h))
        gate = F.silu(self.gate(self._norm(h)), inplace=True)
        gate *= self.up(h)
        h = self.groups((h + self.down(gate)).mean(1)).tanh()
        return self.head(h + F.normalize(h, dim=-1) / (1 + h.square().sum(-1, keepdim=True)))


class Bert(nn.Module):
    """A BERT of two layers with random weights, as a function of embeddings or of ids."""

    def __init__(self, attention: str = "sdpa") -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=12, max_position_embeddings=8, num_labels=3,
            attn_implementation=attention, initializer_range=0.5,
        )  # fmt: skip
        self.bert = transformers.BertForSequenceClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        given = {"inputs_embeds" if x.is_floating_point() else "input_ids": x}
        return self.bert(**given).logits


@dataclass(frozen=True)
class Network:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


NETWORKS: dict[str, Network] = {
    "resnet": Network(ResNet, (1, 10, 10)),
    "vit": Network(ViT, (1, 8, 8)),
    "vit-eager": Network(lambda: ViT(fused=False), (1, 8, 8)),
    "encoder": Network(Encoder, (4, 5)),
    "gated": Network(Gated, (4, 5)),
    "bert": Network(Bert, (5, 8)),
    "bert-eager": Network(lambda: Bert("eager"), (5, 8)),
}


def made(name: str, n: int = 3) -> tuple[Any, Tensor]:
    """The network with biases and statistics that are not zero, in evaluation mode, and a batch."""
    network = NETWORKS[name]
    model = network.make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, std=0.3)
    return model.double().eval(), torch.randn(n, *network.shape)
