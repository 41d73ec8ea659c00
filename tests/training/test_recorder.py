"""A sample of the flight recorder, against what eager attention of the same weights computes in float64."""

from statistics import fmean

import pytest
import torch

from hf_lnfree.training.recorder import FlightRecorder
from hf_lnfree.training.steps import StepRecord

from ..attention.softmaxes import Softmaxes
from ..conftest import GPT2


def test_a_sample_is_what_the_model_computes(family, input_ids):
    """Logits, entropies, and the shares of heads against the bound of the data, not the largest that was observed."""
    model = family.model(norm="none", initializer_range=0.5)
    sizes = {i: [] for i in range(3)}
    handles = [
        block.register_forward_hook(lambda m, x, y, i=i: sizes[i].append(y[0] if isinstance(y, tuple) else y))
        for i, block in enumerate(family.block_list(model))
    ]
    model.set_attn_implementation("eager")
    with torch.no_grad(), Softmaxes() as eager:
        model(input_ids)
    for handle in handles:
        handle.remove()
    model.set_attn_implementation("sdpa")
    recorder = FlightRecorder([input_ids], model=lambda: model, step=StepRecord(), log=print, every=1, kept=1)
    sample, by_head = recorder.look([input_ids])
    heads = [entropy.mean((0, 2)) for entropy in eager.entropies()]
    for i in range(3):
        assert sample[f"attention_logit/layer_{i:02d}"] == pytest.approx(eager.logits[i].max().item(), rel=1e-5)
        assert sample[f"residual_rms/layer_{i:02d}"] == pytest.approx(
            sizes[i][0].square().mean().sqrt().item(), rel=1e-5
        )
        assert sample[f"entropy/layer_{i:02d}"] == pytest.approx(heads[i].mean().item(), abs=1e-5)
        assert by_head[i].tolist() == pytest.approx(heads[i].tolist(), abs=1e-5)
    share = torch.cat(heads) / torch.arange(1, 13).log().mean()
    largest = torch.cat(heads) / torch.cat(heads).max()
    assert sample["entropy/overloaded"] == (share > 0.75).double().mean().item()
    assert sample["entropy/collapsed"] == (share <= 0.25).double().mean().item()
    assert (share > 0.75).sum() != (largest > 0.75).sum()


def test_heads_go_to_the_log_of_the_run_and_to_no_tracker(input_ids):
    taken = []

    def log(sample, besides):
        taken.append((sample, besides))

    recorder = FlightRecorder([input_ids], model=GPT2.model, step=StepRecord(), log=log, every=1, kept=1)
    recorder.log_sample(7)
    ((sample, besides),) = taken
    assert all(isinstance(value, (int, float)) for value in sample.values())
    assert besides == {"head_entropies": recorder.samples[0]["head_entropies"]}
    for i, heads in enumerate(besides["head_entropies"]):
        assert fmean(heads) == pytest.approx(sample[f"entropy/layer_{i:02d}"], abs=1e-4)
