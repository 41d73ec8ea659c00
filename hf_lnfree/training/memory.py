r"""Memory of a training step: what autograd keeps of each block, the loss, and the moments at which memory peaks.

Korthikanti et al. 2022 (arXiv 2205.05198) count activations of a stock GPT in half precision. Here they are those that
the models of this package keep, as `torch.autograd.graph.saved_tensors_hooks` shows them: without a norm the stream is
kept only as the input of a matrix, ReLU keeps nothing but its output, fused attention no map. Mixed precision holds the
stream in the dtype of the weights, products in that of autocast, and a copy of each matrix in that dtype.
"""

from dataclasses import dataclass

from .efficiency import BYTES_A_LOGIT
from .losses import CHUNK_BYTES, LossForm
from .shape import Block, Shape

FLOAT = 4  # bytes of what is computed in float32 whatever the precision: log-probabilities, RMSNorm, statistics


@dataclass(frozen=True)
class Step:
    """
    How a model is trained on one device, as far as memory depends on it.

    Args:
        batch: windows at a time.
        length: tokens a window.
        weight: bytes of a weight, of its gradient, and of a number in the residual stream.
        product: bytes of what matrices are multiplied in; fewer than `weight` under autocast.
        fused: sdpa or flash attention, rather than eager.
        checkpointing: every block keeps its input only.
        mask: bytes of an element of a dropout mask: 1 on accelerators, those of its tensor on a CPU.
        copied: whether autocast copies matrices; FSDP gathers them in that dtype.
    """

    batch: int
    length: int
    weight: int = 4
    product: int = 4
    fused: bool = True
    checkpointing: bool = False
    loss: LossForm = "plain"
    mask: int = 1
    copied: bool = True

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def mixed(self) -> bool:
        return self.product < self.weight


def is_fused(attention: str, shape: Shape, product: int, cpu: bool) -> bool:
    """
    Whether attention keeps no maps. torch has no such kernel for dropout on a CPU, nor on a GPU for float32 with fewer
    heads of keys than of queries.
    """
    return attention != "eager" and not (shape.dropout[1] if cpu else product == FLOAT and shape.keys < shape.queries)


def norm_bytes(norm: str, readers: int, width: int, step: Step) -> tuple[int, int, int]:
    """
    What a branch keeps of the stream before its matrices, a token: the stream itself, what the norm makes of it, and
    what the matrices read.

    LayerNorm keeps its input, a mean and a scale; RMSNorm its input in float32, a scale, and what its gain multiplies.
    The matrices keep what they read: under autocast a copy each. Without norm or autocast that is the stream itself.
    """
    read = step.product * width * (readers if step.mixed else 1)
    if norm == "none":
        return (0, 0, read) if step.mixed else (read, 0, 0)
    if norm == "layernorm":
        return step.weight * width, 2 * FLOAT, read
    return FLOAT * width, FLOAT + step.weight * width, read


def attention_bytes(shape: Shape, step: Step) -> int:
    """
    What attention keeps a token, from its queries to its output matrix.

    Fused: queries, keys, values, outputs and a float32 a head. Of one matrix, turned queries and keys are new tensors,
    laid out so that outputs are copied too, while values stay a view of what the matrix made, which is kept whole.
    Eager: copies of all three, for every head of queries, and the map, which softmax computes in float32 unless GPT-2
    has weights in half precision.
    """
    outputs = step.product * shape.queries
    if step.fused:
        three = shape.queries + 2 * shape.keys
        turned = 2 * shape.queries + shape.keys if shape.rotary and shape.fused else 0
        return step.product * (three + turned) + outputs + FLOAT * shape.heads
    maps = step.product + (FLOAT if step.product != FLOAT and (step.mixed or shape.rotary) else 0)
    if shape.dropout[1]:
        maps += step.mask + step.product
    return step.product * 3 * shape.queries + outputs + maps * shape.heads * step.length


def block_bytes(shape: Shape, block: Block, step: Step) -> int:
    """What autograd keeps of one block, a token."""
    stream, *attention = norm_bytes(block.norm, shape.readers[0], shape.width, step)
    _, *mlp = norm_bytes(block.norm, shape.readers[1], shape.width, step)
    before = stream * (1 if shape.parallel else 2) + sum(attention) + sum(mlp)
    inner = (3 if shape.gated else 1) + block.keeps_input
    dropped = 2 * step.mask * shape.width if shape.dropout[2] else 0
    return before + attention_bytes(shape, step) + step.product * inner * shape.inner + dropped


def outer_bytes(shape: Shape, step: Step) -> int:
    """
    What is kept outside the blocks, a token: a mask of the embeddings, the final norm, and what the head reads; the
    chunked loss has no need of that.
    """
    stream, made, read = norm_bytes(shape.final_norm, 1, shape.width, step)
    dropped = step.mask * shape.width if shape.dropout[0] else 0
    return dropped + stream + made + (read if step.loss != "chunked" else 0)


def saved_bytes(shape: Shape, step: Step) -> int:
    """All activations of a step: of every block, or with checkpointing its input; loss and logits not included."""
    if step.checkpointing:
        blocks = len(shape.layers) * step.weight * shape.width
    else:
        blocks = sum(block_bytes(shape, block, step) for block in shape.layers)
    return step.tokens * (blocks + outer_bytes(shape, step))


def loss_bytes(shape: Shape, step: Step) -> tuple[int, int]:
    """
    What the loss takes at the end of the forward pass, and when its own backward pass ends.

    Plain: logits and log-probabilities; then these, their gradient and that of the logits, in float32. Compiled:
    counted as plain, though it needs less. Chunked: up to three chunks (logits, the exponentials of their sum, the
    gradient of the chunk before), or one and what it adds to the gradient of the head; and the gradients of the head
    and of what it reads, which the backward pass scales into new ones.
    """
    logits, head = step.tokens * shape.vocabulary, shape.head
    product, half = step.product, step.product != FLOAT
    if step.loss != "chunked":
        return logits * (product + FLOAT + (FLOAT if half else 0)), logits * BYTES_A_LOGIT
    chunk = min(max(CHUNK_BYTES, FLOAT * shape.vocabulary), FLOAT * logits)
    chunks = max(chunk * (3 if chunk < FLOAT * logits else 2), chunk * (1.5 if half else 1) + product * head)
    read = step.tokens * product * shape.width
    copy = product * head if step.mixed else 0
    return int(chunks) + 2 * read + FLOAT * head + copy, 2 * read + (FLOAT + step.weight) * head


def work_bytes(shape: Shape, block: Block, step: Step) -> int:
    """
    What the backward pass of a block makes at its widest: gradients of the stream, of one matrix, and of the
    activations or of the maps of eager attention. Where activation and matrix keep two tensors, one is gone by then.
    """
    inner = step.product * shape.inner * (2 if shape.gated or not block.keeps_input else 1)
    maps = 0 if step.fused else 2 * FLOAT * shape.heads * step.length
    stream = shape.width * (step.weight + (step.product if step.mixed else 0))
    return step.tokens * (stream + max(inner, maps)) + step.product * shape.width * shape.inner


def peak_bytes(shape: Shape, step: Step, gradients: int, carried: bool, optimiser: int = 0) -> int:
    """
    The most that a step holds beyond weights and moments: the largest of six points in time.

    The end of the forward pass and the start of the backward pass (the loss); the backward passes of the last and of
    the first block, between which activations go as gradients come; the gradient of the embeddings; the optimiser.

    Args:
        gradients: bytes of those of all weights.
        carried: whether they lie there from the batch before, as with gradient accumulation.
        optimiser: bytes that its step takes for a moment.
    """
    depth, saved = len(shape.layers), saved_bytes(shape, step)
    work = [work_bytes(shape, block, step) for block in shape.layers]
    whole = [step.tokens * block_bytes(shape, block, step) + w for block, w in zip(shape.layers, work, strict=True)]
    copied = step.mixed and step.copied
    copies = step.product * shape.matrices if copied else 0
    head_copy = step.product * shape.head if copied and step.loss != "chunked" else 0
    forward, backward = loss_bytes(shape, step)
    held, head = gradients if carried else 0, step.weight * shape.head
    # When the forward pass is over, the graph holds the copies of all blocks, or of the one that is computed again.
    left = copies if step.checkpointing else depth * copies
    inside = saved - step.tokens * outer_bytes(shape, step)
    last = max(whole) if step.checkpointing else work[-1]
    first = max(whole) + (step.tokens * step.weight * shape.width if step.checkpointing else 0)
    return max(
        held + saved + depth * copies + head_copy + forward,
        held + saved + left + head_copy + backward,
        max(held, head) + inside + left + last,
        gradients + first + copies - (0 if shape.tied else head),
        gradients + head,
        gradients + optimiser,
    )
