"""One conversion from a source to a folder: what `hf-lnfree convert` does, with a report and a comparison of logits."""

import copy
import os
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from ..choices import Target
from ..errors import ModelError
from ..files import atomic_folder, write_json
from ..loading import find_device, load_model
from ..provenance import command, environment
from .checkpoint import Checkpoint
from .families import placed
from .folding import Folding, fold
from .onnx import export_onnx
from .ours_to_stock import to_stock
from .planning import plan
from .stock_to_ours import convert_checkpoint, copy_beside, is_ours, load

REPORT = "conversion.json"
CHECKED_TOKENS = (2, 16)


def convert(
    source: str,
    out: Path,
    to: Target = "lnfree",
    dtype: torch.dtype | None = None,
    with_cache: bool = False,
    check: bool = True,
    progress: bool = False,
    revision: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """
    Convert a checkpoint, of transformers or of this package, into a folder that appears whole or not at all.

    Args:
        to: "lnfree" (a stock model as one of ours; with LayerNorms that its epsilon disables, one without any),
            "folded" (its norms folded as far as is exact), "fused" (that, and each MLP whose activation is the
            identity as one matrix), "stock" (what anyone loads without this package), "onnx".
        dtype: of the new weights; as they are by default. Not with a stock model that is copied shard by shard.
        with_cache: whether an ONNX graph takes keys and values of earlier tokens.
        check: compare logits before and after on random tokens; holds both models in memory.
        revision: of a Hub repository.
        device: where logits are compared, but for those of ONNX.
        trust_remote_code: compare with the code that comes with a stock checkpoint, and not with transformers' own.

    Returns:
        The report that is also written into the folder as conversion.json.

    Raises:
        ModelError: the source cannot be read or converted to that, or `out` is there already.
        SettingsError: a device that is not there.
    """
    if to not in get_args(Target):
        raise ModelError(f"--to {to!r} is not known. Allowed: {', '.join(get_args(Target))}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} is there already. Give another folder, or remove it.")
    place = find_device(device)
    checkpoint = Checkpoint(source, revision)
    report: dict[str, Any] = {"source": str(source), "revision": revision, "to": to, "notes": []}
    if to == "lnfree" and is_ours(checkpoint):
        raise ModelError(f"{source} is a model of this package already. Choose --to folded, fused, stock or onnx.")
    if out.exists():
        out.rmdir()  # empty; it comes back by renaming
    planned = plan(checkpoint) if to == "lnfree" else None
    if planned is not None and not planned.disabled:
        if dtype is not None:
            raise ModelError("A stock checkpoint is copied as it is, shard by shard; --dtype is for the other targets.")
        result = convert_checkpoint(checkpoint, out, progress, planned)
        report |= {"notes": result.notes, "dtype": str(result.config.dtype)}
        if check and result.model_class.__name__.endswith("ForCausalLM"):
            before = reference(checkpoint, result.config, trust_remote_code)
            report |= difference(before, result.model_class.from_pretrained(out), place)
    else:
        model, notes = load(checkpoint)
        with atomic_folder(out) as folder:
            report |= write(model, folder, to, dtype, with_cache, check, place)
            report["notes"] = notes + report.pop("folding_notes", [])
            copy_beside(checkpoint.folder, folder)
            write_report(folder, report)
        return report
    write_report(out, report)
    return report


def reference(checkpoint: Checkpoint, config: Any, trust_remote_code: bool) -> PreTrainedModel:
    """The model that a stock checkpoint was; where norms are absent no stock class can hold it, and ours is loaded."""
    if set(config.block_norms) | {config.final_norm} == {"layernorm"}:
        return load_model(checkpoint.folder, trust_remote_code=trust_remote_code).eval()
    return load(checkpoint)[0]


def write(
    model: PreTrainedModel,
    folder: Path,
    to: Target,
    dtype: torch.dtype | None,
    with_cache: bool,
    check: bool,
    device: torch.device,
) -> dict[str, Any]:
    """Convert a loaded model and save it; returns what is to be reported."""
    report: dict[str, Any] = {}
    if to == "onnx":
        model = model if dtype is None else placed(model, dtype)
        counts = export_onnx(model, folder / "model.onnx", with_cache)
        report |= {"nonlinear_operators": dict(counts), "with_cache": with_cache}
        if check:
            report |= onnx_difference(model, folder / "model.onnx", with_cache)
        model.config.save_pretrained(folder)
        return report
    if to == "stock":
        new = to_stock(model, dtype)
    else:
        new, folding = fold(model, fuse_identity=to == "fused")
        report |= folding_report(folding)
        new = new if dtype is None else placed(new, dtype)
    new.save_pretrained(folder)
    report |= {"parameters": new.num_parameters(), "dtype": str(new.dtype).removeprefix("torch.")}
    return report | (difference(model, new, device) if check and model.can_generate() else {})


def folding_report(folding: Folding) -> dict[str, Any]:
    """What the report says of a folding."""
    became = Counter(f"{before} -> {after}" for before, after in folding.norms.values())
    return {
        "norms": dict(became),
        "divisions_left": folding.divisions,
        "untied": folding.untied,
        "folding_notes": folding.notes,
    }


def random_tokens(config: Any) -> torch.Tensor:
    """A small batch of random tokens [B, T], the same at every call."""
    generator = torch.Generator().manual_seed(0)
    length = min(CHECKED_TOKENS[1], config.max_position_embeddings)
    return torch.randint(config.vocab_size, (CHECKED_TOKENS[0], length), generator=generator)


@torch.no_grad()
def difference(before: PreTrainedModel, after: PreTrainedModel, device: torch.device) -> dict[str, float]:
    """The largest difference of logits on random tokens, and the size of the logits."""
    ids = random_tokens(before.config).to(device)
    wanted, found = (model.eval().to(device)(ids).logits.double() for model in (before, after))
    return {"largest_difference": (wanted - found).abs().max().item(), "largest_logit": wanted.abs().max().item()}


def onnx_difference(model: PreTrainedModel, path: Path, with_cache: bool) -> dict[str, float]:
    """As `difference`, run by onnxruntime where that is there."""
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        return {}
    model, ids = copy.deepcopy(model).float().eval(), random_tokens(model.config)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    feed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    session = InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    if with_cache:
        heads = model.config.num_attention_heads
        empty = torch.zeros(len(ids), heads, 0, model.config.hidden_size // heads)
        feed |= {given.name: empty for given in session.get_inputs() if given.name.startswith("past")}
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in feed.items()})
    with torch.no_grad():
        wanted = model(ids).logits
    largest = (wanted - torch.from_numpy(logits)).abs().max().item()
    return {"largest_difference": largest, "largest_logit": wanted.abs().max().item()}


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """The report, with versions and the command, into the folder of the conversion."""
    full = report | {"environment": environment(), "command": command()}
    write_json(folder / REPORT, full)
