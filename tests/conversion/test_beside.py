"""What goes with the weights of a converted checkpoint: a tokenizer that is its own, and the code of one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from hf_lnfree.conversion import convert
from hf_lnfree.conversion.beside import require_tokenizer_fits
from hf_lnfree.data.tokenization import train_bpe
from hf_lnfree.errors import ModelError

CODE = """
from transformers import PreTrainedTokenizerFast
from .words import MARK

class OwnTokenizer(PreTrainedTokenizerFast):
    mark = MARK
"""


@pytest.fixture
def source(family, tmp_path):
    folder = tmp_path / "stock"
    family.stock_model(vocab_size=300).save_pretrained(folder)
    train_bpe(["some text of a few words, and a few words more"] * 4, 300).save_pretrained(folder)
    return folder


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_code(source, module):
    (source / f"{module}.py").write_text(CODE)
    (source / "words.py").write_text("MARK = 'of its own'\n")
    change(source / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, f"{module}.OwnTokenizer"]})


def test_the_code_of_a_tokenizer_comes_along(source, tmp_path):
    with_code(source, "own_tokenizer")
    ours, folded = tmp_path / "ours", tmp_path / "folded"
    convert(str(source), ours, check=False)
    convert(str(ours), folded, to="folded", check=False)
    for out in (ours, folded):
        tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
        assert (type(tokenizer).__name__, tokenizer.mark) == ("OwnTokenizer", "of its own")


def test_code_that_would_take_the_place_of_the_models_is_refused(source, tmp_path):
    with_code(source, "normfree")
    with pytest.raises(ModelError, match=r"normfree\.py has the name of a file"):
        convert(str(source), tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_code_of_a_tokenizer_that_is_not_there_is_named(source, tmp_path):
    change(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["gone.Slow", None]})
    with pytest.raises(ModelError, match=r"code of its own in gone\.py, which is not there"):
        convert(str(source), tmp_path / "out", check=False)
    change(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["me/other--gone.Slow", None]})
    convert(str(source), tmp_path / "out", check=False)  # it is in another repository


@pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.json"])
def test_the_tokenizer_of_another_model_is_refused(source, tmp_path, layout):
    other = train_bpe([f"{i} some other text with more words {i * i}" for i in range(400)], 500)
    other.save_pretrained(source)
    vocab = other.get_vocab()
    assert max(vocab.values()) > 299
    if layout == "vocab.json":
        (source / "tokenizer.json").unlink()
        (source / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(ModelError, match=rf"ids up to {max(vocab.values())}, and the model a vocabulary of 300"):
        convert(str(source), tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_an_added_token_without_an_embedding_is_told_of(source, tmp_path):
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    state = json.loads((source / "tokenizer.json").read_text())
    mark = {**state["added_tokens"][0], "content": "<extra>", "id": size}
    change(source / "tokenizer.json", added_tokens=[*state["added_tokens"], mark])
    report = convert(str(source), tmp_path / "out", check=False)
    assert f"beyond the model's vocabulary of {size}: <extra>." in " ".join(report["notes"])
    change(source / "tokenizer.json", added_tokens=state["added_tokens"])
    assert require_tokenizer_fits(source, size) == []


def test_a_damaged_tokenizer_is_named(source, tmp_path):
    for text in ("{", "[]"):
        for name in ("tokenizer.json", "vocab.json", "added_tokens.json"):
            kept = (source / name).read_text() if (source / name).exists() else None
            (source / name).write_text(text)
            with pytest.raises(ModelError, match=rf"{name} is damaged"):
                convert(str(source), tmp_path / "out", check=False)
            (source / name).unlink() if kept is None else (source / name).write_text(kept)


@pytest.mark.parametrize("to", ["lnfree", "folded"])
def test_weights_that_are_no_floating_point_numbers_are_refused(source, tmp_path, to):
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight"))
    save_file(tensors | {name: tensors[name].to(torch.int64)}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} is stored as torch\.int64"):
        convert(str(source), tmp_path / "out", to=to, check=False)
