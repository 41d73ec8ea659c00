"""BERT: the stock model bit for bit with its norms, and what its blocks are without them."""

import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, BertModel

import hf_lnfree
from hf_lnfree import LNFreeBertForMaskedLM, LNFreeBertModel
from hf_lnfree.analysis import attribute
from hf_lnfree.conversion import fold
from hf_lnfree.errors import ModelError
from hf_lnfree.models.errors import ConfigurationError
from hf_lnfree.removal import removable

from ..conftest import BERT
from .test_variants import COMBINATIONS, moved

ENDS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
# Nothing stands after the last block.
FITTING = [{**fields, "final_norm": "none"} for fields in COMBINATIONS if "norm_alpha_final" not in fields]


def outputs(model, input_ids):
    with torch.no_grad():
        return model.eval()(input_ids)[0]


@pytest.mark.parametrize("end", ENDS)
def test_with_layernorm_it_is_the_stock_model(end, input_ids, tmp_path):
    own, stock_class = getattr(hf_lnfree, f"LNFreeBert{end}"), getattr(transformers, f"Bert{end}")
    torch.manual_seed(0)
    ours = own(BERT.config(norm="layernorm"))
    torch.manual_seed(0)
    stock = stock_class(BERT.stock_config())
    ours_state, state = ours.state_dict(), stock.state_dict()
    assert ours_state.keys() == state.keys()
    assert all(torch.equal(ours_state[name], value) for name, value in state.items())
    moved(stock).save_pretrained(tmp_path / "stock")
    loaded, info = own.from_pretrained(tmp_path / "stock", norm="layernorm", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(outputs(loaded, input_ids), outputs(stock, input_ids))
    auto = AutoModel if end == "Model" else getattr(transformers, f"AutoModel{end}")
    loaded.save_pretrained(tmp_path / "ours")
    assert type(auto.from_pretrained(tmp_path / "ours")) is own


@pytest.mark.parametrize("fields", FITTING, ids=str)
def test_every_field_holds_saves_and_learns(fields, input_ids, tmp_path):
    model = moved(LNFreeBertForMaskedLM(BERT.config(**fields)))
    expected = outputs(model, input_ids)
    assert expected.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = LNFreeBertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, input_ids), expected)
    model.train()(input_ids, labels=input_ids).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_without_norms_the_stream_is_the_sum_of_its_branches(input_ids):
    """In float64, by hooks: embeddings, normed as ever, and what each branch writes."""
    model = moved(LNFreeBertModel(BERT.config(norm="none", activation="relu"))).double()
    written = []
    for block in model.encoder.layer:
        for writer in (block.attention.output.dense, block.output.dense):
            writer.register_forward_hook(lambda module, args, output: written.append(output))
    model.embeddings.register_forward_hook(lambda module, args, output: written.append(output))
    torch.testing.assert_close(outputs(model, input_ids), sum(written), rtol=0, atol=1e-12)
    left = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    assert left == ["embeddings.LayerNorm"]


def test_norm_free_it_is_the_stock_graph_without_its_norms(input_ids):
    ours = moved(LNFreeBertModel(BERT.config(norm="none"))).double()
    stock = BertModel(BERT.stock_config()).double().eval()
    for name, module in list(stock.named_modules()):
        if isinstance(module, nn.LayerNorm) and name.startswith("encoder"):
            stock.set_submodule(name, nn.Identity())
    stock.load_state_dict(ours.state_dict())
    assert torch.equal(outputs(ours, input_ids), outputs(stock, input_ids))


def test_it_loads_where_the_package_cannot_be_imported(input_ids, tmp_path):
    model = moved(LNFreeBertForMaskedLM(BERT.config(norm="derf", residual_gain="skipinit", query_key_norm=True)))
    model.save_pretrained(tmp_path / "model")
    torch.save((input_ids, str(tmp_path / "model")), tmp_path / "in.pt")
    code = (
        "import sys; sys.modules['hf_lnfree'] = None; import torch; from transformers import AutoModelForMaskedLM\n"
        "ids, folder = torch.load(sys.argv[1])\n"
        "model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()\n"
        "torch.save(model(ids).logits.detach(), sys.argv[2])"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "out.pt"), outputs(model, input_ids))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"final_norm": "layernorm"}, "nothing stands after encoder.layer"),
        ({"norm": "removal"}, "norm='removal' cannot be honoured.*stand behind the branches"),
        ({"lm_head_bias": True}, "its head for masked tokens has one"),
        ({"add_cross_attention": True, "is_decoder": True}, "it is an encoder here"),
    ],
)
def test_what_has_no_place_is_refused(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        LNFreeBertForMaskedLM(BERT.config(**fields))


def test_what_reads_a_stream_before_its_norms_is_refused(input_ids):
    """Folding, removal and attribution take a norm for what a branch reads."""
    model = LNFreeBertForMaskedLM(BERT.config(norm="layernorm"))
    for refused in (fold, removable, lambda model: attribute(model, input_ids)):
        with pytest.raises(ModelError):
            refused(model)
