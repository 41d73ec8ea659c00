"""Where a family keeps what the study changes, said once for each residual branch of its blocks.

A block adds branches to the residual stream x: with norms before them x + attention(norm(x)), then x + mlp(norm(x));
with norms behind them norm(x + attention(x)), then norm(x + mlp(x)). A branch is read as the block computes it: norm,
readers, what stands between them, writer, dropout. Paths are those of a block unless said otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

Projection: TypeAlias = nn.Linear | Conv1D


@dataclass(frozen=True, kw_only=True)
class Branch:
    """
    What attention and MLP have in common.

    Args:
        norm: normalises what the branch reads, or with `post_norm` the sum of stream and branch.
        readers: the projections that read the stream.
        writer: the projection that writes into it.
        dropout: the module between the writer and the stream; None where a block has none, or calls a function.
        post_norm: whether the norm stands behind the sum.
    """

    norm: str
    readers: tuple[str, ...]
    writer: str
    dropout: str | None = None
    post_norm: bool = False

    def projections(self, block: nn.Module) -> dict[str, Projection]:
        """Every matrix of the branch that a block has, by path; what is left of a fused MLP's first does not count."""
        found = {path: block.get_submodule(path) for path in (*self.readers, *self.sources, self.writer)}
        return {path: cast(Projection, m) for path, m in found.items() if not isinstance(m, nn.Identity)}

    @property
    def sources(self) -> tuple[str, ...]:
        """The projections that read something else than the stream."""
        return ()

    def reader_modules(self, block: nn.Module) -> list[Projection]:
        """What reads the stream in a block: the readers, or the writer of a fused MLP."""
        projections = self.projections(block)
        return [projections[path] for path in self.readers if path in projections] or [projections[self.writer]]

    def writer_module(self, block: nn.Module) -> Projection:
        """What writes into the stream in a block."""
        return cast(Projection, block.get_submodule(self.writer))

    def norm_module(self, block: nn.Module) -> nn.Module:
        """What stands where the stock block has the branch's norm."""
        return block.get_submodule(self.norm)


@dataclass(frozen=True, kw_only=True)
class AttentionBranch(Branch):
    """
    Self-attention, or cross-attention.

    Args:
        module: the attention itself, which looks its attention function up.
        fused: None where query, key and value are projections of their own (the readers, in that order); else the order
            of the rows of the one reader, [(q, k, v), head] for "parts" and [head, (q, k, v)] for "heads".
        encoder_readers: of cross-attention, the projections of keys and values, which read the encoder's stream.
        query_key_norms: the norms of queries and keys that the stock attention has, if any.
        heads_field: what the configuration calls the number of heads, of queries.
    """

    module: str
    fused: Literal["parts", "heads"] | None = None
    encoder_readers: tuple[str, ...] = ()
    query_key_norms: tuple[str, ...] = ()
    heads_field: str = "num_attention_heads"

    @property
    def sources(self) -> tuple[str, ...]:
        """Keys and values of cross-attention."""
        return self.encoder_readers

    @property
    def query_key_value_readers(self) -> tuple[str, ...]:
        """The projections of query, key and value where each has its own, whichever stream they read."""
        return (*self.readers, *self.encoder_readers)

    @property
    def query_key_value(self) -> str | None:
        """The fused projection, where there is one."""
        return self.readers[0] if self.fused else None

    def groups(self, heads: int) -> int:
        """How many times (q, k, v) stands in the rows of the fused projection: once, or once a head."""
        return heads if self.fused == "heads" else 1


@dataclass(frozen=True, kw_only=True)
class MLPBranch(Branch):
    r"""
    $W_2 f(W_1 x)$, or gated $W_2 (f(W_1 x) \odot W_3 x)$.

    Args:
        activation: the module f. Of the readers the first one is activated; a second one is multiplied with that.
    """

    activation: str

    @property
    def gated(self) -> bool:
        """Whether a second reader multiplies the first."""
        return len(self.readers) > 1

    def width(self, block: nn.Module) -> int:
        """How many activations the MLP has per token."""
        return matrix_shape(self.writer_module(block))[1]

    def fuse(self, block: nn.Module) -> Projection:
        """Leave an MLP one projection, from the stream into it, in place; returns it, not yet filled."""
        writer = self.writer_module(block)
        width, _ = matrix_shape(writer)
        for path in self.readers:
            block.set_submodule(path, nn.Identity())
        one = type(writer)(width, width)
        if writer.bias is None:
            one.register_parameter("bias", None)
        block.set_submodule(self.writer, one)
        return one


@dataclass(frozen=True, kw_only=True)
class StackSites:
    """
    A stack of equal blocks: a decoder, or an encoder. Paths are those of the base model.

    Args:
        blocks: the ModuleList of blocks.
        attention, cross_attention, mlp: their branches, in the order in which they are computed.
        final_norm: stands after the last block; None where there is none, as in models with norms behind branches.
        embeddings: what the residual stream begins with, embeddings, parameters [..., D] or a projection of patches;
            none where a norm stands between them and the first block.
        embedding_dropout: the module between their sum and the first block; None where there is none.
    """

    blocks: str
    attention: AttentionBranch
    mlp: MLPBranch
    cross_attention: AttentionBranch | None = None
    final_norm: str | None = None
    embeddings: tuple[str, ...] = ()
    embedding_dropout: str | None = None

    @property
    def named_branches(self) -> dict[str, Branch]:
        """By name, in the order in which a block computes them."""
        named = {"attention": self.attention, "cross_attention": self.cross_attention, "mlp": self.mlp}
        return {name: branch for name, branch in named.items() if branch is not None}

    def branches(self, block: nn.Module) -> dict[str, Branch]:
        """Those that a block has: GPT-2 has cross-attention only when it is asked for."""
        modules = dict(block.named_modules())
        return {name: branch for name, branch in self.named_branches.items() if branch.writer in modules}

    def attentions(self, block: nn.Module) -> Iterator[AttentionBranch]:
        """Self-attention, and cross-attention if the block has it."""
        yield from (branch for branch in self.branches(block).values() if isinstance(branch, AttentionBranch))

    def block_list(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of a base model, first to last."""
        blocks = model.get_submodule(self.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return [*blocks]


def matrix_shape(projection: Projection) -> tuple[int, int]:
    """(outputs, inputs) of a Linear or a Conv1D."""
    first, second = projection.weight.shape
    return (second, first) if isinstance(projection, Conv1D) else (first, second)
