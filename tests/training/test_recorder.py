"""A sample of the flight recorder, against what eager attention of the same weights computes in float64."""

from statistics import fmean

import pytest
import torch
from transformers import TrainerState

from hf_lnfree.analysis.mlp_capture import record_mlp
from hf_lnfree.training.recorder import FlightRecorder, warn_of_growth
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


def test_a_sample_has_the_geometry_of_every_mlp_if_it_is_asked_for(family, input_ids):
    """By layer, from the rows of the MLPs: firing by sign, and shares of variance between next tokens."""
    model = family.model(norm="none", initializer_range=0.5)
    rows = {}
    with torch.no_grad(), record_mlp(model, lambda found: rows.update({found.name: found})):
        model(input_ids)
    plain, probing = (
        FlightRecorder([input_ids], model=lambda: model, step=StepRecord(), log=print, every=1, geometry=it, kept=1)
        for it in (False, True)
    )
    sample, without = probing.sample([input_ids]), plain.sample([input_ids])
    assert without == {key: sample[key] for key in without}
    assert "specialisation/layer_00" not in without
    for layer, found in enumerate(rows.values()):
        pre, post = found.pre.double(), found.post.double()
        fires = (pre > 0).double()
        assert sample[f"frequency/layer_{layer:02d}"] == pytest.approx(fires.mean().item())
        last = input_ids.shape[1] - 1
        labelled = [i for i, token in enumerate(found.token.tolist()) if token % input_ids.shape[1] < last]
        classes = input_ids[:, 1:].flatten()
        y, total = post[labelled], 0.0
        for token in classes.unique():
            chosen = y[classes == token]
            total = total + len(chosen) * (chosen.mean(0) - y.mean(0)).square()
        share = total / (y - y.mean(0)).square().sum(0)
        assert sample[f"between_share/next_token/layer_{layer:02d}"] == pytest.approx(share.nan_to_num().mean().item())


@pytest.mark.parametrize(
    ("fields", "larger", "warned"),
    [
        ({"norm": "none", "residual_init": "plain"}, 1, True),
        ({"norm": "none", "residual_init": "scaled"}, 1, False),
        ({"norm": "none", "residual_init": "scaled"}, 1e6, False),  # it has been asked for already
        ({"norm": "none", "residual_init": "plain", "initializer_range": 0.02}, 1, False),
        ({"norm": GPT2.norm, "residual_init": "plain"}, 1e6, False),  # which norms undo
    ],
)
def test_a_stream_that_grows_before_the_first_step_is_named(input_ids, caplog, fields, larger, warned):
    """As in GPT-2 XL without LayerNorm: of nothing but depth, width and the scale of the weights."""
    model = GPT2.model(n_layer=6, **{"initializer_range": 0.35, **fields})
    model.transformer.h[4].mlp.c_proj.weight.data *= larger
    recorder = FlightRecorder([input_ids], model=lambda: model, step=StepRecord(), log=lambda *_: None, every=1, kept=1)
    with caplog.at_level("WARNING", "hf_lnfree"):
        recorder.on_train_begin(None, TrainerState(), None)
    assert ("residual_init: scaled" in caplog.text) == warned


def test_a_stream_of_zeros_does_not_grow(caplog):
    sample = {"step": 0, "residual_rms/layer_00": 0.0, "residual_rms/layer_01": 0.0}
    warn_of_growth(GPT2.config(norm="none", residual_init="plain"), sample)
    assert not caplog.text


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
