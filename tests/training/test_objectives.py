"""Training for other objectives than the next token: resumed to the bit, judged exactly, refused where it cannot be."""

import math
import os
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
)

from hf_lnfree import LNFreeTrainingArguments
from hf_lnfree.analysis import EntropyReport
from hf_lnfree.cli.main import main
from hf_lnfree.data import DataArguments, load_data
from hf_lnfree.errors import SettingsError
from hf_lnfree.training import ModelArguments, RunResults, train
from hf_lnfree.training.log import read_log
from hf_lnfree.training.recipes import objectives_of
from hf_lnfree.training.settings import parse_settings

from ..conftest import run_in_two
from ..data.test_objectives import pictures, speak

TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
KINDS = {
    "bert": (AutoModelForMaskedLM, "input_ids"),
    "vit": (AutoModelForImageClassification, "pixel_values"),
    "t5": (AutoModelForSeq2SeqLM, "input_ids"),
}
FAMILIES = {
    "bert": TINY | {"hidden_dropout_prob": 0.1},
    "vit": TINY | {"patch_size": 2},
    "whisper": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2}
    | {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    "t5": {"num_layers": 2, "num_decoder_layers": 1, "d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 64},
}


@pytest.fixture
def arguments(corpus, cache_dir, tmp_path):
    def build(family, folder="run", data=None, **training):
        text = {"data": str(corpus), "vocab_size": 300, "context_length": 32}
        images = {"data": "digits", "max_documents": 100, "validation_fraction": 0.2}
        settings = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 2}
        settings |= {"probe_steps": 4, "save_steps": 6, "use_cpu": True, "disable_tqdm": True, "seed": 3}
        return (
            ModelArguments(family=family, row="SM+R", config_overrides=FAMILIES[family]),
            DataArguments(cache_dir=cache_dir, **(data or (images if family == "vit" else text))),
            LNFreeTrainingArguments(**{**settings, "output_dir": str(tmp_path / folder), **training}),
        )

    build.cache_dir = cache_dir
    return build


@pytest.mark.parametrize("family", KINDS)
def test_a_run_that_goes_on_in_its_second_epoch_ends_where_the_uninterrupted_one_does(
    arguments, corpus, tmp_path, family
):
    images = {"data": "digits", "max_documents": 40, "validation_fraction": 0.2}
    text = {
        "data": str(corpus),
        "vocab_size": 300,
        "context_length": 32,
        "max_documents": 4,
        "validation_fraction": 0.3,
    }
    few = images if family == "vit" else text
    data = load_data(DataArguments(**few, objective=objectives_of(family)[0], cache_dir=arguments.cache_dir))
    a_pass = math.ceil(len(data.train) / 4)
    assert 2 < a_pass < 12
    steps = {"max_steps": a_pass + 4, "save_steps": a_pass + 2, "probe_steps": 0}
    whole = train(*arguments(family, "whole", few, **steps))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / "results.json").unlink()
    shutil.rmtree(tmp_path / "killed" / f"checkpoint-{a_pass + 4}")
    again = train(*arguments(family, "killed", few, **steps, resume_from_checkpoint="auto"))
    assert (again.resumed_at, again.eval_loss) == (a_pass + 2, whole.eval_loss)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_loss_of_a_masked_model_is_the_mean_over_masked_tokens(arguments, tmp_path):
    model_args, data_args, args = arguments("bert")
    args.per_device_eval_batch_size = 5
    results = train(model_args, data_args, args)
    assert (results.objective, results.measure) == ("masked", "perplexity")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "run").double()
    held_out = load_data(DataArguments(**{**vars(data_args), "objective": "masked"}), seed=99).validation
    total = count = 0
    for item in (held_out[i] for i in range(len(held_out))):
        logits = model(item["input_ids"][None]).logits[0]
        total += F.cross_entropy(logits, item["labels"], reduction="sum").item()
        count += int((item["labels"] != -100).sum())
    assert results.eval_loss == pytest.approx(total / count, rel=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").mask_token == "<|mask|>"


def test_an_image_classifier_is_judged_by_its_accuracy(arguments, tmp_path):
    model_args, data_args, args = arguments("vit", max_steps=40)
    results = train(model_args, data_args, args)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run").double()
    held_out = load_data(DataArguments(**{**vars(data_args), "objective": "image"})).validation
    items = [held_out[i] for i in range(len(held_out))]
    logits = model(torch.stack([item["pixel_values"] for item in items]).double()).logits
    labels = torch.stack([item["labels"] for item in items])
    assert results.eval_accuracy == results.score == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    assert results.eval_loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert results.tokens == 40 * 4 * 17  # 4 x 4 patches and the class token
    assert "use_cache" not in model.config.to_dict()
    assert model.config.id2label[3] == "3"


def test_a_sequence_to_sequence_model_logs_its_parts_apart_and_learns_pairs(arguments, tmp_path):
    (tmp_path / "code").mkdir()
    for i in range(30):
        (tmp_path / "code" / f"{i}.py").write_text(f'def name_{i}():\n    """Says {i}, {"so " * (i % 7)}and goes."""\n')
    text = {"data": str(tmp_path / "code"), "vocab_size": 300, "context_length": 32, "objective": "pairs"}
    model_args, data_args, args = arguments(
        "t5", "run", text | {"validation_fraction": 0.3}, per_device_eval_batch_size=3
    )
    results = train(model_args, data_args, args)
    sampled = next(entry for entry in read_log(tmp_path / "run") if "entropy/mean" in entry)
    places = {name.removeprefix("entropy/") for name in sampled if re.fullmatch(r"entropy/\w+/layer_\d\d", name)}
    assert places == {"encoder/layer_00", "encoder/layer_01", "decoder/layer_00", "cross/layer_00"}
    assert {f"residual_rms/{place}" for place in places - {"cross/layer_00"}} <= set(sampled)
    assert {f"entropy/overloaded/{part}" for part in ("encoder", "decoder", "cross")} <= set(sampled)

    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run").double()
    held_out = load_data(data_args).validation
    total = count = 0
    for item in (held_out[i] for i in range(len(held_out))):
        logits = model(item["input_ids"][None], labels=item["labels"][None]).logits[0]
        total += F.cross_entropy(logits, item["labels"], reduction="sum").item()
        count += len(item["labels"])
    assert results.eval_loss == pytest.approx(total / count, rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert model.generate(held_out[0]["input_ids"][None], max_new_tokens=4)[0, 0] == tokenizer.pad_token_id


def test_a_whisper_learns_what_is_said(arguments, tmp_path, cache_dir):
    speak(tmp_path / "said", [f"{a}{b}" for a in "abcdef" for b in "klmno"])
    speech = {"data": str(tmp_path / "said"), "vocab_size": 300, "validation_fraction": 0.3, "audio_seconds": 1}
    results = train(*arguments("whisper", data=speech, max_steps=6, per_device_eval_batch_size=3))
    assert (results.objective, results.steps) == ("speech", 6)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "run").double()
    held_out = load_data(DataArguments(**speech, objective="speech", cache_dir=cache_dir)).validation
    total = count = 0
    for item in (held_out[i] for i in range(len(held_out))):
        logits = model(item["input_features"][None].double(), labels=item["labels"][None]).logits[0]
        total += F.cross_entropy(logits, item["labels"], reduction="sum").item()
        count += len(item["labels"])
    assert results.eval_loss == pytest.approx(total / count, rel=1e-5)
    assert EntropyReport.load(tmp_path / "run" / "entropy.json").part_names.count("cross") == 1
    again = train(
        ModelArguments(model_name_or_path=str(tmp_path / "run")),
        *arguments("whisper", "again", speech, max_steps=2)[1:],
    )
    assert again.objective == "speech"


def test_a_classifier_goes_on_with_other_classes(arguments, tmp_path, cache_dir):
    model_args, data_args, args = arguments("vit", "first", max_steps=2)
    train(model_args, data_args, args)
    pictures(tmp_path / "two", sizes=((8, 8),))
    images = {"data": str(tmp_path / "two"), "validation_fraction": 0.3}
    _, data_args, args = arguments("vit", "second", images, max_steps=2)
    results = train(ModelArguments(model_name_or_path=str(tmp_path / "first")), data_args, args)
    assert results.objective == "image"
    assert results.model["id2label"] == {0: "cat", 1: "dog"}


@pytest.mark.parametrize("family", KINDS)
def test_two_processes_judge_every_example_once(arguments, family, tmp_path, corpus, cache_dir):
    model_args, data_args, _ = arguments(family)
    command = ["-m", "hf_lnfree.cli.main", "train", "--family", family, "--row", "SM+R", "--out", str(tmp_path / "two")]
    command += ["--config-overrides", model_args.config_overrides, "--cache-dir", cache_dir, "--data", data_args.data]
    command += ["--max-steps", "12", "--per-device-train-batch-size", "4", "--learning-rate", "1e-2", "--seed", "3"]
    command += [
        "--logging-steps",
        "2",
        "--probe-steps",
        "4",
        "--save-steps",
        "50",
        "--device",
        "cpu",
        "--disable-tqdm",
        "true",
    ]
    command += (
        ["--max-documents", "100", "--validation-fraction", "0.2"]
        if family == "vit"
        else ["--vocab-size", "300", "--context-length", "32"]
    )
    done = run_in_two(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    both = RunResults.load(tmp_path / "two")
    kind, name = KINDS[family]
    model = kind.from_pretrained(tmp_path / "two").eval()
    held_out = load_data(DataArguments(**{**vars(data_args), "objective": both.objective})).validation
    items = held_out.__getitems__(list(range(len(held_out))))
    inputs, labels = (torch.stack([item[key] for item in items]) for key in (name, "labels"))
    assert len(labels) % 8  # so that the last batch is filled up
    with torch.no_grad():
        logits = model(inputs, **({"labels": labels} if family == "t5" else {})).logits
    assert both.eval_loss == pytest.approx(F.cross_entropy(logits.mT if logits.dim() > 2 else logits, labels).item())
    if family == "vit":
        assert both.eval_accuracy == pytest.approx((logits.argmax(-1) == labels).double().mean().item())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"family": "t5", "objective": "masked"}, "not for family 't5', which is trained for 'span' or 'pairs'"),
        ({"family": "bert", "objective": "causal"}, "not for family 'bert', which is trained for 'masked'"),
        ({"family": "vit"}, "objective='image' needs images, and data='stdlib' is none. Give 'digits'"),
        (
            {"family": "whisper"},
            "objective='speech' needs recordings, and data='stdlib' is none. Give a folder or a Hub",
        ),
        ({"data": "digits"}, "objective='causal' needs text, and data='digits' is none"),
        ({"family": "bert", "loss": "chunked"}, None),
        ({"family": "vit", "data": "digits"}, "image_size=8 must be a multiple of patch_size=16"),
        ({"family": "vit", "data": "digits", "vocab_size": 300}, "vocab_size=300 has no effect"),
        ({"family": "vit", "data": "digits", "packing": "packed"}, "packing='packed' has no effect"),
        ({"image_size": 32}, "image_size=32 has no effect: it needs objective 'image'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(fields, message, tmp_path):
    overrides = {"config_overrides": {"patch_size": 2}} if "vocab_size" in fields or "packing" in fields else {}
    values = {**fields, **overrides}
    if message is None:
        arguments = parse_settings(values, "", ["--out", str(tmp_path / "run"), "--device", "cpu"], given=values)
        with pytest.raises(
            SettingsError, match="loss='chunked' is for the next token: objective 'masked' needs 'plain'"
        ):
            train(*arguments)
    else:
        with pytest.raises(SettingsError, match=message):
            parse_settings(values, "", ["--out", str(tmp_path / "run")], given=values)
    assert os.listdir(tmp_path) == []


def test_a_study_of_classifiers_compares_accuracies(tmp_path, cache_dir, capsys):
    (tmp_path / "vit.yaml").write_text(
        "title: V\nfamily: vit\ndata: digits\nmax_documents: 200\nvalidation_fraction: 0.3\nmax_steps: 30\n"
        "per_device_train_batch_size: 8\nlearning_rate: 5.0e-3\nprobe_steps: 15\nattention_report_windows: 8\n"
        f"config_overrides: {TINY | {'patch_size': 1}}\nseeds: [0, 1]\ncompare: [[SM+R, SM+G]]\n"
        "rows: {SM+G: {row: SM+G}, SM+R: {row: SM+R}}\n"
    )
    out = tmp_path / "out"
    command = ["study", str(tmp_path / "vit.yaml"), "--out", str(out), "--jobs", "1", "--device", "cpu"]
    assert main([*command, "--cache-dir", cache_dir]) == 0
    table, page = (out / "table.md").read_text(), (out / "report.html").read_text()
    assert "| accuracy |" in table
    assert "perplexity" not in table
    assert "nats (bidirectional, T=65)" in table
    assert "s accuracy is" in page
    report = EntropyReport.load(out / "SM+R" / "seed-0" / "entropy.json")
    assert "class token" in report.table()


def test_the_entropy_command_takes_models_of_images_and_of_speech(arguments, tmp_path, cache_dir, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", cache_dir)
    train(*arguments("vit", "seen", max_steps=2))
    assert main(["entropy", str(tmp_path / "seen"), "--data", "digits", "--device", "cpu"]) == 0
    assert "class token" in capsys.readouterr().out
    assert main(["entropy", str(tmp_path / "seen"), "--device", "cpu"]) == 1
    assert "reads images: give --data digits" in capsys.readouterr().err
    speak(tmp_path / "said", [f"{a}{b}" for a in "abcdefgh" for b in "klmnopqrst"])
    speech = {"data": str(tmp_path / "said"), "vocab_size": 300, "audio_seconds": 1}
    train(*arguments("whisper", "heard", speech, max_steps=2))
    assert main(["entropy", str(tmp_path / "heard"), "--data", str(tmp_path / "said"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "encoder_attn: heads by quarter of 3.91 nats (cross)" in printed  # ln 50
    assert main(["geometry", str(tmp_path / "heard"), "--data", str(tmp_path / "said"), "--device", "cpu"]) == 0
    assert "encoder" in capsys.readouterr().out
    assert main(["entropy", str(tmp_path / "heard"), "--data", "digits", "--device", "cpu"]) == 1
    assert "reads speech" in capsys.readouterr().err
