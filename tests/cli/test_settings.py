"""Settings of a run: every spelling that is allowed, what was renamed, and values that fields refuse."""

from pathlib import Path

import pytest
import torch
import yaml

from hf_lnfree.cli.main import main
from hf_lnfree.cli.removal import DATACLASSES
from hf_lnfree.cli.train import parse_arguments
from hf_lnfree.errors import SettingsError
from hf_lnfree.studies.study import Study
from hf_lnfree.training.settings import RENAMED, merge, parse_settings

# Of transformers, as its own examples spell them; as this package spells them.
OLD = ["--output_dir", "there", "--learning_rate", "2e-3", "--use_cpu", "--seed", "7", "--max_steps=3"]
OLD += ["--per_device_train_batch_size", "4", "--save_strategy", "no", "--disable_tqdm", "true", "--bf16", "false"]
DASHED = [part.replace("_", "-") if part.startswith("--") else part for part in OLD]
NEW = [
    "--out",
    "there",
    "--device",
    "cpu",
    *(part for part in DASHED if part not in ("--output-dir", "there", "--use-cpu")),
]
OURS = ["--context-length", "32", "--vocab-size", "300"]


def plain(parsed):
    return [vars(part) if not hasattr(part, "to_dict") else part.to_dict() for part in parsed]


@pytest.fixture
def given(monkeypatch):
    """What `train` and `remove_norms` are called with by the command line."""
    calls = []

    def record(*arguments):
        calls.append([argument if isinstance(argument, str) else plain([argument])[0] for argument in arguments])
        raise SettingsError("enough")

    monkeypatch.setattr("hf_lnfree.cli.train.train", record)
    monkeypatch.setattr("hf_lnfree.cli.removal.remove_norms", record)
    return calls


@pytest.mark.parametrize("command", [["train"], ["remove-norms", "model"]])
def test_old_and_new_spellings_give_equal_settings(command, given, tmp_path):
    for flags in (OLD, DASHED, NEW):
        assert main([*command, *flags, *OURS]) == 1
    for fields in (
        {"output_dir": "there", "use_cpu": True, "max_steps": "3"},
        {"out": "there", "device": "cpu", "max_steps": 3},
    ):
        values = {"learning_rate": "2e-3", "seed": 7, "per_device_train_batch_size": 4, "save_strategy": "no"}
        values |= {"disable_tqdm": True, "bf16": False, "context_length": 32, "vocab_size": 300, **fields}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        assert main([*command, str(path)]) == 1
    assert len(given) == 5
    for call in given[1:]:
        assert call == given[0]
    training = next(part for part in given[0] if isinstance(part, dict) and "use_cpu" in part)
    assert (training["output_dir"], training["use_cpu"], training["learning_rate"]) == ("there", True, 2e-3)
    assert (training["seed"], training["max_steps"]) == (7, 3)


def test_a_study_reads_both_spellings(tmp_path):
    cells = []
    for number, fields in enumerate(({"output_dir": "x", "use_cpu": True}, {"out": "x", "device": "cpu"})):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump({"rows": {"a": {"row": "SM+G"}}, "max_steps": 3, **fields}))
        cells.append(Study.load(path).arguments("a", 1, Path("cell")))
    path.write_text(yaml.safe_dump({"rows": {"a": {"row": "SM+G"}}, "max_steps": 3}))
    cells.append(Study.load(path).arguments("a", 1, Path("cell"), device="cpu"))
    cells.append(Study.load(path, changes={"use_cpu": True}).arguments("a", 1, Path("cell")))
    assert all(plain(cell) == plain(cells[0]) for cell in cells)
    assert (cells[0][2].output_dir, cells[0][2].use_cpu) == ("cell", True)


def test_the_later_of_two_names_wins_from_file_to_file():
    assert merge({"use_cpu": True, "out": "a"}, {"device": None, "output_dir": "b"}) == {
        "device": None,
        "output_dir": "b",
    }
    with pytest.raises(SettingsError, match=r"f.yaml: device and use_cpu mean the same"):
        parse_settings({"device": "cpu", "use_cpu": True}, "f.yaml")


def test_a_device_of_the_file_need_not_be_here_when_a_flag_names_another(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("device: tpu\n")
    for flags in (["--device", "cpu"], ["--use_cpu"], ["--use-cpu"]):
        assert parse_arguments([str(path), *flags])[2].use_cpu
    with pytest.raises(SettingsError, match=r"There is no device 'tpu' here. Allowed: cpu"):
        parse_arguments([str(path)])
    path.write_text("device: cpu\n")
    assert parse_arguments([str(path)])[2].device == torch.device("cpu")


@pytest.mark.parametrize("name", RENAMED)
def test_renamed_fields_are_refused_with_their_new_name(name, tmp_path, capsys):
    flag, new = f"--{name.replace('_', '-')}", f"--{RENAMED[name].replace('_', '-')}"
    for spelt in (flag, f"--{name}"):
        for command in (["train"], ["remove-norms", "model"]):
            assert main([*command, spelt, "x"]) == 1
            assert capsys.readouterr().err == f"error: {flag} is called {new} now.\n"
    path = tmp_path / "old.yaml"
    for content in (f"{name}: x\n", f"factors: {{{name}: [x]}}\n"):
        path.write_text(content)
        for command in (["train"], ["remove-norms", "model"], ["study"]):
            assert main([*command, str(path)]) == 1
            assert capsys.readouterr().err == f"error: {path}: {name} is called {RENAMED[name]} now.\n"
    assert main(["demo", "--set", f"{name}=x"]) == 1
    assert f"{name} is called {RENAMED[name]} now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["study", "f.yaml", "--output-dir", "x"], "--output-dir is called --out now."),
        (["demo", "--output-dir=x"], "--output-dir is called --out now."),
        (["demo", "--use-cpu"], "--use-cpu is called --device cpu now."),
        (["entropy", "model", "--windows", "3"], "--windows is called --max-windows now."),
    ],
)
def test_renamed_options_are_refused_with_their_new_name(arguments, said, capsys):
    assert main(arguments) == 1
    assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": True}, "max_steps must be a whole number, got True"),
        ({"max_steps": "1e3"}, "max_steps must be a whole number, got '1e3'"),
        ({"learning_rate": None}, "learning_rate must be a number, got None"),
        ({"fp16": "maybe"}, "fp16 must be true or false, got 'maybe'"),
        ({"config_overrides": [1]}, "config_overrides must be a mapping or text or null"),
        ({"config_overrides": "{"}, "config_overrides is not YAML"),
        ({"packing": "sliding"}, "packing must be one of 'exact', 'packed', got 'sliding'"),
        ({"on_nonfinite": "pray"}, "on_nonfinite must be one of 'stop', 'skip', 'rollback'"),
        ({"optim": "adamm"}, "optim must be one of 'adamw_torch'"),
        ({"eval_strategy": "sometimes"}, "eval_strategy must be one of 'no', 'steps', 'epoch', got 'sometimes'"),
        ({"warmup_steps": -1}, "warmup_steps"),
        (
            {"accelerator_config": {"x": 1}},
            "accelerator_config={'x': 1}: AcceleratorConfig.__init__()",
        ),
        (
            {"accelerator_config": "nowhere.json"},
            "accelerator_config must be a mapping, its JSON, or a file",
        ),
        ({"report_to": "nobody"}, "report_to=nobody is not installed or not known"),
        ({"lerning_rate": 1}, "unknown fields: lerning_rate. Did you mean learning_rate?"),
        ({"zzz": 1}, "unknown fields: zzz. `hf-lnfree train --help-all` lists all."),
    ],
)
def test_values_that_are_refused_name_file_and_field(values, message, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path)]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert message in said
    if "config_overrides is" not in message and "report_to" not in message:
        assert str(path) in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_steps", "x"], "--max-steps: invalid int value: 'x'."),
        (["--learning-rate"], "--learning-rate: expected one argument."),
        (["--loss", "x"], "--loss: invalid choice: 'x'"),
        (["--max-step", "3"], "Unknown flags: --max-step 3. Did you mean --max-steps?"),
        (["late.yaml"], "There is no configuration file late.yaml"),
        (["--seed", "1", "late.yaml"], "Unknown flags: late.yaml."),
        (["--device", "cuda:banana"], "There is no device 'cuda:banana' here"),
    ],
)
def test_flags_that_are_refused(flags, message, capsys):
    assert main(["train", *flags]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_text_numbers_and_switches_of_a_file_become_what_fields_hold():
    values = {"learning_rate": "1e-3", "run_name": 7, "resume_from_checkpoint": True}
    values |= {"save_steps": 3, "config_overrides": {"n_layer": 2}, "lr_scheduler_kwargs": {"a": 1}}
    model, _, training = parse_settings(values, "f.yaml")
    assert (training.learning_rate, training.run_name, training.resume_from_checkpoint) == (1e-3, "7", "True")
    assert model.overrides == {"n_layer": 2}
    assert training.lr_scheduler_kwargs == {"a": 1}


def test_the_rate_of_a_new_model_is_one_for_training_from_scratch(tmp_path):
    """That of transformers is for fine-tuning: a checkpoint has it, and so has a removal."""
    path = tmp_path / "run.yaml"
    path.write_text("row: SM+G\n")
    given = tmp_path / "given.yaml"
    given.write_text("learning_rate: 5.0e-5\n")
    rates = {
        1e-3: [parse_arguments(line)[2] for line in ([], [str(path)], ["--row", "SM+G"])],
        5e-5: [
            parse_arguments(["--model-name-or-path", "somewhere"])[2],
            parse_arguments([str(given)])[2],
            parse_arguments(["--learning_rate", "5e-5"])[2],
            parse_arguments([], dataclasses=DATACLASSES)[2],
        ],
    }
    for rate, found in rates.items():
        assert [args.learning_rate for args in found] == [rate] * len(found)
    path.write_text("rows: {a: {}, b: {model_name_or_path: somewhere}, c: {learning_rate: 2.0e-3}}\n")
    study = Study.load(path)
    assert [study.arguments(row, 0, tmp_path)[2].learning_rate for row in "abc"] == [1e-3, 5e-5, 2e-3]


IDLE = [
    ({"entropy_tolerance": 0.2}, "entropy_tolerance=0.2 has no effect: it needs entropy_weight above 0"),
    ({"entropy_form": "rows", "entropy_weight": 0}, "entropy_form='rows' has no effect"),
    ({"num_train_epochs": 2, "max_steps": 5}, "num_train_epochs=2 has no effect: it needs max_steps=-1"),
    ({"probe_sequences": 3, "probe_steps": 0}, "probe_sequences=3 has no effect"),
    ({"eval_steps": 3}, "eval_steps=3 has no effect"),
    ({"save_steps": 3, "save_strategy": "no"}, "save_steps=3 has no effect"),
    ({"save_total_limit": 3, "save_strategy": "no"}, "save_total_limit=3 has no effect"),
    ({"warmup_steps": 3, "lr_scheduler_type": "constant"}, "warmup_steps=3 has no effect"),
    ({"metric_for_best_model": "loss"}, "metric_for_best_model='loss' has no effect"),
    ({"validation_fraction": 0.1, "validation_data": "there"}, "validation_fraction=0.1 has no effect"),
    ({"max_validation_documents": 3}, "max_validation_documents=3 has no effect"),
    ({"text_column": "code"}, "text_column='code' has no effect: it needs data or validation_data other than 'stdlib'"),
    ({"vocab_size": 300, "tokenizer": "there"}, "vocab_size=300 has no effect"),
    ({"vocab_size": 300, "model_name_or_path": "there"}, "vocab_size=300 has no effect"),
    ({"row": "SM+G", "model_name_or_path": "there"}, "row='SM+G' has no effect"),
    ({"revision": "main"}, "revision='main' has no effect"),
    ({"slope_weight_decay": 0.1}, "slope_weight_decay=0.1 has no effect"),
    *(
        ({"config_overrides": overrides}, f"config_overrides: {name}")
        for name, overrides in {
            "negative_slope=0.1": {"negative_slope": 0.1},
            "slope_scope='global'": {"slope_scope": "global"},
            "norm_alpha=0.1": {"norm_alpha": 0.1},
            "weight_norm_scope='block'": {"weight_norm_scope": "block"},
            "norm='dyt'": {"norm": "dyt", "n_layer": 1, "layer_norms": ["none"]},
            "activation_function='gelu'": {"activation_function": "gelu", "n_layer": 1, "layer_activations": ["relu"]},
        }.items()
    ),
]


@pytest.mark.parametrize(("values", "said"), IDLE)
def test_a_field_that_nothing_reads_is_refused_where_it_is_given(values, said, tmp_path):
    """In a file, in a row, and as a flag; a base may have it, and a later place may switch off what reads it."""
    path, above, study = tmp_path / "run.yaml", tmp_path / "above.yaml", tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    above.write_text("base: run.yaml\n")
    study.write_text(yaml.safe_dump({"rows": {"a": values}}))
    with pytest.raises(SettingsError) as refused:
        parse_arguments([str(path)])
    assert f"{path}: {said}" in str(refused.value)
    with pytest.raises(SettingsError) as refused:
        Study.load(study)
    assert f"row a: {said}" in str(refused.value)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if name != "config_overrides"]
    if flags:
        with pytest.raises(SettingsError, match="has no effect"):
            parse_arguments(flags)
    parse_arguments([str(above)])
    study.write_text("base: run.yaml\nrows: {a: {}}\n")
    Study.load(study)


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("entropy_weight: 1.0\nentropy_tolerance: 0.2\n", ["--entropy-weight", "0"]),
        ("eval_strategy: steps\neval_steps: 3\n", ["--eval-strategy", "no"]),
        ("row: SM+LeakyR\nconfig_overrides: {negative_slope: 0.1}\n", ["--row", "SM+G"]),
        ("row: SM+LeakyR\nconfig_overrides: {negative_slope: 0.1}\n", []),
        ("row: SM+LearnableR-layer\nslope_weight_decay: 0.1\n", []),
        ("config_overrides: {norm_alpha: 0.1, final_norm: dyt}\n", []),
        ("max_steps: 5\n", ["--num-train-epochs", "2", "--max-steps", "-1"]),
        ("num_train_epochs: 2\n", ["--max-steps", "5"]),
    ],
)
def test_a_field_that_is_read_or_was_switched_off_later_is_accepted(text, flags, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    parse_arguments([str(path), *flags])
