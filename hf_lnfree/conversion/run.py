"""One conversion from a source to a folder: what `hf-lnfree convert` does, with a report and a comparison of logits."""

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from ..choices import Encoding, Target
from ..errors import ModelError
from ..files import atomic_folder, write_json
from ..loading import find_device, load_model
from ..provenance import command, environment
from .beside import copy_beside, require_tokenizer_fits
from .checking import difference, failure, onnx_difference
from .checkpoint import Checkpoint
from .families import family_of, placed
from .folding import Folding, fold
from .onnx import export_onnx
from .ours_to_stock import reading_recipe, to_stock
from .planning import Plan, plan
from .stock_to_ours import is_ours, load, write_checkpoint

REPORT = "conversion.json"


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
    encoding: Encoding | None = None,
) -> dict[str, Any]:
    """
    Convert a checkpoint, of transformers or of this package, into a folder that appears whole or not at all.

    Args:
        to: "lnfree" (a stock model as one of ours; with LayerNorms that its epsilon disables, one without any),
            "folded" (its norms folded as far as is exact), "fused" (that, and each MLP whose activation is the
            identity as one matrix), "stock" (what anyone loads without this package), "onnx".
        dtype: of the new weights; as they are by default. Not with a stock model that is copied shard by shard.
        with_cache: whether an ONNX graph takes keys and values of earlier tokens.
        check: compare logits before and after on random tokens; holds both models in memory. What differs by more
            than rounding is set aside in `out`.unchecked.
        revision: of a Hub repository.
        device: where logits are compared, but for those of ONNX.
        trust_remote_code: compare with the code that comes with a stock checkpoint, and not with transformers' own.
        encoding: of LayerNorms that do nothing in a stock model, see `to_stock`.

    Returns:
        The report that is also written into the folder as conversion.json.

    Raises:
        ModelError: the source cannot be read or converted to that, the result fails its check, or `out` is there
            already, or by now.
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
    planned = plan(checkpoint) if to == "lnfree" else None
    said = require_tokenizer_fits(checkpoint.folder, checkpoint.config.get("vocab_size"))
    copied = planned is not None and not planned.disabled
    if copied and dtype is not None:
        raise ModelError("A stock checkpoint is copied as it is, shard by shard; --dtype is for the other targets.")
    if out.exists():
        out.rmdir()  # empty; it comes back by renaming
    with atomic_folder(out, or_theirs=False) as folder:
        if planned is not None and copied:
            write_checkpoint(checkpoint, planned, folder, progress)
            report |= {"notes": said + planned.notes, "dtype": str(planned.config.dtype)}
            if check:
                before = reference(checkpoint, planned, trust_remote_code)
                report |= difference(before, planned.model_class.from_pretrained(folder), place)
        else:
            model, notes = load(checkpoint)
            report |= write(model, folder, to, dtype, with_cache, check, place, encoding)
            report["notes"] = said + notes + report.pop("folding_notes", [])
            copy_beside(checkpoint.folder, folder)
        write_report(folder, report)
        if (why := failure(report)) is not None:
            raise ModelError(f"{source} was converted, but {why}. See {set_aside(folder, out)}; {out} is not written.")
    return report


def set_aside(folder: Path, out: Path) -> Path:
    """Keep the folder of a conversion that failed its check, beside the place where it would have been."""
    aside = out.with_name(f"{out.name}.unchecked")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    return aside


def reference(checkpoint: Checkpoint, planned: Plan, trust_remote_code: bool) -> PreTrainedModel:
    """The model that a stock checkpoint was; where norms are absent no stock class can hold it, and ours is loaded."""
    if planned.absent:
        return load(checkpoint)[0]
    auto_class = family_of(planned.config.model_type).auto_class(planned.model_class)
    changed = bool(planned.left_out)
    return load_model(checkpoint.folder, auto_class, trust_remote_code=trust_remote_code, changed=changed).eval()


def write(
    model: PreTrainedModel,
    folder: Path,
    to: Target,
    dtype: torch.dtype | None,
    with_cache: bool,
    check: bool,
    device: torch.device,
    encoding: Encoding | None = None,
) -> dict[str, Any]:
    """Convert a loaded model and save it; returns what is to be reported."""
    report: dict[str, Any] = {}
    if to == "onnx":
        model = model if dtype is None else placed(model, dtype)
        counts = export_onnx(model, folder / "model.onnx", with_cache)
        report |= {"nonlinear_operators": dict(counts), "with_cache": with_cache}
        if check:
            try:
                report |= onnx_difference(model, folder / "model.onnx", with_cache)
            except Exception as error:  # onnxruntime has errors of its own; the graph is worth keeping
                report["folding_notes"] = [f"onnxruntime could not run the graph: {error}"]
        model.config.save_pretrained(folder)
        return report
    if to == "stock":
        new = to_stock(model, dtype, encoding)
        report["folding_notes"] = list(filter(None, [reading_recipe(new)]))
    else:
        new, folding = fold(model, fuse_identity=to == "fused")
        report |= folding_report(folding)
        new = new if dtype is None else placed(new, dtype)
    new.save_pretrained(folder)
    report |= {"parameters": new.num_parameters(), "dtype": str(new.dtype).removeprefix("torch.")}
    return report | (difference(model, new, device) if check else {})


def folding_report(folding: Folding) -> dict[str, Any]:
    """What the report says of a folding."""
    became = Counter(f"{before} -> {after}" for before, after in folding.norms.values())
    return {
        "norms": dict(became),
        "divisions_left": folding.divisions,
        "untied": folding.untied,
        "folding_notes": folding.notes,
    }


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """The report, with versions and the command, into the folder of the conversion."""
    full = report | {"environment": environment(torch.device("cpu")), "command": command()}
    write_json(folder / REPORT, full)
