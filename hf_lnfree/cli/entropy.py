"""`hf-lnfree entropy`: load a model and its tokenizer, cut text into windows, run the analyzer."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ..analysis import AttentionEntropyAnalyzer, EntropyReport
from ..analysis.plots import save_heatmap
from ..training.data import DataArguments, load_validation
from ..training.run import window_batches


def entropy_command(
    model_name: str,
    data: str,
    context_length: int,
    windows: int,
    batch_size: int,
    output: Path | None,
    device: str,
    trust_remote_code: bool,
) -> EntropyReport:
    """The report of a model on held-out windows; entropy.json and entropy.svg are written into `output`, if given."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = device or (accelerator.type if accelerator else "cpu")
    model = AutoModelForCausalLM.from_pretrained(model_name, trust_remote_code=trust_remote_code, device_map=device)
    positions = getattr(model.config, "max_position_embeddings", context_length)
    if context_length > positions:
        raise ValueError(f"--context-length {context_length} exceeds the model's {positions} positions.")
    held_out = load_validation(DataArguments(dataset=data, tokenizer=model_name, context_length=context_length))
    batches = window_batches(held_out, windows, batch_size)
    report = AttentionEntropyAnalyzer(model).run(batches, name=model_name, progress=True)
    report.metadata |= {"data": data, "data_sha256": held_out.sha256}
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        report.save(output / "entropy.json")
        save_heatmap(report, output / "entropy.svg")
    return report
