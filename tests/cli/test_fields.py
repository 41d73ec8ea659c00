"""Every field that a run takes, of this package and of transformers, with every kind of wrong value."""

import dataclasses
import math
from typing import get_type_hints

import pytest
import yaml

from hf_lnfree.checks import fits
from hf_lnfree.cli.main import main
from hf_lnfree.cli.removal import DATACLASSES
from hf_lnfree.cli.train import parse_arguments
from hf_lnfree.data.arguments import RANGES as OF_DATA
from hf_lnfree.data.arguments import DataArguments
from hf_lnfree.errors import SettingsError
from hf_lnfree.models.errors import ConfigurationError
from hf_lnfree.removal.arguments import RemovalArguments
from hf_lnfree.training import LNFreeTrainingArguments, ModelArguments
from hf_lnfree.training.fields import ALIASES, RANGES
from hf_lnfree.training.host_fields import HOST_RANGES

KINDS = (ModelArguments, DataArguments, LNFreeTrainingArguments, RemovalArguments)
HINTS = {name: hint for kind in KINDS for name, hint in get_type_hints(kind).items()}
FIELDS = sorted({field.name for kind in KINDS for field in dataclasses.fields(kind) if field.init})
OF_REMOVAL = {field.name for field in dataclasses.fields(RemovalArguments)}
WRONG = [
    None,
    True,
    -1,
    0,
    2,
    5.5,
    -2,
    10**400,
    math.nan,
    math.inf,
    -math.inf,
    "zzz",
    "",
    [1, 2],
    ["x"],
    {"x": 1},
    [{}],
]
MAY_BE_ANYTHING = {"config_overrides", "schedule"}  # text that is read in its own way
RECOMPUTATION = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"
MAPPINGS = {name for name, hint in HINTS.items() if fits({"x": 1}, hint)}


def written(tmp_path, name, value):
    path = tmp_path / "run.yaml"
    read = {"entropy_weight": 1} if name == "entropy_target" else {}
    path.write_text(yaml.safe_dump({name: value, **read}))
    return path


def parsed(path, name):
    if name in OF_REMOVAL:
        return parse_arguments([str(path)], dataclasses=DATACLASSES)
    return parse_arguments([str(path)])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", FIELDS)
def test_a_value_is_refused_by_file_and_field_or_stands_as_it_was_given(name, tmp_path):
    accepted, refused = [], []
    for value in WRONG:
        path = written(tmp_path, name, value)
        try:
            parts = parsed(path, name)
        except SettingsError as error:
            refused.append(str(error))
            continue
        found = next(getattr(part, name) for part in parts if hasattr(part, name))
        accepted.append(value)
        assert fits(value, HINTS[name]) or str(value) == str(found) or (value, found) == (0, "no"), value
        if isinstance(value, float):
            assert math.isfinite(value)
    assert name in MAY_BE_ANYTHING or all(message.startswith(f"{path}: ") for message in refused)
    assert not any(isinstance(value, (list, dict)) for value in accepted) or name in MAPPINGS | MAY_BE_ANYTHING | {
        "include_for_metrics",
        "label_names",
        "optim_target_modules",
    }


NUMBERS = [name for name in FIELDS if fits(10**6, HINTS[name]) and not fits("10", HINTS[name])]


def test_every_number_has_a_range():
    of_removal = {"gate_steps", "residual_norm_weight", "removal_windows", "lora_rank", "lora_alpha"}
    assert set(NUMBERS) <= {*HOST_RANGES, *RANGES, *OF_DATA, *of_removal}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_are_refused_with_what_is_allowed(name, tmp_path, capsys):
    command = ["remove-norms", "model"] if name in OF_REMOVAL else ["train"]
    assert main([*command, str(written(tmp_path, name, -2))]) == 1
    said = capsys.readouterr().err
    assert f"run.yaml: {name} must be " in said
    assert said.endswith("got -2.\n")
    option = f"--{ALIASES.get(name, name).replace('_', '-')}"
    assert main([*command, f"{option}=-2"]) == 1
    assert f"error: {option} must be " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "refused", "taken"),
    [
        ("num_train_epochs", (0,), (0.1, 3)),
        ("save_steps", (0,), (0.5, 100)),
        ("adam_beta2", (1,), (0, 0.999)),
        ("validation_fraction", (0, 1), (0.01, 0.99)),
        ("entropy_target", (-0.1, 1.1), (0, 1)),
        ("vocab_size", (257, 10_000_001), (258,)),
        ("seed", (-1, 2**32), (0, 2**32 - 1)),
    ],
)
def test_bounds_of_a_range(name, refused, taken, tmp_path):
    for value in refused:
        with pytest.raises(SettingsError, match=f"run.yaml: {name} must be "):
            parsed(written(tmp_path, name, value), name)
    for value in taken:
        assert any(getattr(part, name, None) == value for part in parsed(written(tmp_path, name, value), name))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("factors: [1]", "factors must be a mapping or null, got [1]"),
        ("factors: 3", "factors must be a mapping"),
        ("factors: {norm: []}", "the factor norm must be a list of values"),
        ("factors: {norm: [rms]}", "row norm=rms: config_overrides: norm='rms' is not known"),
        ("rows: {a: {log_level: loud}}", "row a: log_level must be one of 'detail'"),
        ("rows: {a: {}}\ncompare: [[x]]", "compare must be a list of pairs like [one row, other row], got ['x']"),
        ("rows: {a: {}}\ncompare: [x]", "compare must be a list of a list of text"),
        ("rows: {a: {}}\ncompare: [[a, b]]", "compares rows that it does not have: b"),
        ("rows: {a: {}}\nscales: [cpu]", "scales must be a mapping of text to a mapping or null"),
        ("rows: {a: {}}\ntitle: [x]", "title must be text or null, got ['x']"),
        ("rows: {a: {}}\npublished: 4", "published must be text or null, got 4"),
        ("rows: {1: {}}", "rows must be a mapping of text"),
        ("rows: {a: 3}", "rows must be a mapping of text to text or a mapping"),
        (
            "rows: {a: {config_overrides: {n_layer: 0}}}",
            "row a: config_overrides: num_hidden_layers must be at least 1",
        ),
        ("rows: {a: {config_overrides: {n_embd: wide}}}", "row a: Validation error for field 'n_embd'"),
        ("rows: {a: {config_overrides: {n_embd: 31}}}", "row a: config_overrides='{n_embd: 31}' make no model"),
        ("rows: {a: {config_overrides: {n_layers: 2}}}", "row a: LNFreeGPT2Config has no field n_layers"),
        ("rows: {a: {config_overrides: {n_layer: 1000000000}}}", "n_layer must be at most 10000, got 1000000000"),
        ("rows: {a: {config_overrides: {n_embd: 30000000}}}", "and this machine has"),
        ("rows: {a: {attn_implementation: fast}}", "row a: attn_implementation='fast' cannot be used"),
    ],
)
def test_fields_of_a_study_are_refused_before_a_row_is_trained(text, said, tmp_path, capsys):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    assert main(["study", str(path), "--out", str(tmp_path / "out"), "--dry-run"]) == 1
    found = capsys.readouterr().err
    assert found.startswith(f"error: {path}")
    assert said in found


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_type='linear' with lr_scheduler_kwargs={'a': 1}"),
        ({"optim_args": "a"}, "optim='adamw_torch_fused' with optim_args='a'"),
        ({"label_names": []}, "label_names must be null or name 'labels'"),
        ({"torch_compile_mode": "zzz"}, "torch_compile_mode='zzz'"),
        ({"torch_compile_backend": "zzz"}, "torch_compile_backend='zzz'"),
        ({"label_names": ["labels", "x"]}, "label_names must be null or name 'labels' alone"),
        ({"fsdp": "full_shard"}, "needs several processes"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True needs liger-kernel"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers=True needs dataloader_num_workers"),
        ({"save_strategy": "best"}, "save_strategy='best' needs metric_for_best_model"),
        ({"attn_implementation": "owner/kernel"}, "attn_implementation='owner/kernel' is a kernel on the Hub"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "x"}}, "lr_scheduler_type='polynomial'"),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": -5}},
            "lr_scheduler_type='warmup_stable_decay'",
        ),
        *(
            ({RECOMPUTATION: True, f"{RECOMPUTATION}_kwargs": options}, f"{RECOMPUTATION}_kwargs={options}: ")
            for options in ({"x": 1}, {"use_reentrant": "x"})
        ),
        ({"accelerator_config": {"even_batches": "x"}}, "even_batches must be true or false"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"x": 1}}}, "unexpected keyword argument 'x'"),
        ({"dataloader_num_workers": 1_000_000}, "dataloader_num_workers must be between 0 and 1024"),
        ({"tokenizing_processes": 1_000_000}, "tokenizing_processes must be between 1 and 1024"),
        ({"per_device_eval_batch_size": 10**12}, "per_device_eval_batch_size must be between 1 and 1000000"),
        (
            {"metric_for_best_model": "rouge", "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
            "metric_for_best_model must be one of loss, perplexity, got 'rouge'",
        ),
    ],
)
def test_what_cannot_be_made_is_refused_before_the_corpus_is_read(values, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_lnfree.training.run.load_run_data", lambda *_, **__: pytest.fail("the corpus is read"))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**values, "config_overrides": {"n_layer": 1}, "output_dir": str(tmp_path / "out")}))
    assert main(["train", str(path)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "overrides", "said"),
    [
        *(
            ("gpt2", {name: value}, f"config_overrides: {name} ")
            for name, value in {"return_dict": False, "auto_map": [], "id2label": "", "num_labels": "x"}.items()
        ),
        ("gpt2", {"dtype": "zz"}, "dtype must be one of float32"),
        ("gpt2", {"per_layer_config": 3}, "has no field per_layer_config"),
        ("gpt2", {"attribute_map": {}}, "has no field attribute_map"),
        ("gpt2", {1: 2}, "config_overrides must be a mapping"),
        ("gpt2", {"softcap": 5.0}, "Did you mean 'attention_softcap'?"),
        ("gpt2", {"n_inner": 0}, "n_inner must be at least 1"),
        ("gpt2", {"pad_token_id": -1}, "pad_token_id must be at least 0"),
        ("gpt2", {"eos_token_id": [1, -1]}, "eos_token_id must be at least 0"),
        ("gpt2", {"attn_pdrop": math.nan}, "attn_pdrop must be between 0 and 1"),
        ("gpt2", {"initializer_range": math.inf}, "initializer_range must be at least 0, got inf"),
        ("gpt2", {"negative_slope": 1e300, "activation_function": "leaky_relu"}, "negative_slope must be a finite"),
        ("gpt2", {"norm": "dyt", "norm_alpha": 1e300}, "norm_alpha must be a finite number"),
        ("gpt2", "{n_layer: 1, n_layer: 2}", "'n_layer' stands there twice"),
        ("gpt_neox", {"hidden_size": 33}, "33, must be a multiple of the number of heads, 8"),
        ("gpt_neox", {"attention_dropout": 2}, "attention_dropout must be between 0 and 1"),
        *(
            ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, name: value}}, said)
            for name, value, said in (
                ("partial_rotary_factor", 3, "partial_rotary_factor of rope_parameters must be between 0 and 1"),
                ("partial_rotary_factor", 0.01, "leave 0 numbers to turn"),
                ("rope_theta", -3.0, "rope_theta of rope_parameters must be above 0"),
                ("rope_theta", "x", "make no model"),
                ("factor", -1, "factor of rope_parameters must be at least 1"),
            )
        ),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused_by_field(family, overrides, said, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"family": family, "config_overrides": overrides}))
    with pytest.raises((SettingsError, ConfigurationError)) as refused:
        parse_arguments([str(path)])
    assert said in str(refused.value)


def test_a_field_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    for text in ("seed: 1\nrow: SM+G\nseed: 2\n", "config_overrides: {n_layer: 1, n_layer: 2}\n"):
        path.write_text(text)
        with pytest.raises(SettingsError, match="stands there twice"):
            parse_arguments([str(path)])
    path.write_text("row: &again SM+G\nlr_scheduler_kwargs: {<<: {a: 1}, b: 2}\nrun_name: *again\n")
    assert parse_arguments([str(path)])[2].lr_scheduler_kwargs == {"a": 1, "b": 2}


@pytest.mark.parametrize("option", ["--max-documents", "--batch-size"])
def test_counts_beyond_what_can_be_counted_are_refused(option, capsys):
    assert main(["evaluate", "nowhere", option, str(10**30)]) == 2
    assert str(10**9) in capsys.readouterr().err


def test_colons_in_a_name_are_no_emoji(capsys):
    assert main(["evaluate", "a:b:c"]) == 1
    assert "a:b:c" in capsys.readouterr().err


def test_yaml_takes_no_for_false(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("save_strategy: no\n")
    assert parse_arguments([str(path)])[2].save_strategy.value == "no"


def test_a_schedule_without_stages_is_not_the_automatic_one(tmp_path, capsys):
    path = tmp_path / "removal.yaml"
    path.write_text("schedule: []\n")
    assert main(["remove-norms", "./nowhere", str(path), "--out", str(tmp_path / "out")]) == 1
    assert "A schedule is a list of stages" in capsys.readouterr().err
