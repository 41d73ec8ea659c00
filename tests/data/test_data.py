"""Corpora, tokenizers and windows: what is cut, what is cached, what is refused."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from datasets import Audio, ClassLabel, Dataset, Features, Value
from PIL import Image
from transformers import default_data_collator

from hf_lnfree.data.arguments import DataArguments
from hf_lnfree.data.building import Cutter, build_windows
from hf_lnfree.data.corpus import Corpus, load_corpus, split_by_hash
from hf_lnfree.data.encoding import Piece
from hf_lnfree.data.splits import load_data
from hf_lnfree.data.tokenization import train_bpe
from hf_lnfree.data.windows import TokenWindows, window_batches
from hf_lnfree.errors import DataError, SettingsError
from tests.hub import Hub


@pytest.fixture
def arguments(corpus, cache_dir):
    return DataArguments(data=str(corpus), cache_dir=cache_dir, vocab_size=300, context_length=16)


def documents():
    return [np.array(ids, dtype=np.uint16) for ids in ([1] * 7, [2] * 3, [3] * 8)]


def test_exact_windows_stay_within_a_document_and_drop_the_tail():
    cut = Cutter(4, "exact", 0)
    pieces = [(cut(ids).tolist(), cut.dropped) for ids in documents()]
    assert [windows for windows, _ in pieces] == [[[1] * 4], [], [[3] * 4, [3] * 4]]
    assert [dropped for _, dropped in pieces] == [3, 3 + 3, 3 + 3]


def test_packed_windows_join_documents_and_drop_the_last_tail_only():
    cut = Cutter(4, "packed", 0)
    windows = [cut(ids) for ids in documents()]
    tokens = [1] * 7 + [0] + [2] * 3 + [0] + [3] * 8 + [0]
    assert np.concatenate(windows).flatten().tolist() == tokens[:20]
    assert (len(cut.rest), cut.dropped) == (1, 0)
    with pytest.raises(ValueError, match="end-of-text token, and this tokenizer has none"):
        Cutter(4, "packed", None)


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
    train, validation = split_by_hash(Corpus.from_texts("c", texts), 0.2)
    again, _ = split_by_hash(Corpus.from_texts("c", texts[::-1] + texts[:50]), 0.2)
    assert set(again.texts) == set(train.texts)
    assert len(list(validation.texts)) == pytest.approx(80, abs=25)
    assert sorted([*train.texts, *validation.texts]) == sorted(texts)


def test_a_document_is_held_out_of_few():
    texts = [f"document {i}" for i in range(4)]
    train, validation = split_by_hash(Corpus.from_texts("c", texts), 0.001)
    assert len(list(validation.texts)) == 1
    assert sorted([*train.texts, *validation.texts]) == texts
    again, _ = split_by_hash(Corpus.from_texts("c", texts[::-1]), 0.001)
    assert set(again.texts) == set(train.texts)


def test_cache_is_found_by_content(arguments, corpus, tmp_path, monkeypatch):
    first = load_data(arguments)

    def forbidden(*_, **__):
        raise AssertionError("tokenised again")

    monkeypatch.setattr("hf_lnfree.data.building.tokenised", forbidden)
    assert load_data(arguments).train.sha256 == first.train.sha256
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for path in corpus.iterdir():
        (copy / path.name).write_text(path.read_text())
    arguments.data = str(copy)
    assert load_data(arguments).train.sha256 == first.train.sha256
    (copy / "module_00.py").write_text("changed = True\n" * 100)
    with pytest.raises(AssertionError, match="tokenised again"):
        load_data(arguments)


def test_interrupted_tokenising_leaves_nothing_behind(arguments, corpus, tmp_path, monkeypatch):
    tokenizer = train_bpe(["a b c"], 300)

    def interrupted(*_):
        yield Piece(1, [bytes(32)], [np.ones(16, np.uint16)])
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_lnfree.data.building.tokenised", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_windows(load_corpus(str(corpus)), tokenizer, replace(arguments, cache_dir=str(tmp_path)), "train")
    assert list((tmp_path / "windows").iterdir()) == []


def test_tokenizer_by_folder_and_validation_data(arguments, corpus, tmp_path):
    train_bpe(["def return import"] * 3, 300).save_pretrained(tmp_path)
    arguments.tokenizer, arguments.validation_data = str(tmp_path), str(corpus / "module_01.py")
    data = load_data(arguments)
    assert len(data.tokenizer) < 300
    assert (data.train.meta["documents"], data.validation.meta["documents"]) == (40, 1)


def test_embedded_corpus_is_the_standard_library():
    corpus = load_corpus("stdlib")
    assert sum(map(len, corpus.texts)) > 5_000_000
    assert not any("class TestCase(unittest" in text for text in islice(corpus.texts, 50))


def test_undecodable_files_are_left_out_and_named(tmp_path):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "bad.py").write_bytes(b"\xff\xfe\x00latin")
    with pytest.warns(UserWarning, match=r"1 of 2 files .* not UTF-8 .*bad\.py"):
        assert list(load_corpus(str(tmp_path)).texts) == ["x = 1\n"]


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
        data=str(tmp_path), cache_dir=cache_dir, vocab_size=300, context_length=128, validation_fraction=0.4
    )
    with pytest.raises(ValueError, match=r"no window of 128 tokens .*packing=packed"):
        load_data(arguments)


def test_one_document_cannot_be_split(tmp_path):
    (tmp_path / "one.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"train split of .* is empty: 1 documents.*validation_data"):
        split_by_hash(load_corpus(str(tmp_path)), 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"packing": "sliding"}, "'exact', 'packed'"),
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


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning", "ignore:This process:DeprecationWarning")
def test_two_processes_tokenise_as_one_does(arguments, tmp_path):
    one = load_data(arguments)
    two = load_data(replace(arguments, cache_dir=str(tmp_path), tokenizing_processes=2))
    assert one.train.meta == two.train.meta
    assert np.array_equal(one.train.tokens, two.train.tokens)
    folder = next((tmp_path / "windows").iterdir())
    assert sorted(p.name for p in folder.iterdir()) == ["meta.json", "tokens.bin"]


def test_meta_describes_the_file_and_the_documents(arguments, corpus):
    train = load_data(arguments).train
    texts, _ = split_by_hash(load_corpus(str(corpus)), arguments.validation_fraction)
    digest = hashlib.sha256(b"".join(hashlib.sha256(t.encode()).digest() for t in texts.texts)).hexdigest()
    assert train.meta["corpus_sha256"] == digest
    assert train.sha256 == hashlib.sha256(np.asarray(train.tokens).tobytes()).hexdigest()


@pytest.mark.parametrize("damage", ["a flipped bit", "a lost end", "no meta.json", "half a meta.json"])
def test_a_damaged_token_cache_is_an_error_and_is_made_anew_after_removal(arguments, tmp_path, damage):
    arguments.cache_dir = str(tmp_path)
    whole = load_data(arguments).train
    folders = list((tmp_path / "windows").iterdir())
    for folder in folders:
        tokens, meta = folder / "tokens.bin", folder / "meta.json"
        content = bytearray(tokens.read_bytes())
        if damage == "a flipped bit":
            content[len(content) // 2] ^= 1
            tokens.write_bytes(content)
        elif damage == "a lost end":
            tokens.write_bytes(content[:-2])
        elif damage == "no meta.json":
            meta.unlink()
        else:
            meta.write_text(meta.read_text()[:20])
    with pytest.raises(ValueError, match=r"tokens cached in .*windows.* are damaged: .* Remove that folder"):
        load_data(arguments)
    for folder in folders:
        shutil.rmtree(folder)
    assert load_data(arguments).train.sha256 == whole.sha256


def test_a_batch_is_read_at_once(arguments):
    train = load_data(arguments).train
    batch = train.__getitems__([5, 0, 5])
    assert [torch.equal(item["input_ids"], train[i]["labels"]) for i, item in zip((5, 0, 5), batch, strict=True)]
    loader = torch.utils.data.DataLoader(train, batch_size=4, collate_fn=default_data_collator)
    assert next(iter(loader))["input_ids"].shape == (4, 16)


HUB_CLIENT = """
import json, sys
from itertools import islice
from pathlib import Path
from hf_lnfree.data import tables
from hf_lnfree.data import DataArguments, load_data
from hf_lnfree.data.corpus import load_corpus
from hf_lnfree.data.speech import of_hub
from hf_lnfree.errors import DataError

def texts(*arguments, **options):
    corpus = load_corpus(*arguments, **options)
    return [corpus.key, list(corpus.texts)]

kept = Path(sys.argv[1])
found = {
    "first": texts("codeparrot-ds-train", 10),
    "shuffled": texts("codeparrot-ds-train", 10, 0),
    "again": texts("codeparrot-ds-train", 10, 0),
    "validation": texts("codeparrot-ds-valid:train", None),
    "streamed": texts("codeparrot-ds-train", 10, None, streaming_cache=kept),
    "streamed, shuffled": texts("codeparrot-ds-train", 10, 0, streaming_cache=kept),
    "streamed again": texts("codeparrot-ds-train", 10, 0, streaming_cache=kept),
    "column": texts("codeparrot-ds-train", 2, text_column="path"),
}
tables.PART, whole, read = 4, tables.tqdm, []

def cut_off(stream, **options):
    yield from islice(stream, 10)
    raise KeyboardInterrupt

def counted(stream, **options):
    read.append(options["initial"])
    return stream

for tables.tqdm in (cut_off, counted):
    try:
        found["streamed after an interruption"] = texts("codeparrot-ds-train", 15, 0, streaming_cache=kept)
    except KeyboardInterrupt:
        pass
found["read"] = read
tables.tqdm = whole
for name, options in (("somebody/nothing-here", {}), ("codeparrot-ds-train", {"text_column": "body"})):
    try:
        texts(name, **options)
    except ValueError as error:
        found[name] = str(error)

images = load_data(DataArguments("somebody/images", objective="image", validation_fraction=0.3, cache_dir=sys.argv[2]))
pairs = [[item["pixel_values"], item["labels"]] for part in (images.train, images.validation) for item in part]
found["images"] = [[int((127.5 * pixels[:, 0, 0] + 127.5).round()[0]), int(label)] for pixels, label in pairs]
found["shape"], found["names"] = list(pairs[0][0].shape), images.fields["id2label"]
found["held out"] = len(images.validation)
try:
    found["sounds"] = [len(sound.samples) for sound in of_hub("somebody/sounds", None)]
except DataError as error:
    found["sounds"] = str(error)
print(json.dumps(found))
"""


def test_hub_datasets_downloaded_and_streamed(tmp_path):
    """CodeParrot's short name, splits, shuffling before the first N, the text column, one file kept of a stream."""
    for name, count in (("train", 60), ("valid", 5)):
        folder = tmp_path / "hub" / "huggingface-course" / f"codeparrot-ds-{name}"
        folder.mkdir(parents=True)
        for shard in range(2):
            rows = [{"path": "p", "content": f"document {i}"} for i in range(shard, count, 2)]
            (folder / f"ds_{shard}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    somebody = tmp_path / "hub" / "somebody"
    picture = np.random.default_rng(0).integers(0, 255, (12, 6, 5, 3), dtype=np.uint8)
    rows = {"picture": list(map(Image.fromarray, picture)), "insect": [i % 3 % 2 for i in range(12)]}
    features = Features(picture=datasets.Image(), insect=ClassLabel(names=["bee", "ant"]))
    sounds = {"audio": [{"bytes": b"RIFF", "path": "one.wav"}], "text": ["one"]}
    for name, columns, kinds in (
        ("images", rows, features),
        ("sounds", sounds, Features(audio=Audio(), text=Value("string"))),
    ):
        (somebody / name).mkdir(parents=True)
        Dataset.from_dict(columns).cast(kinds).to_parquet(somebody / name / "train-00000-of-00001.parquet")
    hub = Hub(tmp_path / "hub")
    environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", HUB_CLIENT, str(tmp_path / "kept"), str(tmp_path / "cache")]
    client = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert client.returncode == 0, client.stderr[-2000:]
    found = json.loads(client.stdout.splitlines()[-1])
    documents = {f"document {i}" for i in range(60)}
    assert found["first"][1] == [f"document {i}" for i in range(0, 20, 2)]
    for shuffled in (found["shuffled"], found["streamed, shuffled"]):
        assert len(set(shuffled[1])) == 10
        assert set(shuffled[1]) < documents
        assert shuffled[1] != found["first"][1]
    assert found["again"] == found["shuffled"]
    assert found["streamed again"] == found["streamed, shuffled"]
    assert found["streamed"][1] == found["first"][1]
    assert len(found["validation"][1]) == 5
    assert found["column"][1] == ["p", "p"]
    keys = [key for name, (key, _) in list(found.items())[:8] if "again" not in name]
    assert len(set(keys)) == len(keys)
    assert found["streamed after an interruption"][1][:10] == found["streamed, shuffled"][1]
    assert len(set(found["streamed after an interruption"][1])) == 15
    assert found["read"] == [8]
    assert len(list((tmp_path / "kept").iterdir())) == 3
    assert not list((tmp_path / "streaming").iterdir())
    labels = [1 - label for label in rows["insect"]]  # labels are numbered by name, here and not there
    assert {tuple(pair) for pair in found["images"]} == set(zip(picture[:, 0, 0, 0].tolist(), labels, strict=True))
    assert (found["shape"], found["names"]) == ([3, 6, 5], {"0": "ant", "1": "bee"})
    assert 0 < found["held out"] < 12
    assert "its sound cannot be decoded" in found["sounds"]
    assert "torchcodec" in found["sounds"]
    assert "the Hub has no such dataset" in found["somebody/nothing-here"]
    assert "no text column body; its columns are ['path', 'content']" in found["codeparrot-ds-train"]


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
    assert all(torch.equal(few[i]["input_ids"], whole[i * len(whole) // 4]["input_ids"]) for i in range(4))


def test_held_out_windows_are_spread_evenly(arguments, tmp_path):
    data = load_data(arguments)
    windows = len(data.train)
    for limit in (1, 3, windows - 1, windows, windows + 5):
        some = TokenWindows(arguments_folder(data, arguments), limit)
        wanted = [i * windows // limit for i in range(limit)] if limit < windows else range(windows)
        assert [some[i]["input_ids"].tolist() for i in range(len(some))] == [
            data.train[i]["input_ids"].tolist() for i in wanted
        ]


def arguments_folder(data, arguments):
    corpus, _ = split_by_hash(load_corpus(arguments.data), arguments.validation_fraction)
    return build_windows(corpus, data.tokenizer, arguments, "train")


def rows(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_a_name_with_brackets_is_that_file(tmp_path):
    rows(tmp_path / "data1.jsonl", "of the other file")
    wanted = rows(tmp_path / "data[1].jsonl", "of this file")
    assert list(load_corpus(str(wanted)).texts) == ["of this file"]


def test_new_content_under_an_old_time_is_read(tmp_path):
    path = rows(tmp_path / "data.jsonl", "the first text")
    first, stat = load_corpus(str(path)), path.stat()
    assert list(first.texts) == ["the first text"]
    rows(path, "the other text")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    second = load_corpus(str(path))
    assert list(second.texts) == ["the other text"]
    assert second.key != first.key


def test_rows_without_a_text_are_left_out_and_counted(tmp_path, caplog):
    path = rows(tmp_path / "data.jsonl", "one", None, "two")
    with caplog.at_level("INFO", logger="hf_lnfree"):
        assert list(load_corpus(str(path)).texts) == ["one", "two"]
    assert "1 of 3 rows" in caplog.text


def test_a_pipe_is_no_corpus(tmp_path):
    os.mkfifo(tmp_path / "pipe.py")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load_corpus(str(tmp_path / "pipe.py"))
    (tmp_path / "file.py").write_text("a text")
    assert list(load_corpus(str(tmp_path)).texts) == ["a text"]


@pytest.mark.parametrize(
    "fields",
    [
        {"data": ""},
        {"data": "  "},
        {"validation_data": ""},
        {"max_documents": 0},
        {"max_validation_documents": -1},
        {"max_validation_windows": 0},
        {"vocab_size": 0},
        {"context_length": 1},
        {"packing": "loose"},
        {"context_length": "long"},
    ],
    ids=str,
)
def test_fields_are_checked_before_anything_is_read(fields):
    with pytest.raises(SettingsError, match=next(iter(fields))):
        DataArguments(**fields)


def test_batches_are_spread_over_a_split():
    windows = [{"input_ids": torch.tensor([number])} for number in range(101)]
    few = window_batches(windows, 5, batch_size=2)
    assert [batch.flatten().tolist() for batch in few] == [[0, 25], [50, 75], [100]]
    assert torch.cat(window_batches(windows, 1000)).flatten().tolist() == list(range(101))


def test_a_folder_above_the_one_that_is_worked_in_is_no_corpus(tmp_path, monkeypatch):
    work = tmp_path / "home" / "project" / "work"
    work.mkdir(parents=True)
    (work / "a.txt").write_text("some text")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(work)
    for data in ("..", "../..", "/", "~", str(tmp_path), str(tmp_path / "home")):
        with pytest.raises(DataError, match="every text file below it would be read"):
            load_corpus(data)
    for data in (".", str(work)):
        assert list(load_corpus(data).texts) == ["some text"]
