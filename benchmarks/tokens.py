"""What is measured of making and reading tokens: a folder of 600,000 files, and peers with the same texts."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from training import peak

FILES, TEXTS, CHARACTERS, LENGTH, PROCESSES = 600_000, 6_000, 60, 128, 2
TOKENISED = 800  # files of the standard library


def library(limit: int) -> list[str]:
    from hf_lnfree.data.corpus import load_corpus

    return list(load_corpus("stdlib", limit).texts)


def tokenizer_in(folder: Path) -> Path:
    """One like GPT-2's, trained on a few files."""
    from hf_lnfree.data.tokenization import train_bpe

    train_bpe(library(50), 4096).save_pretrained(folder)
    return folder


def write_files(folder: Path, number: int) -> None:
    """Short files from the standard library, all in one folder; after the first 6,000 they are links to these."""
    text = "".join(library(50))
    folder.mkdir()
    for index in range(min(number, TEXTS)):
        part = text[index * CHARACTERS % (len(text) - CHARACTERS) :][:CHARACTERS]
        (folder / f"{index:06}.py").write_text(f"# {index}\n{part}", encoding="utf-8")
    for index in range(TEXTS, number):
        os.link(folder / f"{index % TEXTS:06}.py", folder / f"{index:06}.py")


def tokenise_folder(folder: str, tokenizer: str, cache: str) -> dict[str, float]:
    """In a process of its own."""
    from hf_lnfree.data import DataArguments, load_data

    imported = peak()
    arguments = DataArguments(
        folder, cache_dir=cache, tokenizer=tokenizer, packing="packed", tokenizing_processes=PROCESSES
    )
    start = time.perf_counter()
    data = load_data(arguments)
    return {
        "MiB": peak(),
        "MiB_before_anything_is_read": imported,
        "MiB_of_the_larger_worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10,
        "seconds": time.perf_counter() - start,
        "documents": data.train.meta["documents"] + data.validation.meta["documents"],
        "tokens": data.train.num_tokens + data.validation.num_tokens,
    }


def measure_folder(device: str, number: int = FILES) -> tuple[str, dict[str, dict[str, float]]]:
    """Peak memory."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_files(root / "texts", number)
        tokenizer_in(root / "tokenizer")
        job = [sys.executable, __file__, *(str(root / name) for name in ("texts", "tokenizer", "cache"))]
        found = json.loads(subprocess.run(job, check=True, stdout=subprocess.PIPE).stdout)
    return (
        f"Peak resident memory of reading, splitting and tokenising a folder of files of {CHARACTERS} characters, by "
        f"{PROCESSES} processes beside the main one.",
        {f"{number:,} files": found},
    )


def tokenising_candidates(device: str) -> dict[str, Callable[[], object]]:
    """800 files of the standard library to tokens: datasets.map in batches, nanoGPT's prepare script (datasets.map a
    text at a time, then a memory-mapped file), and build_windows, from its reading of the files on; two processes each,
    the same tokenizer. The peers begin with texts in memory."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer

    from hf_lnfree.data import DataArguments
    from hf_lnfree.data.building import build_windows
    from hf_lnfree.data.corpus import load_corpus

    disable_progress_bars()
    root = Path(tempfile.mkdtemp())
    texts = library(TOKENISED)
    (root / "texts").mkdir()
    for index, text in enumerate(texts):
        (root / "texts" / f"{index:04}.py").write_text(text, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_in(root / "tokenizer"))
    numbers = count()

    def mapped(encode: Callable[[Any], Any], batched: bool) -> Any:
        rows = Dataset.from_dict({"text": texts})
        return rows.map(
            encode,
            batched=batched,
            remove_columns=["text"],
            num_proc=PROCESSES,
            load_from_cache_file=False,
            cache_file_name=str(root / f"map-{next(numbers)}.arrow"),
        )

    def in_batches(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"ids": tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]}

    def one_text(row: dict[str, str]) -> dict[str, Any]:
        ids = tokenizer.backend_tokenizer.encode(row["text"], add_special_tokens=False).ids
        ids.append(tokenizer.eos_token_id)
        return {"ids": ids, "len": len(ids)}

    def prepare() -> None:
        rows = mapped(one_text, batched=False)
        total = np.sum(rows["len"], dtype=np.uint64)
        tokens = np.memmap(root / "train.bin", dtype=np.uint16, mode="w+", shape=(int(total),))
        start = 0
        for part in range(shards := min(1024, len(rows))):
            batch = rows.shard(num_shards=shards, index=part, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            tokens[start : start + len(ids)] = ids
            start += len(ids)
        tokens.flush()

    def ours() -> None:
        arguments = DataArguments(
            cache_dir=str(root / f"cache-{next(numbers)}"), packing="packed", tokenizing_processes=PROCESSES
        )
        build_windows(load_corpus(str(root / "texts")), tokenizer, arguments, "train")
        shutil.rmtree(arguments.cache_dir or "")

    return {
        "datasets.map, batched": lambda: mapped(in_batches, batched=True),
        "nanoGPT's prepare script": prepare,
        "hf_lnfree": ours,
    }


def reading_candidates(device: str) -> dict[str, Callable[[], object]]:
    """200 batches of 32 x 128 tokens in random order from a file of 25M: nanoGPT's get_batch, which draws windows with
    replacement; a datasets.Dataset in torch format; and TokenWindows; the last two by a DataLoader."""
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    from hf_lnfree.data.windows import TokenWindows

    root = Path(tempfile.mkdtemp())
    tokens = np.random.default_rng(0).integers(0, 50_000, (200_000, LENGTH), dtype=np.uint16)
    tokens.tofile(root / "tokens.bin")
    meta = {"windows": len(tokens), "context_length": LENGTH, "dtype": "uint16", "sha256": hashed(root / "tokens.bin")}
    (root / "meta.json").write_text(json.dumps(meta))
    Dataset.from_dict({"input_ids": tokens}).save_to_disk(root / "rows")
    rows = Dataset.load_from_disk(str(root / "rows")).with_format("torch")

    def get_batch() -> None:
        for _ in range(200):
            data = np.memmap(root / "tokens.bin", dtype=np.uint16, mode="r")
            starts = torch.randint(len(data) - LENGTH, (32,))
            x = torch.stack([torch.from_numpy(data[i : i + LENGTH].astype(np.int64)) for i in starts])
            y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + LENGTH].astype(np.int64)) for i in starts])
            assert x.shape == y.shape

    def endless(loader: DataLoader) -> Iterator[Any]:
        while True:
            yield from loader

    def loaded(windows: Any) -> Callable[[], object]:
        batches = endless(DataLoader(windows, 32, shuffle=True, collate_fn=default_data_collator, drop_last=True))
        return lambda: [next(batches) for _ in range(200)]

    return {
        "nanoGPT's get_batch": get_batch,
        "datasets, torch format": loaded(rows),
        "hf_lnfree": loaded(TokenWindows(root)),
    }


def hashed(path: Path) -> str:
    from hf_lnfree.files import file_hash

    return file_hash(path)


if __name__ == "__main__":
    print(json.dumps(tokenise_folder(*sys.argv[1:])))
