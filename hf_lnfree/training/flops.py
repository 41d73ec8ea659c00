r"""FLOPs of training, a token: matrix products only, a multiplication and an addition counted as two.

Narayanan et al. 2021 (arXiv 2104.04473, appendix) and PaLM (arXiv 2204.02311, appendix B) count in this way. Norms,
activations and the softmax are left out: they wait for memory, and are below one in a hundred. Causal attention counts
as all of its $T \times T$ products, as `torch.utils.flop_counter` has it.
"""

from dataclasses import dataclass

from .shape import Shape

# Products of T x T with a head's width: forward q k^T and p v; backward of each two; fused kernels make q k^T again.
FORWARD, BACKWARD, AGAIN = 2, 4, 1


@dataclass(frozen=True)
class Flops:
    """FLOPs a token of a training step: those of the model, and what checkpointing computes a second time."""

    model: float
    recomputed: float

    @property
    def executed(self) -> float:
        return self.model + self.recomputed


def flops_a_token(shape: Shape, length: int, fused: bool, checkpointing: bool) -> Flops:
    r"""
    Forward and backward: three times $2 W$ for all $W$ weights of the matrices, head included, and attention.

    Attention takes $2 T d$ for each product of $T \times T$ a layer ($d$: width of all queries): two forward, and four
    backward, or five where a fused kernel makes the map again. Checkpointing repeats the forward pass of each block up
    to the last matrix, whose output nothing needs again unless dropout follows.

    Args:
        length: tokens a window, T.
        fused: sdpa or flash attention, rather than eager.
        checkpointing: of every block, not reentrant.
    """
    depth, product = len(shape.layers), 2.0 * length * shape.queries
    attention = product * (FORWARD + BACKWARD + (AGAIN if fused else 0))
    model = 6.0 * (depth * shape.matrices + shape.head) + depth * attention
    last = 0 if shape.dropout[2] else shape.width * shape.inner
    again = 2.0 * (shape.matrices - last) + product * FORWARD
    return Flops(model, depth * again if checkpointing else 0.0)
