"""Corpora, tokenizers and windows: what is cut, what is cached, what is refused."""

import datasets
import numpy as np
import pytest
import torch

from hf_lnfree.training.corpus import Corpus, load_corpus, split_by_hash
from hf_lnfree.training.data import DataArguments, TokenWindows, build_windows, cut, load_data
from hf_lnfree.training.tokenization import train_bpe


@pytest.fixture
def arguments(corpus, cache_dir):
    return DataArguments(dataset=str(corpus), cache_dir=cache_dir, vocab_size=300, context_length=16)


def test_exact_windows_stay_within_a_document_and_drop_the_tail():
    pieces = list(cut([[1] * 7, [2] * 3, [3] * 8], 4, "exact", 0))
    assert [(len(ids), whole) for ids, whole in pieces] == [(4, True), (3, False), (3, False), (4, True), (4, True)]
    assert all(len(set(ids)) == 1 for ids, _ in pieces)


def test_packed_windows_join_documents_and_drop_the_last_tail_only():
    pieces = list(cut([[1] * 7, [2] * 3, [3] * 8], 4, "packed", 0))
    assert [token for ids, _ in pieces for token in ids] == [1] * 7 + [0] + [2] * 3 + [0] + [3] * 8 + [0]
    assert [whole for _, whole in pieces] == [True] * 5 + [False]
    with pytest.raises(ValueError, match="end-of-text token, and this tokenizer has none"):
        list(cut([[1]], 4, "packed", None))


def test_windows_decode_to_the_documents(arguments, corpus):
    data = load_data(arguments)
    texts = {path.read_text() for path in corpus.iterdir()}
    for item in (data.train[0], data.validation[0]):
        assert item["input_ids"].shape == (16,)
        assert torch.equal(item["input_ids"], item["labels"])
        assert any(data.tokenizer.decode(item["input_ids"]) in text for text in texts)
    assert data.train.meta["documents"] + data.validation.meta["documents"] == 40
    assert len(data.tokenizer) == 300
    assert data.train.tokens.dtype == np.uint16


def test_split_follows_the_hash_of_each_file():
    texts = [f"document {i}" for i in range(400)]
    train, validation = split_by_hash(Corpus("c", texts), 0.2)
    again, _ = split_by_hash(Corpus("c", texts[::-1] + texts[:50]), 0.2)
    assert set(again.texts) == set(train.texts)
    assert len(validation.texts) == pytest.approx(80, abs=25)
    assert sorted(train.texts + validation.texts) == sorted(texts)


def test_cache_is_found_by_content(arguments, corpus, tmp_path, monkeypatch):
    first = load_data(arguments)

    def forbidden(*_, **__):
        raise AssertionError("tokenised again")

    monkeypatch.setattr("hf_lnfree.training.data._tokenised", forbidden)
    assert load_data(arguments).train.sha256 == first.train.sha256
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for path in corpus.iterdir():
        (copy / path.name).write_text(path.read_text())
    arguments.dataset = str(copy)
    assert load_data(arguments).train.sha256 == first.train.sha256
    (copy / "module_00.py").write_text("changed = True\n" * 100)
    with pytest.raises(AssertionError, match="tokenised again"):
        load_data(arguments)


def test_interrupted_tokenising_leaves_nothing_behind(corpus, tmp_path, monkeypatch):
    tokenizer = train_bpe(["a b c"], 300)

    def interrupted(*_):
        yield [1] * 16
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_lnfree.training.data._tokenised", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_windows(load_corpus(str(corpus)), tokenizer, 16, "exact", tmp_path, "train")
    assert list((tmp_path / "windows").iterdir()) == []


def test_tokenizer_by_folder_and_validation_dataset(arguments, corpus, tmp_path):
    train_bpe(["def return import"] * 3, 300).save_pretrained(tmp_path)
    arguments.tokenizer, arguments.validation_dataset = str(tmp_path), str(corpus / "module_01.py")
    data = load_data(arguments)
    assert len(data.tokenizer) < 300
    assert (data.train.meta["documents"], data.validation.meta["documents"]) == (40, 1)


def test_embedded_corpus_is_the_standard_library():
    corpus = load_corpus("stdlib")
    assert sum(map(len, corpus.texts)) > 5_000_000
    assert not any("class TestCase(unittest" in text for text in corpus.texts[:50])


def test_undecodable_files_are_left_out_and_named(tmp_path):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "bad.py").write_bytes(b"\xff\xfe\x00latin")
    with pytest.warns(UserWarning, match=r"1 of 2 files .* not UTF-8 .*bad\.py"):
        assert load_corpus(str(tmp_path)).texts == ["x = 1\n"]


@pytest.mark.parametrize("content", [None, "", "  \n "])
def test_empty_corpus_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "empty.py").write_text(content)
    with pytest.raises(ValueError, match="is empty"):
        load_corpus(str(tmp_path))


def test_corpus_shorter_than_one_window_is_an_error(tmp_path, cache_dir):
    for i in range(30):
        (tmp_path / f"{i}.py").write_text(f"x = {i}\n")
    arguments = DataArguments(
        dataset=str(tmp_path), cache_dir=cache_dir, vocab_size=300, context_length=128, validation_fraction=0.4
    )
    with pytest.raises(ValueError, match=r"no window of 128 tokens .*--windows packed"):
        load_data(arguments)


def test_one_document_cannot_be_split(tmp_path):
    (tmp_path / "one.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"split of .* is empty: 1 documents"):
        split_by_hash(load_corpus(str(tmp_path)), 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"windows": "sliding"}, "'exact', 'packed'"),
        ({"context_length": 1}, "at least 2"),
        ({"validation_fraction": 1.5}, "between 0 and 1"),
    ],
)
def test_wrong_data_arguments(fields, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**fields)


def test_unknown_dataset_says_what_it_could_be():
    with pytest.raises(ValueError, match=r"neither 'stdlib' nor a path .* cannot be reached"):
        load_corpus("somebody/nothing-here")


def test_hub_datasets_by_name(monkeypatch):
    """CodeParrot's short name, its split, its text column; documents are shuffled before the first N are taken."""
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"path": ["p"] * 50, "content": [f"document {i}" for i in range(50)]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    plain = load_corpus("codeparrot-ds-train", max_files=10)
    shuffled = load_corpus("codeparrot-ds-valid:validation", max_files=10, shuffle_seed=0)
    assert asked == [
        ("huggingface-course/codeparrot-ds-train", "train"),
        ("huggingface-course/codeparrot-ds-valid", "validation"),
    ]
    assert plain.texts == [f"document {i}" for i in range(10)]
    assert len(shuffled.texts) == 10
    assert shuffled.texts != plain.texts
    assert load_corpus("codeparrot-ds-train", text_column="path").texts == ["p"] * 50
    with pytest.raises(ValueError, match=r"no text column body; its columns are \['path', 'content'\]"):
        load_corpus("codeparrot-ds-train", text_column="body")


def test_windows_are_memory_mapped(arguments):
    data = load_data(arguments)
    assert isinstance(data.train, TokenWindows)
    assert isinstance(data.train.tokens, np.memmap)
    assert data.train.num_tokens == len(data.train) * 16


def test_limited_validation_is_spread_over_the_files(arguments):
    whole = load_data(arguments).validation
    arguments.max_validation_windows = 4
    few = load_data(arguments).validation
    assert len(few) == 4
    step = len(whole) // 4
    assert all(torch.equal(few[i]["input_ids"], whole[i * step]["input_ids"]) for i in range(4))
