"""Training checkpoints of the published code that removes LayerNorms: what they compute, as one of ours."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_lnfree.conversion import convert
from hf_lnfree.errors import ModelError
from hf_lnfree.loading import load_model

from .conftest import logits, trained


def layer_norms(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}


def state_of(norm, sigma, width, flags, first=None):
    """The buffers of one norm as that code registers them, named by their path."""
    first = sigma if first is None else first
    deviations = torch.full((width,), sigma)
    deviations[0] = first
    numbers = {"real_average_std": sigma * 1.1, "real_bos_std": sigma * 9}
    return {
        **{f"{norm}.{flag}": torch.tensor(value) for flag, value in flags.items()},
        **{f"{norm}.{name}": torch.tensor(number) for name, number in numbers.items()},
        f"{norm}.bos_special_treatment": torch.tensor(first != sigma),
        f"{norm}.grad_acc_steps": torch.tensor(8),
        f"{norm}.global_step": torch.tensor(1200),
        f"{norm}.average_std_buffer": deviations,
        f"{norm}.bos_std_buffer": torch.full((width,), sigma),
    }


FLAGS = {"later": ("is_fake", "attn_v_is_fake"), "earlier": ("mode_buffer", "attn_v_mode_buffer")}


def write_checkpoint(family, folder, flags=FLAGS["later"], change=lambda state, norms: None):
    """A stock checkpoint with these buffers, and what that code computes from it in float64."""
    model = trained(family.stock_model())
    norms = {name: 0.5 + index for index, name in enumerate(layer_norms(model))}
    state = model.state_dict()
    for norm, sigma in norms.items():
        before_attention = norm.endswith(("ln_1", "input_layernorm"))
        kind = bool if flags[0] == "is_fake" else int
        values = {flags[0]: kind(1), flags[1]: kind(before_attention)}  # elsewhere nothing reads the second
        state |= state_of(norm, sigma, model.config.hidden_size, values)
    change(state, list(norms))
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    model = model.double()

    def fixed(sigma):
        return lambda norm, args, _: (args[0] - args[0].mean(-1, keepdim=True)) / sigma * norm.weight + norm.bias

    for name, norm in layer_norms(model).items():
        norm.register_forward_hook(fixed(norms[name]))
    return model


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("to", ["lnfree", "stock"])
def test_a_finished_removal_is_a_model_without_norms(family, flags, to, input_ids, tmp_path):
    published = write_checkpoint(family, tmp_path / "published", flags)
    report = convert(str(tmp_path / "published"), tmp_path / "out", to=to)
    assert report["largest_difference"] <= report["tolerance"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").double().eval()
    torch.testing.assert_close(logits(found, input_ids), logits(published, input_ids), rtol=1e-4, atol=1e-4)
    if to == "lnfree":
        assert (found.config.norm, found.config.final_norm) == ("none", "none")
        assert not layer_norms(found)
        assert "finished" in json.loads((tmp_path / "out" / "conversion.json").read_text())["notes"][0]


def test_large_deviations_are_no_sign_of_a_half_converted_checkpoint(family, tmp_path):
    def enlarge(state, norms):
        state[f"{norms[-1]}.average_std_buffer"] *= 1e4
        state[f"{norms[-1]}.bos_std_buffer"] *= 1e4

    write_checkpoint(family, tmp_path / "published", change=enlarge)
    assert convert(str(tmp_path / "published"), tmp_path / "out")["divisions_left"] == 0


def set_flag(flag, norm):
    return lambda state, norms: state.update({f"{norms[norm]}.{flag}": torch.tensor(False)})


def first_of_its_own(state, norms):
    state[f"{norms[1]}.average_std_buffer"][0] = 30.0


def end_of_text_of_its_own(state, norms):
    state[f"{norms[0]}.bos_std_buffer"][:] = 30.0


def nothing_to_divide_by(state, norms):
    state[f"{norms[0]}.average_std_buffer"][:] = 0
    state[f"{norms[0]}.bos_std_buffer"][:] = 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_flag("is_fake", -1), r"(ln_f|final_layer_norm) still normalises \(is_fake is false\)"),
        (set_flag("attn_v_is_fake", 0), r"0\.(ln_1|input_layernorm) still normalises \(attn_v_is_fake"),
        (first_of_its_own, r"0\.\w+ divides the first position by a number of its own"),
        (end_of_text_of_its_own, r"divides tokens that end a text"),
        (nothing_to_divide_by, r"divides by 0"),
    ],
)
def test_an_unfinished_removal_is_refused_and_says_what_to_run_first(family, change, words, tmp_path):
    write_checkpoint(family, tmp_path / "published", change=change)
    with pytest.raises(ModelError, match=words) as refused:
        convert(str(tmp_path / "published"), tmp_path / "out")
    assert "train.py --mode without_ln" in str(refused.value)
    assert "ln_removal_and_push.py" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_norm_without_its_state_is_missed(family, tmp_path):
    def forget(state, norms):
        for name in [name for name in state if name.startswith(f"{norms[0]}.") and "weight" not in name]:
            del state[name]

    write_checkpoint(family, tmp_path / "published", change=forget)
    with pytest.raises(ModelError, match=r"lacks 2 tensors: .*bias, .*sigma"):
        convert(str(tmp_path / "published"), tmp_path / "out")


def test_elsewhere_such_a_checkpoint_is_sent_to_convert(family, tmp_path):
    write_checkpoint(family, tmp_path / "published")
    with pytest.raises(ModelError, match=r"removal of LayerNorms .*hf-lnfree convert"):
        load_model(tmp_path / "published")
