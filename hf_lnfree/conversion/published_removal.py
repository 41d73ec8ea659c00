r"""Training checkpoints of the code that LayerNorms were removed from GPT-2 with (arXiv 2507.02559).

Beside weight and bias each norm there has buffers: whether its deviation is fixed (`is_fake`, for values
`attn_v_is_fake`; earlier `mode_buffer`, `attn_v_mode_buffer`), and the deviations $\sigma$ of the positions, at first
with one of its own for the first position (`average_std_buffer`) and for tokens that end a text (`bos_std_buffer`).
Once all are fixed and equal, the norm is $g \odot (x - \bar x) / \sigma + b$.
"""

from collections.abc import Iterator

from torch import Tensor

from ..errors import ModelError
from ..loading import FIXED_DEVIATION
from .checkpoint import Checkpoint

FIXED = ("is_fake", "attn_v_is_fake", "mode_buffer", "attn_v_mode_buffer")
BY_TOKEN = "bos_std_buffer"
COUNTERS = ("bos_special_treatment", "real_average_std", "real_bos_std", "grad_acc_steps", "global_step", "momentum")
SHOWN = 4  # reasons in an error


def fixed_deviations(checkpoint: Checkpoint) -> dict[str, Tensor]:
    r"""
    Name of a norm in the files -> its $\sigma$ []; {} for any other checkpoint.

    Raises:
        ModelError: the removal is not finished; the message says of which norms.
    """
    norms = [name.removesuffix(FIXED_DEVIATION) for name in checkpoint.shapes if name.endswith(FIXED_DEVIATION)]
    found = {norm: checkpoint.tensor(norm + FIXED_DEVIATION) for norm in norms}
    if reasons := [reason for norm in norms for reason in unfinished(checkpoint, norm, found[norm])]:
        listed = "".join(f"\n- {reason}" for reason in reasons[:SHOWN])
        more = f"\n- and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
        raise ModelError(
            f"{checkpoint.source} is a checkpoint from the middle of a removal of LayerNorms, by the code of arXiv "
            f"2507.02559:{listed}{more}\nFinish its schedule there (`train.py --mode without_ln`, which resumes), or "
            "convert the model that its `ln_removal_and_push.py` makes of it."
        )
    return {norm: deviations[0].clone() for norm, deviations in found.items()}


def unfinished(checkpoint: Checkpoint, norm: str, deviations: Tensor) -> Iterator[str]:
    """Every reason why a norm is not yet one linear map."""
    name = norm.rstrip(".")
    # Only the norm before attention is read by values; of the others nothing reads their flag.
    flags = [flag for flag in FIXED if name.endswith(("ln_1", "input_layernorm")) or not flag.startswith("attn_v")]
    for flag in flags:
        if norm + flag in checkpoint.shapes and not checkpoint.tensor(norm + flag):
            yield f"{name} still normalises ({flag} is false)"
    if not (deviations == deviations[0]).all():
        yield f"{name} divides the first position by a number of its own"
    if not deviations[0] > 0:
        yield f"{name} divides by {deviations[0].item():g}"
    by_token = norm + BY_TOKEN
    if by_token in checkpoint.shapes and not (checkpoint.tensor(by_token) == deviations[0]).all():
        yield f"{name} divides tokens that end a text by a number of their own"


def is_state(stored: str, norms: dict[str, Tensor]) -> bool:
    """Whether a stored tensor is a buffer of one of these norms."""
    norm, dot, own = stored.rpartition(".")
    return norm + dot in norms and own in (*FIXED, *COUNTERS, BY_TOKEN, FIXED_DEVIATION)
