"""Which attention and which loss a run takes: chosen once, by what was measured, and written down.

A resumed run takes what it took before, whatever memory is free then: other kernels round differently.
"""

import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_triton_available

from ..data.objectives import CAUSAL, Objective
from ..files import read_json, write_json
from .arguments import LNFreeTrainingArguments, ModelArguments
from .losses import LossForm, use_loss

CHOICES = "choices.json"
# On the CPU in bfloat16, forward and backward of GPT-2's attention: eager takes 0.75 to 0.85 of sdpa's time up to 512
# keys and 1.8 of it at 1024; with attention dropout 0.8 to 0.9 up to 1024. In float32 sdpa is never slower.
EAGER_UP_TO, EAGER_UP_TO_WITH_DROPOUT = 512, 1024
# Plain logits: in the dtype of the matrix product, in float32, and the gradient of both.
BYTES_A_LOGIT, SHARE_OF_FREE_MEMORY = 12, 0.25
# Compiling takes about half a minute on a CPU and saves 3 to 9 ns a logit.
LOGITS_WORTH_COMPILING = 2e10

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choices:
    """What a run is computed with."""

    attn_implementation: str
    loss: LossForm

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Choices":
        return cls(**read_json(path))

    def apply(self, model: PreTrainedModel) -> None:
        logger.info("attention: %s, loss: %s", self.attn_implementation, self.loss)
        if model.config._attn_implementation != self.attn_implementation:
            model.set_attn_implementation(self.attn_implementation)
        use_loss(model, self.loss)


def settled_choices(
    model_args: ModelArguments,
    args: LNFreeTrainingArguments,
    config: PreTrainedConfig,
    objective: Objective,
    length: int,
    steps: int,
    resumes: bool,
) -> Choices:
    """
    What the first process of this machine chooses, and writes to `choices.json`, for all of them.

    Args:
        config: of the model.
        objective: what is predicted: losses other than the plain one are of the next token.
        length: tokens a window.
        steps: of the whole run.
        resumes: whether it goes on from a checkpoint, with what `choices.json` says.
    """
    path = Path(args.output_dir) / CHOICES
    with args.main_process_first(desc="choosing attention and loss"):
        if args.local_process_index == 0:
            recorded = Choices.load(path) if resumes and path.is_file() else None
            choose(model_args, args, config, objective, length, steps, recorded).save(path)
    return Choices.load(path)


def choose(
    model_args: ModelArguments,
    args: LNFreeTrainingArguments,
    config: PreTrainedConfig,
    objective: Objective,
    length: int,
    steps: int,
    recorded: Choices | None,
) -> Choices:
    """Attention and loss: what a flag says, else what was chosen when the run began, else what suits the machine."""
    attention, loss = model_args.attn_implementation, args.loss
    if attention == "auto":
        dtype = training_dtype(args.bf16, args.fp16)
        capped = getattr(config, "attention_softcap", None) is not None  # sdpa has no cap
        fastest = "eager" if capped else choose_attention(args.device, dtype, length, attention_dropout(config))
        attention = recorded.attn_implementation if recorded else fastest
    if loss == "auto" and objective is not CAUSAL:
        loss = "plain"
    if loss == "auto":
        logits = args.train_batch_size * length * config.vocab_size
        loss = recorded.loss if recorded else choose_loss(args.device, logits, steps)
    return Choices(attention, loss)


def choose_attention(device: torch.device, dtype: torch.dtype, length: int, dropout: float) -> str:
    """The faster of eager and sdpa for training at this length."""
    longest = EAGER_UP_TO_WITH_DROPOUT if dropout else EAGER_UP_TO
    return "eager" if device.type == "cpu" and dtype == torch.bfloat16 and length <= longest else "sdpa"


def choose_loss(device: torch.device, logits_a_step: int, steps: int) -> LossForm:
    """`form_of_loss` on this machine."""
    worth_compiling = logits_a_step * steps > LOGITS_WORTH_COMPILING
    return form_of_loss(logits_a_step, free_memory(device), worth_compiling and can_compile(device))


def form_of_loss(logits_a_step: int, free: float, compiled: bool) -> LossForm:
    """Chunked where plain logits would take a quarter of the bytes that are free; compiled where that pays."""
    if logits_a_step * BYTES_A_LOGIT > SHARE_OF_FREE_MEMORY * free:
        return "chunked"
    return "compiled" if compiled else "plain"


def free_memory(device: torch.device) -> int:
    """How many bytes the device, or this machine, has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def can_compile(device: torch.device) -> bool:
    """Whether what torch.compile needs is there: a C++ compiler, or Triton."""
    if device.type == "cpu":
        return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    return is_triton_available()


def training_dtype(bf16: bool, fp16: bool) -> torch.dtype:
    """What matrices are multiplied in."""
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def attention_dropout(config: PreTrainedConfig) -> float:
    """The dropout of attention maps, as a family calls it."""
    return getattr(config, "attn_pdrop", getattr(config, "attention_dropout", 0.0)) or 0.0
