"""`hf-lnfree geometry` on models of text and images, end to end at a tiny size."""

import json

import pytest
import torch
import transformers as tf

from hf_lnfree import GeometryReport
from hf_lnfree.cli.main import main
from hf_lnfree.data.tokenization import train_bpe
from tests.conftest import SIZES

DATA = ["--context-length", "16", "--max-windows", "24", "--device", "cpu", "--groups", "3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_bpe(["import os\n\ndef f(x):\n    return x + 1  # one\n"] * 3, 300)
    sizes = {**SIZES, "vocab_size": 300}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    built = {
        "gelu": tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, n_inner=48, **tokens)),
        "relu": tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, n_inner=48, activation_function="relu", **tokens)),
        "t5": tf.T5ForConditionalGeneration(
            tf.T5Config(
                vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
            )
        ),
    }
    for name, model in built.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def documents(tmp_path):
    folder = tmp_path / "documents.jsonl"
    texts = [f"import m{i}\n\n\ndef f{i}(a, b):\n    return a + {i} * b  # sum\n\n\n" * 2 for i in range(12)]
    folder.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def test_two_models_are_measured_and_compared(models, documents, tmp_path, capsys):
    out = tmp_path / "out"
    names = [str(models / name) for name in ("gelu", "relu")]
    options = ["--data", str(documents), *DATA, "--classes", "token_kind,next_token", "--out", str(out)]
    assert main(["geometry", *names, *options]) == 0
    said = capsys.readouterr().out
    assert "gelu: 12 documents, values ± standard errors over 3 groups of them" in said
    assert "By token_kind" in said
    assert "relu against gelu" in said
    assert "paired by document" in said
    written = {path.name for path in out.iterdir()}
    pictures = ("spectra", "spectra-by-layer", "firing", "frequencies", "classes-token_kind", "classes-next_token")
    assert {f"{name}.{suffix}" for name in pictures for suffix in ("svg", "png")} | {"report.html"} <= written
    report = GeometryReport.load(out / "geometry-relu.json")
    assert report.rows.tolist() == [24 * 16] * 3
    assert report.metadata["data"] == str(documents)
    page = (out / "report.html").read_text()
    assert "Geometry of features" in page
    assert "What moved" in page
    assert main(["geometry", names[0], *options]) == 0  # a folder of its own is written again
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    assert main(["geometry", names[0], "--data", str(documents), "--out", str(tmp_path / "other")]) == 1
    assert "holds no geometry report" in capsys.readouterr().err


def test_an_encoder_and_its_decoder_are_measured_apart(models, documents, capsys):
    assert main(["geometry", str(models / "t5"), "--data", str(documents), *DATA, "--only", "encoder"]) == 0
    said = capsys.readouterr().out
    assert "layer_01" in said
    assert main(["geometry", str(models / "t5"), "--data", str(documents), *DATA]) == 0
    assert "decoder/layer_01" in capsys.readouterr().out


def test_images_are_told_apart_by_label(tmp_path, cache_dir, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    config = tf.ViTConfig(**sizes, intermediate_size=48, image_size=8, patch_size=4, num_channels=1, num_labels=10)
    torch.manual_seed(0)
    tf.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    assert main(["geometry", str(tmp_path / "vit"), "--data", "digits", "--max-windows", "60", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "60 documents" in said
    assert "By label" in said
    assert main(["geometry", str(tmp_path / "vit"), "--data", "stdlib"]) == 1
    assert "reads images" in capsys.readouterr().err


def test_what_is_wrong_is_told(models, documents, capsys):
    options = [str(models / "gelu"), "--data", str(documents), *DATA]
    assert main(["geometry", *options, "--classes", "label"]) == 1
    assert "classes='label' needs a column 'labels'" in capsys.readouterr().err
    assert main(["geometry", *options, "--only", "nothing"]) == 1
    assert "no MLP has the name" in capsys.readouterr().err
