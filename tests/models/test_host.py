"""What transformers and PEFT decide by the name of a class or by model_type is the same for ours as for stock."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_lnfree import LNFreeTrainer, LNFreeTrainingArguments
from hf_lnfree.conversion import convert
from hf_lnfree.data.tokenization import train_bpe
from hf_lnfree.models.errors import ConfigurationError
from hf_lnfree.training import DecayMatrices


def smoothing(tmp_path, kind=TrainingArguments, **more):
    return kind(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[], **more)


def twins(family):
    stock = family.stock_model()
    ours = family.model(norm="layernorm", final_norm="layernorm")
    ours.load_state_dict(stock.state_dict())
    return stock, ours


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "peft"])
def test_label_smoothing_shifts_labels_as_for_the_stock_family(family, input_ids, tmp_path, adapters):
    stock, ours = twins(family)
    batch = {"input_ids": input_ids, "labels": input_ids.where(input_ids > 10, -100)}
    losses = []
    for model in (stock, ours):
        if adapters:
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
        trainer = Trainer(model, smoothing(tmp_path))
        losses.append(trainer.compute_loss(model.train(), copy.copy(batch)).item())
    assert losses[0] == losses[1]


def test_perplexity_is_that_of_the_plain_loss(family, input_ids, tmp_path):
    model = family.model()
    data = [{"input_ids": row, "labels": row} for row in input_ids]
    with torch.no_grad():
        plain = model(input_ids, labels=input_ids).loss.item()
    metrics = LNFreeTrainer(model, smoothing(tmp_path, LNFreeTrainingArguments), eval_dataset=data).evaluate()
    assert metrics["eval_loss"] == pytest.approx(plain, rel=1e-6)


def test_smoothing_learns_the_next_token_and_not_this_one(family, tmp_path):
    """A sequence that goes 3, 4, 5, ...: after a few steps the next token is predicted, not the one that was read."""
    model = family.model(initializer_range=0.02)
    row = torch.arange(3, 35)
    data = [{"input_ids": row, "labels": row}] * 8
    args = smoothing(
        tmp_path, LNFreeTrainingArguments, max_steps=60, learning_rate=1e-2, probe_steps=0, save_strategy="no"
    )
    LNFreeTrainer(model, args, train_dataset=data).train()
    with torch.no_grad():
        predicted = model.eval()(row[None]).logits[0].argmax(-1)
    assert (predicted[:-1] == row[1:]).float().mean() > 0.9


@pytest.mark.parametrize("layout", ["tokenizer.json", "class named elsewhere", "vocab and merges"])
def test_the_tokenizer_of_a_folder_without_a_class_is_the_stock_one(family, layout, tmp_path):
    """As openai-community/gpt2 is laid out; of the last one there is no tokenizer.json at all."""
    source, out = tmp_path / "stock", tmp_path / "ours"
    family.stock_model(vocab_size=300).save_pretrained(source)
    bpe = train_bpe(["some text of a few words, and a few words more"] * 4, 300)
    state = json.loads(bpe.backend_tokenizer.to_str())
    bpe.save_pretrained(source)
    (source / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
    if layout == "vocab and merges":
        if family.name == "gpt_neox":
            pytest.skip("GPT-NeoX has no such layout")
        (source / "tokenizer.json").unlink()
        (source / "vocab.json").write_text(json.dumps(state["model"]["vocab"]))
        merges = "\n".join(" ".join(pair) for pair in state["model"]["merges"])
        (source / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    if layout == "class named elsewhere":
        (source / "tokenizer_config.json").unlink()
    convert(str(source), out, check=False)
    wanted, found = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(out)
    assert type(found) is type(wanted)
    assert found.special_tokens_map == wanted.special_tokens_map
    assert found.eos_token == "<|endoftext|>"
    assert found("some text")["input_ids"] == wanted("some text")["input_ids"]


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"weight_norm": "weight"}, "convert --to folded"),
        ({"weight_norm": "spectral", "weight_norm_scope": "block"}, "convert --to folded"),
        ({"linear_bias": "query_key"}, "linear_bias='all'"),
    ],
)
def test_a_quantiser_that_would_drop_what_projections_add_is_refused(family, fields, remedy, tmp_path, monkeypatch):
    """A quantiser as transformers has them, which exchanges every projection; no weight is looked at."""

    class Quantizer(HfQuantizer):
        def __init__(self):
            self.quantization_config = QuantizationConfigMixin(quant_method="swap")
            self.pre_quantized = False

        def _process_model_before_weight_loading(self, model, **kwargs):
            for name, module in list(model.named_modules()):
                if isinstance(module, (torch.nn.Linear, Conv1D)):
                    model.set_submodule(name, torch.nn.Identity())

        is_trainable = is_serializable = True

    with pytest.raises(ConfigurationError, match=remedy):
        Quantizer().preprocess_model(family.model(**fields))
    plain = family.model()
    Quantizer().preprocess_model(plain)
    assert plain.is_quantized


LEARNED = [
    {"norm": "dyt", "final_norm": "derf", "activation": "learnable_leaky_relu", "slope_scope": "layer"},
    {"norm": "rmsnorm", "final_norm": "scale", "activation": "prelu", "residual_gain": "skipinit"},
    {"norm": "affine", "ffn_scale": True, "attention_temperature": True, "weight_norm": "weight"},
]


@pytest.mark.parametrize("fields", LEARNED, ids=lambda fields: fields["norm"])
def test_no_trainer_with_the_mixin_decays_what_is_no_matrix(family, fields, tmp_path):
    class MatrixTrainer(DecayMatrices, Trainer): ...

    model = family.model(**fields)
    args = TrainingArguments(str(tmp_path), use_cpu=True, weight_decay=0.1)
    groups = MatrixTrainer(model, args).create_optimizer().param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.dim() > 1), name
