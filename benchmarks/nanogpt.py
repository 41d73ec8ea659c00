"""A GPT-2 without LayerNorm in its blocks, with ReLU, as short as it can be written: a peer for the speed of ours."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # B T D
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.attention(x).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # B H T d
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(x)))


class Body(nn.Module):
    def __init__(self, positions: int, width: int, heads: int, layers: int):
        super().__init__()
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs_embeds: Tensor, use_cache: bool = False) -> tuple[Tensor]:
        x = inputs_embeds + self.positions(torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device))
        for block in self.blocks:
            x = block(x)
        return (self.norm(x),)


class NanoGPT(nn.Module):
    def __init__(self, vocabulary: int, positions: int, width: int, heads: int, layers: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.body = Body(positions, width, heads, layers)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor]:
        (hidden,) = self.body(self.tokens(input_ids))
        logits = F.linear(hidden, self.tokens.weight)  # B T V
        return (F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()),)
