"""What transformers and PEFT decide by the name of a class or by model_type is the same for ours as for stock."""

import copy
import inspect
import json
import re
from pathlib import Path
from types import FunctionType

import pytest
import torch
import transformers
from peft import LNTuningConfig, LoraConfig, get_peft_model
from peft.utils import constants as peft_constants
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments, modelcard
from transformers.cli.serving.model_manager import ModelManager
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.integrations import awq
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import modeling_auto, tokenization_auto
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.generic import find_labels
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_lnfree import LNFreeTrainer, LNFreeTrainingArguments, models
from hf_lnfree.conversion import convert
from hf_lnfree.conversion.families import FAMILIES
from hf_lnfree.data.tokenization import train_bpe
from hf_lnfree.models.errors import ConfigurationError
from hf_lnfree.training import DecayMatrices

from ..conftest import BERT, EVERY, GPT_NEOX, T5, VIT, WHISPER, run_in_two


def smoothing(tmp_path, kind=TrainingArguments, **more):
    return kind(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[], **more)


def twins(family):
    stock = family.stock_model()
    ours = family.model(norm=family.norm, final_norm=family.norm)
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
    if family.name == "llama":
        pytest.skip("transformers has no default for Llama")
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


def stock_of():
    """Every class of ours -> the stock class with its parameters, as the conversion has it or as it is derived."""
    known = {own: getattr(transformers, name) for family in FAMILIES.values() for name, own in family.classes.items()}
    for own in (own for heads in models.FAMILIES.items() for own in (heads[0], *heads[1])):
        derived = next(base for base in own.__mro__ if base.__module__.startswith("transformers.models."))
        assert known.setdefault(own, derived) is derived
    return known


class Pair:
    """A class of ours with norms in every place, and the stock class: models of both."""

    def __init__(self, own):
        self.family = next(
            f for f in (*EVERY, VIT, BERT, T5, WHISPER) if own.config_class.__name__ == f"{f.prefix}Config"
        )
        self.own, self.stock = own, stock_of()[own]
        final = self.family.norm if own.stacks[0].final_norm else "none"
        self.ours = own(self.family.config(norm=self.family.norm, final_norm=final))
        self.theirs = self.stock(self.family.stock_config())
        self.names = self.own.__name__, self.stock.__name__
        self.types = self.ours.config.model_type, self.theirs.config.model_type

    def same(self, decide):
        ours, theirs = decide(self.ours), decide(self.theirs)
        assert ours == theirs

    def same_by(self, keys, table):
        """What a table has for two keys; a table without one has None for both."""
        assert repr(table.get(keys[0])) == repr(table.get(keys[1]))


def smoothed(pair):
    listed = list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    assert (pair.names[0] in listed) == (pair.names[1] in listed)


def tasks(pair):
    tables = [table for name, table in vars(modelcard).items() if name.endswith("_MAPPING_NAMES")]
    found = [[name in table.values() for name in pair.names] for table in tables]
    assert all(own == stock for own, stock in found)
    assert any(own for own, _ in found) == (not pair.names[0].endswith("Model"))


def losses(pair):
    expected = pair.theirs.loss_type or {"GPT2LMHeadModel": "ForCausalLM"}.get(pair.names[1])
    assert pair.ours.loss_type == expected


def decay(pair):
    pair.same(lambda model: Trainer.get_decay_parameter_names(None, model))


def auto_classes(pair):
    found = 0
    for name in dir(modeling_auto):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        stock = None if mapping is None else mapping.get(pair.stock.config_class, None)
        if stock is pair.stock:
            found += 1
            assert mapping[pair.own.config_class] is pair.own, name
    assert found


def architectures(pair):
    """Only the stock export has a class there, which the page says; once ours are found, it should say that."""
    assert getattr(transformers, pair.names[1]) is pair.stock
    assert not hasattr(transformers, pair.names[0])


def tokenizers(pair):
    assert getattr(pair.ours.config, "tokenizer_class", None) == tokenization_auto.TOKENIZER_MAPPING_NAMES.get(
        pair.types[1]
    )


def tensor_names(pair):
    for own, stock in (pair.names, pair.types):
        assert repr(get_checkpoint_conversion_mapping(own)) == repr(get_checkpoint_conversion_mapping(stock))


def peft_targets(pair):
    for name, mapping in vars(peft_constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and not (name.count("LNTUNING") and pair.family is GPT_NEOX):
            pair.same_by(pair.types, mapping)


def norms(pair):
    asked = pair.ours.norms_to_tune(LNTuningConfig())
    found = {name for name, _ in pair.theirs.named_modules() if name.rpartition(".")[2] in asked.target_modules}
    assert found == {name for name, m in pair.theirs.named_modules() if pair.family.is_norm(name, m)}
    assert asked.exclude_modules is None


def projections(pair):
    pair.same(lambda model: {name: type(m) for name, m in model.named_modules() if hasattr(m, "weight")})


def scaled_activations(pair):
    pair.same_by(pair.types, awq.AWQ_SCALES_MAPPINGS)


def whole_modules(pair):
    pair.same(lambda model: set(model._no_split_modules))
    there = [{type(module).__name__ for module in model.modules()} for model in (pair.ours, pair.theirs)]
    assert there[0] & set(pair.ours._no_split_modules) == there[1] & set(pair.ours._no_split_modules) != set()


def checkpointed(pair):
    pair.same(lambda model: [n for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)])
    pair.same(lambda model: model.supports_gradient_checkpointing)


SHARED_OUT = {
    "plain": {},
    "query_key_norm": {"query_key_norm": True},
    "attention_temperature": {"attention_temperature": True},
    "weight_norm='spectral'": {"weight_norm": "spectral"},
    "weight_norm='weight'": {"weight_norm": "weight"},
    "linear_bias='query_key'": {"linear_bias": "query_key"},
    "ffn_scale": {"ffn_scale": True},
    "an activation that learns": {"activation": "prelu"},
    "'identity_fused'": {"activation": "identity_fused"},
}


def test_tensor_parallelism_is_refused_where_a_share_of_a_layer_does_not_suffice(family):
    for name, fields in SHARED_OUT.items():
        if (family.gated and name == "'identity_fused'") or (family.name == "qwen3" and name == "query_key_norm"):
            continue  # refused before; the norms of the stock attention, which its plan knows
        model = family.model(**fields)
        model._tp_size = 1
        if name == "plain":
            model._tp_size = 2
            continue
        with pytest.raises(ConfigurationError, match=re.escape(name)):
            model._tp_size = 2


def test_two_processes_share_a_model_and_compute_the_same_or_refuse(tmp_path):
    ids, folders, wanted = torch.arange(8)[None], [], None
    for name in ("plain", "query_key_norm"):
        model = GPT_NEOX.model(**SHARED_OUT[name]).eval()
        model.save_pretrained(tmp_path / name)
        folders.append(str(tmp_path / name))
        wanted = model(ids).logits.double().sum().item() if name == "plain" else wanted
    done = run_in_two(str(Path(__file__).with_name("tensor_parallel.py")), *folders)
    assert done.returncode == 0, done.stderr
    said = dict(line.split("|", 1) for line in done.stdout.splitlines() if "|" in line)
    assert float(said["plain"]) == pytest.approx(wanted, abs=1e-3)
    assert said["query_key_norm"].startswith("refused: Tensor parallelism")


ABILITIES = re.compile(r"_supports_\w+|_can_\w+|_is_\w+|_keys_to_ignore\w+|_keep_in_\w+|_skip_keys\w+|_no_split\w+")


def abilities(pair):
    methods = (property, classmethod, staticmethod, FunctionType)
    found = {name: inspect.getattr_static(pair.stock, name) for name in dir(pair.stock) if ABILITIES.fullmatch(name)}
    names = {name for name, value in found.items() if not isinstance(value, methods)}
    assert len(names) > 8
    for name in names:
        assert getattr(pair.own, name) == getattr(pair.stock, name), name
    pair.same(lambda model: model._tied_weights_keys or {})


def plans(pair):
    pair.same(lambda model: (model.tp_plan, model.pp_plan))
    pair.same(lambda model: (model.config.base_model_tp_plan, model.config.base_model_pp_plan))


def generates(pair):
    pair.same(lambda model: (model.can_generate(), model.main_input_name, model.base_model_prefix))


def speech(pair):
    """A prompt of two tokens; time stamps are those of tests/models/test_whisper.py."""
    if not pair.ours.can_generate() or not pair.ours.config.is_encoder_decoder:
        return
    start, name = torch.tensor(2), pair.ours.main_input_name
    prompt = torch.tensor([[7, 2]])
    found = [
        model._prepare_decoder_input_ids_for_generation(1, name, {"decoder_input_ids": prompt.clone()}, start)[0]
        for model in (pair.ours, pair.theirs)
    ]
    assert torch.equal(*found)
    assert torch.equal(found[0], prompt) == (pair.types[1] == "whisper")


# Who decides what, as docs/host.md says it -> what must be so for a class of ours.
CHECKS = {
    "whether labels are shifted under `label_smoothing_factor`": smoothed,
    "what a model is for": tasks,
    "which loss a head computes": losses,
    "which inputs are labels": lambda pair: pair.same(lambda model: find_labels(type(model))),
    "what weight decay leaves out": decay,
    "configuration and model of a checkpoint": auto_classes,
    "the class of a checkpoint": architectures,
    "the class of a tokenizer in a folder that names none": tokenizers,
    "names of tensors in a file (GPT-NeoX's head is `embed_out` there)": tensor_names,
    "default target modules": peft_targets,
    "what a norm is": norms,
    "which projections are exchanged": projections,
    "which activation is scaled": scaled_activations,
    "which modules stay whole on a device, or are wrapped": whole_modules,
    "which modules are checkpointed, and whether": checkpointed,
    "which attention, cache and compilation a model can do, which outputs are recorded, which tensors may be missing": (
        abilities
    ),
    "how a model is split over devices": plans,
    "whether and how a model generates": generates,
    "what is Whisper's own: prompts before the start token, time stamps": speech,
}
OURS = {name: found for name in models.__all__ if isinstance(found := getattr(models, name), type)}
OURS = {name: found for name, found in OURS.items() if issubclass(found, PreTrainedModel)}


def test_the_page_and_the_checks_are_one_list_and_every_class_has_a_stock_one():
    page = (Path(__file__).parents[2] / "docs" / "host.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert [row[1] for row in rows[1:]] == list(CHECKS)
    assert set(OURS.values()) == set(stock_of())


@pytest.mark.parametrize("name", OURS)
def test_every_decision_by_a_name_is_that_of_the_stock_class(name):
    pair = Pair(OURS[name])
    for decision, check in CHECKS.items():
        try:
            check(pair)
        except AssertionError as error:
            raise AssertionError(f"{name}: {decision}") from error


def test_serve_loads_the_stock_export_and_nothing_else(family, input_ids, tmp_path):
    """What `transformers serve` does to a model, without its server."""
    bpe = train_bpe(["some text of a few words"] * 4, 300)
    norm = family.norm if family.name in ("qwen3", "opt") else "none"  # these have no stock export without norms
    model = family.model(vocab_size=300, norm=norm, final_norm=norm)
    model.save_pretrained(tmp_path / "ours")
    bpe.save_pretrained(tmp_path / "ours")
    convert(str(tmp_path / "ours"), tmp_path / "stock", to="stock")
    manager = ModelManager(device="cpu", model_timeout=-1)
    served, tokenizer = manager.load_model_and_processor(manager.process_model_name(str(tmp_path / "stock")))
    assert type(served) is family.stock_head("CausalLM")
    assert tokenizer("some text")["input_ids"] == bpe("some text")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(served(input_ids).logits, model(input_ids).logits, rtol=1e-3, atol=1e-3)
    with pytest.raises(AttributeError, match="has no attribute LNFree"):
        manager.load_model_and_processor(str(tmp_path / "ours"))
