"""Entropy regularisation: the penalty and its gradient against maps in float64, and runs that are gone on with."""

import json
import math

import pytest
import torch
from transformers import AttentionInterface

from hf_lnfree.attention import attention_calls
from hf_lnfree.cli.main import main
from hf_lnfree.training.entropy_regularization import EntropyRegularization
from tests.attention import models
from tests.attention.softmaxes import Softmaxes

TINY = "{n_layer: 2, n_embd: 32, n_head: 2, n_positions: 32}"


def regularised(family, **options):
    model = family.model(norm="none", activation="gelu").double().train()
    regularization = EntropyRegularization(0.3, tolerance=0.05, **options)
    return regularization.adapt(model).double(), regularization


def penalty_of(model, regularization, input_ids, **inputs):
    with attention_calls(regularization.after):
        model(input_ids, **inputs)
    return regularization.penalty()


def by_hand(model, ids, form):
    """From whole maps and autograd; eager attention has its own in float32."""
    entropies, terms, length = [], [], ids.shape[1]
    future = torch.ones(length, length).triu(1).bool()

    def keep(call):
        logs = (call.query @ call.key.mT * call.scaling).masked_fill(future, -1e30).log_softmax(-1)
        entropies.append(-(logs.exp() * logs.masked_fill(future, 0.0)).sum(-1))  # B H T

    with attention_calls(keep):
        model(ids)
    bound = math.lgamma(length + 1) / length
    for entropy, share in zip(entropies, model.entropy_targets.shares, strict=True):
        if form == "heads":
            d = entropy.mean((0, 2)) / bound - share
            terms.append(torch.where(d.abs() > 0.05, d**2, 0.0).mean())
        else:
            d = entropy - share[:, None] * math.log(length)
            terms.append(torch.where(d.abs() > 0.05 * math.log(length), d**2, 0.0).sum() / len(share))
    return 0.3 * torch.stack(terms).mean()


@pytest.mark.parametrize("form", ["heads", "rows"])
def test_penalty_and_gradient_are_those_of_the_maps(family, form, input_ids):
    model, regularization = regularised(family, form=form, target=0.6)
    value = penalty_of(model, regularization, input_ids)
    value.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = by_hand(model, input_ids, form)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert value.item() > 0
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name in ours if "entropy_targets" in name}
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours.get(name, torch.zeros_like(gradient)), gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("build", [models.afmoe, models.doge])
def test_masks_handed_over_by_name(build):
    """A penalty under masks with windows, padding and learned biases; its gradient, where the mask has none."""
    model, inputs = models.doubled(*models.build(build, "eager"))
    regularization = EntropyRegularization(0.3, tolerance=0.05, target=0.6)
    regularization.adapt(model.train()).double()
    value = penalty_of(model, regularization, **inputs)
    value.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with Softmaxes() as eager:
        model(**inputs)
    terms = []
    for logits, entropy, share in zip(eager.logits, eager.entropies(), model.entropy_targets.shares, strict=True):
        visible = (logits > -1e30).sum(-1).expand(entropy.shape)
        bound = visible.double().log().mean()
        d = entropy.mean((0, 2)) / bound - share
        terms.append(torch.where(d.abs() > 0.05, d**2, 0.0).mean())
    expected = 0.3 * torch.stack(terms).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    assert value.item() > 0
    if build is models.afmoe:
        expected.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-7, atol=1e-12, msg=name)


def test_attention_sinks_are_refused(family, input_ids):
    model, regularization = regularised(family)

    def with_sinks(call):
        call.sinks = torch.zeros(4)
        regularization.after(call)

    with pytest.raises(ValueError, match=r"has attention sinks.*without --entropy_weight"), attention_calls(with_sinks):
        model(input_ids)


def test_a_weight_means_the_same_at_another_batch(family, input_ids):
    model, regularization = regularised(family, target=0.9)
    once = penalty_of(model, regularization, input_ids)
    twice = penalty_of(model, regularization, torch.cat((input_ids, input_ids)))
    assert twice.item() == pytest.approx(once.item(), rel=1e-12)
    mask = torch.ones_like(torch.cat((input_ids[:, :3], input_ids), 1))
    mask[:, :3] = 0  # padding on the left counts for nothing
    model, regularization = regularised(family, target=0.9)
    padded = torch.cat((torch.zeros_like(input_ids[:, :3]), input_ids), 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    value = penalty_of(model, regularization, padded, attention_mask=mask, position_ids=positions)
    assert value.item() == pytest.approx(once.item(), rel=1e-2)


def test_gradient_checkpointing_changes_nothing(family, input_ids):
    gradients = []
    for checkpointing in (False, True):
        model, regularization = regularised(family, target=0.6)
        if checkpointing:
            # renamed within transformers 5
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        with attention_calls(regularization.after):
            loss = model(input_ids, labels=input_ids, use_cache=False).loss + regularization.penalty()
            loss.backward()
        assert not regularization.terms  # nothing of the recomputation is left to the next step
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_run_that_was_interrupted_ends_the_same(corpus, cache_dir, tmp_path):
    command = ["train", "--row", "SM+G", "--config_overrides", TINY, "--data", str(corpus), "--vocab_size", "300"]
    command += ["--context_length", "32", "--probe_steps", "0", "--use_cpu", "--cache_dir", cache_dir]
    plainly = [*command, "--disable_tqdm", "true", "--save_steps", "3"]
    plainly += ["--learning_rate", "0.01", "--lr_scheduler_type", "constant"]
    command = [*plainly, "--entropy_weight", "5", "--entropy_target", "0.3", "--entropy_tolerance", "0"]
    for name, steps in (("whole", 6), ("halves", 3)):
        assert main([*command, "--output_dir", str(tmp_path / name), "--max_steps", str(steps)]) == 0
    (tmp_path / "halves" / "results.json").unlink()
    rest = ["--output_dir", str(tmp_path / "halves"), "--max_steps", "6", "--resume_from_checkpoint", "auto"]
    assert main([*command, *rest]) == 0
    whole, halves = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "halves"))
    found = whole["entropy_regularization"]
    assert found == halves["entropy_regularization"]
    assert whole["eval_loss"] == halves["eval_loss"]
    assert all(share > 0.3 for layer in found["targets"] for share in layer)  # heads begin near the maximum
    assert "entropy_targets" not in (tmp_path / "whole" / "model.safetensors").read_bytes().decode("latin1")
    assert main([*plainly, "--output_dir", str(tmp_path / "plain"), "--max_steps", "6"]) == 0
    plain = json.loads((tmp_path / "plain" / "results.json").read_text())
    assert plain["eval_loss"] != whole["eval_loss"]


def test_attention_is_left_alone_when_training_raises():
    before = AttentionInterface.get_interface

    def interrupted():
        with EntropyRegularization(1.0).while_training():
            assert AttentionInterface.get_interface is not before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert AttentionInterface.get_interface is before


def test_what_makes_no_sense_is_refused(family):
    with pytest.raises(ValueError, match="Allowed: 'heads', 'rows'"):
        EntropyRegularization(1.0, form="columns")
    with pytest.raises(ValueError, match="entropy_weight must be a finite number"):
        EntropyRegularization(math.nan)


def test_a_target_may_be_written_as_a_whole_number(family):
    """As YAML reads `entropy_target: 1`."""
    model = EntropyRegularization(1.0, 0.1, 1, "heads").adapt(family.model())
    assert all(share.dtype == torch.float32 and bool((share == 1).all()) for share in model.entropy_targets.shares)
