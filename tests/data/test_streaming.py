"""Corpora that are larger than memory: what stays on the disk, what goes on after a kill, what is read how often."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from hf_lnfree.data import building, encoding, windows
from hf_lnfree.data.arguments import DataArguments
from hf_lnfree.data.building import build_windows
from hf_lnfree.data.corpus import TEXT_SUFFIXES, Corpus, load_corpus, split_by_hash
from hf_lnfree.data.documents import files_below
from hf_lnfree.data.encoding import encoder, in_processes
from hf_lnfree.data.tokenization import train_bpe
from hf_lnfree.data.windows import TokenWindows
from hf_lnfree.errors import DataError

FORKING = pytest.mark.filterwarnings(
    "ignore:.*use of fork:DeprecationWarning", "ignore:This process:DeprecationWarning"
)
# Each of several runs tokenises one of four rows at a time, and dies when it has written down ten documents.
KILLED = """
import json, os, signal, sys
from hf_lnfree.data import building, encoding
from hf_lnfree.data.arguments import DataArguments
from hf_lnfree.data.corpus import load_corpus
from transformers import AutoTokenizer
encoding.CHUNK, encoding.CHARACTERS, building.JOURNAL_EVERY, add = 4, 1, 0.0, building.TokenWriter.add
def dying(writer, piece):
    if writer.done.documents >= 10:
        writer.tokens.write(b"half of a piece")
        writer.tokens.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    add(writer, piece)
building.TokenWriter.add = dying
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for fields in json.loads(sys.argv[2]):
    child = os.fork()
    if child == 0:
        building.build_windows(load_corpus(fields["data"]), tokenizer, DataArguments(**fields), "train")
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["def value(x): return x + 1\n" * 3, "import os\n"], 300)


@pytest.fixture
def arguments(corpus, tmp_path):
    return DataArguments(data=str(corpus), cache_dir=str(tmp_path / "cache"), context_length=16)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@FORKING
def test_tokenising_goes_on_where_it_was_killed(arguments, tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    cases = [
        {"cache_dir": str(tmp_path / f"{packing}-{processes}"), "packing": packing, "tokenizing_processes": processes}
        for packing, processes in (("exact", 1), ("packed", 1), ("packed", 2))
    ]
    jobs = [{"data": arguments.data, "context_length": 16, **case} for case in cases]
    command = [sys.executable, "-c", KILLED, str(tmp_path / "tokenizer"), json.dumps(jobs)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.stdout.split() == [str(-signal.SIGKILL)] * 3, killed.stderr[-2000:]
    corpus, tokenised, begun = load_corpus(arguments.data), building.tokenised, []
    tokens = sum(map(len, tokenizer(list(corpus.texts), add_special_tokens=False)["input_ids"]))
    monkeypatch.setattr(building, "tokenised", lambda *args: begun.append(args[4]) or tokenised(*args))
    for case in cases:
        cache = Path(case["cache_dir"])
        assert not list((cache / "windows").iterdir())
        again = build_windows(corpus, tokenizer, replace(arguments, **case), "train")
        fresh = replace(arguments, **case | {"cache_dir": str(cache / "fresh")})
        assert contents(again) == contents(build_windows(corpus, tokenizer, fresh, "train"))
        meta = json.loads((again / "meta.json").read_text())
        ends = meta["documents"] if case["packing"] == "packed" else 0
        assert 16 * meta["windows"] + meta["dropped_tokens"] == tokens + ends
        assert not list((cache / "tokenising").iterdir())
    assert begun == [10, 0] * 3


@pytest.mark.parametrize("damage", ["tokens.bin", "digests.bin", "journal.json"])
def test_what_a_killed_run_left_is_kept_only_as_it_was_written(arguments, tokenizer, tmp_path, monkeypatch, damage):
    corpus = load_corpus(arguments.data)
    whole = build_windows(corpus, tokenizer, replace(arguments, cache_dir=str(tmp_path / "other")), "train")
    monkeypatch.setattr(encoding, "CHUNK", 2)
    add = building.TokenWriter.add

    def interrupted(writer, piece):
        add(writer, piece)
        if writer.done.documents == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(building.TokenWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_windows(corpus, tokenizer, arguments, "train")
    monkeypatch.setattr(building.TokenWriter, "add", add)
    (left,) = (tmp_path / "cache" / "tokenising").iterdir()
    file = left / damage
    assert json.loads((left / "journal.json").read_text())["rows"] == 10
    file.write_bytes(file.read_bytes()[:-40] + b"?" * 40)
    assert contents(build_windows(corpus, tokenizer, arguments, "train")) == contents(whole)


def test_two_runs_make_the_same_tokens_once(arguments, tokenizer, monkeypatch, tmp_path):
    """The second waits for the first, and finds what it has made."""
    from hf_lnfree.files import hold, resumable_folder

    target, work = tmp_path / "windows" / "key", tmp_path / "tokenising" / "key"
    monkeypatch.setattr("hf_lnfree.files.POLL", 0.0)
    work.mkdir(parents=True)
    held = hold(work)
    waited = []

    def first_is_done(seconds):
        waited.append(seconds)
        target.parent.mkdir(exist_ok=True)
        work.rename(target)

    monkeypatch.setattr("hf_lnfree.files.time.sleep", first_is_done)
    with resumable_folder(target, work) as partial:
        assert partial is None
    os.close(held)
    assert len(waited) == 1


def test_a_file_that_is_changed_while_it_is_tokenised_is_told(tmp_path, arguments, tokenizer):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " * 20)
    corpus = load_corpus(str(tmp_path))
    (tmp_path / "2.txt").write_text("something else")
    with pytest.raises(DataError, match=r"2\.txt was changed while it was read"):
        build_windows(corpus, tokenizer, arguments, "train")
    (tmp_path / "2.txt").unlink()
    with pytest.raises(DataError, match=r"2\.txt was changed while it was read"):
        list(corpus.texts)
    assert not list((tmp_path / "cache" / "tokenising").iterdir())


def test_files_have_the_order_of_sorted_paths(tmp_path):
    names = [
        "b.txt",
        "a/z.py",
        "a/b/c.md",
        "a-b/x.txt",
        "a.d/.hidden/y.json",
        "a/.txt",
        "a/no.bin",
        "A.txt",
        "a.txt/q.rst",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    expected = sorted(p for p in tmp_path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
    assert list(files_below(str(tmp_path), TEXT_SUFFIXES)) == list(map(str, expected))
    assert len(expected) == 8


def test_a_folder_has_the_documents_and_the_key_of_its_texts(tmp_path):
    texts = ["one\r\ntwo\rthree", "\ufeffmark", "  \n", "ünï\n"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    read = [(tmp_path / f"{number}.txt").read_text(encoding="utf-8") for number in range(4)]
    files, memory = load_corpus(str(tmp_path)), Corpus.from_texts("memory", read)
    assert files.key == memory.key
    for one, other in ((files, memory), *zip(split_by_hash(files, 0.3), split_by_hash(memory, 0.3), strict=True)):
        assert list(one.texts) == list(other.texts)
    assert list(files.texts) == ["one\ntwo\nthree", "\ufeffmark", "ünï\n"]


def test_memory_does_not_grow_with_the_text(tmp_path, tokenizer, monkeypatch):
    """Four times the files, of 7 kB each, cost what their paths and hashes do."""

    def peak(count):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}.txt").write_text(f"value {number} " * 700)
        arguments = DataArguments(data=str(folder), cache_dir=str(tmp_path / "cache"), context_length=16)
        tracemalloc.start()
        train, validation = split_by_hash(load_corpus(str(folder)), 0.1)
        for corpus in (train, validation):
            TokenWindows(build_windows(corpus, tokenizer, arguments, "train"))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    monkeypatch.setattr(encoding, "CHARACTERS", 40_000)
    peak(60)
    few, many = peak(100), peak(400)
    assert many - few < 300 * 300


def test_a_folder_of_tables_is_one_table(tmp_path, caplog):
    texts = [f"row {number}" for number in range(9)]
    for start, name in ((0, "a/part-0"), (4, "a/part-1"), (7, "b[1]")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        part = texts[start : start + 4] if start < 7 else [None, *texts[8:]]
        datasets.Dataset.from_dict({"text": part}).to_parquet(tmp_path / f"{name}.parquet")
    shards = load_corpus(str(tmp_path))
    assert list(shards.texts) == texts
    assert list(load_corpus(str(tmp_path), 2).texts) == texts[:2]
    single = load_corpus(str(tmp_path / "a" / "part-0.parquet"))
    assert single.key != shards.key
    datasets.Dataset.from_dict({"text": ["changed"]}).to_parquet(tmp_path / "b[1].parquet")
    assert list(load_corpus(str(tmp_path)).texts) == [*texts[:8], "changed"]
    (tmp_path / "README.md").write_text("about the tables")
    with caplog.at_level("WARNING", logger="hf_lnfree"):
        assert list(load_corpus(str(tmp_path)).texts) == ["about the tables"]
    assert "part-0.parquet and its like are left out" in caplog.text


def test_windows_of_several_folders_are_one_set(arguments, tokenizer, monkeypatch):
    corpus = load_corpus(arguments.data)
    folders = [build_windows(part, tokenizer, arguments, "train") for part in split_by_hash(corpus, 0.4)]
    parts = [TokenWindows(folder) for folder in folders]
    both = TokenWindows(folders)
    tokens = np.concatenate([part.tokens for part in parts])
    order = np.random.default_rng(0).permutation(len(tokens))
    assert len(both) == len(tokens)
    assert both.num_tokens == tokens.size
    found = torch.stack([item["input_ids"] for item in both.__getitems__(order.tolist())])
    assert np.array_equal(found, tokens[order])
    assert np.array_equal(both[-1]["labels"], tokens[-1])
    for outside in (len(tokens), -len(tokens) - 1):
        with pytest.raises(IndexError):
            both[outside]
    few = TokenWindows(folders, 5)
    assert np.array_equal(few.tokens, tokens[np.arange(5) * len(tokens) // 5])
    assert both.meta["windows"] == len(tokens)
    assert both.meta["documents"] == 40
    assert both.sha256 not in {part.sha256 for part in parts}
    longer = build_windows(corpus, tokenizer, replace(arguments, context_length=32), "train")
    other = build_windows(corpus, train_bpe(["other text"], 280), arguments, "train")
    for folder, what in ((longer, "context_length"), (other, "tokenizer_sha256")):
        with pytest.raises(DataError, match=f"are no one set: {what}"):
            TokenWindows([folders[0], folder])


def test_a_token_file_is_read_for_its_hash_at_most_once(arguments, tokenizer, monkeypatch):
    hashed = []
    file_hash = windows.file_hash
    monkeypatch.setattr(windows, "file_hash", lambda path: hashed.append(path) or file_hash(path))
    corpus = load_corpus(arguments.data)
    for _ in range(2):
        folder = build_windows(corpus, tokenizer, arguments, "train")
        made = TokenWindows(folder)
    assert not hashed
    assert made.sha256 == hashlib.sha256((folder / "tokens.bin").read_bytes()).hexdigest()
    monkeypatch.setattr(windows, "_known", {})  # as in another process
    for _ in range(2):
        TokenWindows(build_windows(corpus, tokenizer, arguments, "train"))
    assert hashed == [folder / "tokens.bin"]


def test_ids_are_those_of_the_tokenizer(tokenizer):
    texts = ["def value(x)", "", "return <|endoftext|> x" * 30, "ünï ☃"]
    cutting = train_bpe(["def value(x): return x + 1\n"], 300)
    cutting.backend_tokenizer.enable_truncation(3)
    cutting.backend_tokenizer.enable_padding(length=50)

    class Other(type(tokenizer)):
        def __call__(self, texts, **options):
            return {"input_ids": [[len(text)] for text in texts]}

    for each in (tokenizer, cutting):
        expected = each(texts, add_special_tokens=False)["input_ids"]
        assert [row.tolist() for row in encoder(each, np.dtype(np.uint16))(texts)] == expected
    other = Other(tokenizer_object=tokenizer.backend_tokenizer)
    assert [row.tolist() for row in encoder(other, np.dtype(np.uint16))(texts)] == [[len(text)] for text in texts]


@FORKING
def test_a_process_that_is_lost_and_an_error_in_one_are_told(tokenizer, monkeypatch):
    corpus = Corpus.from_texts("c", [f"document {number}" for number in range(8)])
    us = os.getpid()

    def run(action):
        monkeypatch.setattr(Corpus, "keeps", lambda self, digest: os.getpid() == us or action())
        return list(in_processes(corpus, tokenizer, np.dtype(np.uint16), [range(4), range(4, 8)], 2))

    with pytest.raises(DataError, match="ended from outside"):
        run(lambda: os._exit(9))
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
    pieces = run(lambda: True)
    assert [piece.rows for piece in pieces] == [4, 8]
