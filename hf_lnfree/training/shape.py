"""The sizes of a decoder that its cost depends on, from a configuration; what has no formula is refused by name."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from ..errors import SettingsError

# Norm of the stock family, matrices that read the stream in attention and in the MLP, and whether that is gated.
FAMILIES: dict[str, tuple[str, int, int, bool]] = {
    "gpt2": ("layernorm", 1, 1, False),
    "gpt_neox": ("layernorm", 1, 1, False),
    "llama": ("rmsnorm", 3, 2, True),
}
NORMS = ("none", "layernorm", "rmsnorm")
# Activation -> whether its backward pass needs its input: that of ReLU reads the output, which the next matrix keeps.
ACTIVATIONS = {
    **dict.fromkeys(("relu", "identity"), False),
    **dict.fromkeys(("gelu", "gelu_pytorch_tanh", "silu", "leaky_relu", "learnable_leaky_relu"), True),
}
# Field -> the value without which there are steps that no formula here counts.
PLAIN = {
    "weight_norm": "none",
    "residual_gain": "none",
    "ffn_scale": False,
    "query_key_norm": False,
    "attention_temperature": False,
    "attention_softcap": None,
    "embedding_scale": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


@dataclass(frozen=True)
class Block:
    """One block: the norm before each branch, and whether its activation keeps its input."""

    norm: str
    keeps_input: bool


@dataclass(frozen=True)
class Shape:
    """
    A decoder.

    Args:
        width: of the residual stream.
        queries: width of all queries together, and of the heads' outputs.
        keys: width of all keys together, and of all values.
        inner: width of an MLP.
        gated: whether a second matrix multiplies the activations.
        readers: matrices that read the stream, in attention and in the MLP; mixed precision copies it for each.
        fused: whether queries, keys and values are one matrix's.
        rotary: whether queries and keys are turned, which makes new ones.
        parallel: whether attention and MLP read the same stream.
        tied: whether the head is the embedding.
        dropout: shares that are dropped: of embeddings, attention maps, and what a branch adds.
    """

    layers: tuple[Block, ...]
    width: int
    heads: int
    queries: int
    keys: int
    inner: int
    vocabulary: int
    gated: bool
    readers: tuple[int, int]
    fused: bool
    rotary: bool
    parallel: bool
    tied: bool
    final_norm: str
    dropout: tuple[float, float, float]

    @property
    def matrices(self) -> int:
        """Weights of the matrices of one block."""
        attention = self.width * (2 * self.queries + 2 * self.keys)
        return attention + (3 if self.gated else 2) * self.width * self.inner

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.width * self.vocabulary


def shape_of(config: PreTrainedConfig) -> Shape:
    """
    Raises:
        SettingsError: a family, norm, activation or field that has no formula.
    """
    family = config.model_type.removeprefix("lnfree_")
    if family not in FAMILIES:
        raise SettingsError(
            f"There is no estimate for the family {family!r}; there is one for {', '.join(map(repr, FAMILIES))}."
        )
    for name, plain in PLAIN.items():
        if (value := getattr(config, name, plain)) != plain:
            raise SettingsError(f"There is no estimate for a model with {name}={value!r}, only with {plain!r}.")
    stock, in_attention, in_mlp, gated = FAMILIES[family]
    act: Any = getattr(config, "activation_function", None) or config.hidden_act  # type: ignore[attr-defined]
    depth, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    norms = getattr(config, "block_norms", [stock] * depth)
    activations = getattr(config, "block_activations", [act] * depth)
    final = getattr(config, "final_norm", stock)
    require(NORMS, "norm", [*norms, final])
    require(ACTIVATIONS, "activation", activations)
    head = getattr(config, "head_dim", None) or width // heads
    dropped = [
        max((getattr(config, name, 0.0) or 0.0) for name in names)
        for names in (("embd_pdrop", "hidden_dropout"), ("attn_pdrop", "attention_dropout"), ("resid_pdrop",))
    ]
    if family == "gpt_neox":
        dropped[2] = dropped[0]
    return Shape(
        layers=tuple(Block(n, ACTIVATIONS[a]) for n, a in zip(norms, activations, strict=True)),
        width=width,
        heads=heads,
        queries=heads * head,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * head,
        inner=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width,
        vocabulary=config.vocab_size,
        gated=gated,
        readers=(in_attention, in_mlp),
        fused=not gated,
        rotary=family != "gpt2",
        parallel=bool(getattr(config, "use_parallel_residual", False)),
        tied=bool(config.tie_word_embeddings),
        final_norm=final,
        dropout=(dropped[0], dropped[1], dropped[2]),
    )


def require(known: Any, what: str, given: list[str]) -> None:
    """Raise SettingsError for the first that is not known."""
    for name in given:
        if name not in known:
            raise SettingsError(
                f"There is no estimate for the {what} {name!r}; there is one for {', '.join(map(repr, known))}."
            )
