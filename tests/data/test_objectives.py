"""What is hidden of windows, which pairs and which images there are, and what of each a model is given."""

import json
import wave
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoFeatureExtractor, AutoTokenizer, ViTImageProcessorPil, WhisperFeatureExtractor

from hf_lnfree.data.arguments import DataArguments
from hf_lnfree.data.corrupted import parts
from hf_lnfree.data.pairs import functions
from hf_lnfree.data.splits import load_data
from hf_lnfree.errors import DataError, SettingsError


@pytest.fixture
def arguments(corpus, cache_dir):
    def build(objective, **more):
        values = {"data": str(corpus), "cache_dir": cache_dir, "vocab_size": 320, "context_length": 64}
        return DataArguments(**{**values, "objective": objective, **more})

    return build


def test_masked_windows_hide_15_percent_and_change_nothing_else(arguments):
    data = load_data(arguments("masked"), seed=1)
    mask, plain = data.tokenizer.mask_token_id, load_data(arguments("masked")).train.windows
    hidden, kinds = 0, Counter()
    for index in range(len(data.train)):
        original, item = plain[index]["input_ids"], data.train[index]
        to_find = item["labels"] != -100
        assert torch.equal(item["labels"][to_find], original[to_find])
        assert torch.equal(item["input_ids"][~to_find], original[~to_find])
        hidden += int(to_find.sum())
        kinds["masked"] += int((item["input_ids"][to_find] == mask).sum())
        kinds["same"] += int((item["input_ids"][to_find] == original[to_find]).sum())
    tokens = 64 * len(data.train)
    assert tokens > 5000
    assert hidden / tokens == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / tokens) ** 0.5)
    assert kinds["masked"] / hidden == pytest.approx(0.8, abs=4 * (0.16 / hidden) ** 0.5)
    assert kinds["same"] / hidden == pytest.approx(0.1, abs=4 * (0.09 / hidden) ** 0.5)


@pytest.mark.parametrize("objective", ["masked", "span"])
def test_what_is_hidden_follows_from_seed_epoch_and_number_alone(arguments, objective):
    def hidden(data, epoch=0):
        data.set_epoch(epoch)
        return [item["labels"].tolist() for item in data.__getitems__([3, 0, 5])]

    one, same, other = (load_data(arguments(objective), seed=seed) for seed in (1, 1, 2))
    assert hidden(one.train) == hidden(same.train)[:]
    assert [one.train[i]["labels"].tolist() for i in (3, 0, 5)] == hidden(one.train)
    assert hidden(one.train, epoch=1) == hidden(same.train, epoch=1) != hidden(one.train)
    assert hidden(other.train) != hidden(one.train)
    assert hidden(other.validation, epoch=4) == hidden(one.validation)


def test_spans_and_their_sentinels_put_a_window_together_again(arguments):
    data = load_data(arguments("span"), seed=1)
    names = [f"<extra_id_{i}>" for i in range(3)]  # round(.15 * 64) = 10 tokens in round(10 / 3) spans
    marks = data.tokenizer.convert_tokens_to_ids(names)
    eos = data.tokenizer.eos_token_id
    lengths = set()
    for index in range(len(data.train)):
        item, original = data.train[index], data.train.windows[index]["input_ids"].tolist()
        inputs, labels = item["input_ids"].tolist(), item["labels"].tolist()
        lengths.add((len(inputs), len(labels)))
        assert inputs.pop() == labels.pop() == eos
        assert [token for token in inputs if token in marks] == marks == [token for token in labels if token in marks]
        starts = [labels.index(mark) for mark in marks]
        ends = [*starts[1:], len(labels)]
        gone = {labels[start]: labels[start + 1 : end] for start, end in zip(starts, ends, strict=True)}
        assert all(gone.values())
        assert [t for token in inputs for t in gone.get(token, [token])] == original
    assert lengths == {(64 - 10 + 3 + 1, 10 + 3 + 1)}


def test_every_division_into_parts_is_as_likely():
    source = np.random.default_rng(0)
    found = Counter(tuple(parts(5, 3, source)) for _ in range(6000))
    assert set(found) == {(1, 1, 3), (1, 3, 1), (3, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)}
    assert all(count == pytest.approx(1000, abs=130) for count in found.values())
    assert parts(4, 1, source) == [4]


def test_a_tokenizer_without_the_marks_is_refused(arguments, corpus, cache_dir, tmp_path):
    load_data(arguments(None)).tokenizer.save_pretrained(tmp_path)
    for objective, lacks in (("masked", "mask token"), ("span", "<extra_id_0>")):
        with pytest.raises(DataError, match=lacks):
            load_data(arguments(objective, tokenizer=str(tmp_path)))


def test_docstrings_and_names_are_pairs(tmp_path, cache_dir):
    code = 'def one():\n    """First."""\nclass A:\n    async def two(self):\n        """Second\n\n        more"""\n'
    code += "def three(): 0\n"
    assert list(functions(code)) == [("First.", "one"), ("Second\n\nmore", "two")]
    assert list(functions("def (")) == []
    for i in range(12):
        (tmp_path / f"{i}.py").write_text(f'def name_{i}():\n    """What {i} does: {"so " * 40}."""\n')
    data = load_data(
        DataArguments(str(tmp_path), cache_dir=cache_dir, objective="pairs", vocab_size=300, context_length=24)
    )
    assert len(data.train) + len(data.validation) == 12
    item = data.train[0]
    assert len(item["input_ids"]) == 24
    assert item["input_ids"][-1] == item["labels"][-1] == data.tokenizer.eos_token_id
    number = data.tokenizer.decode(item["labels"][:-1]).removeprefix("name_")
    assert data.tokenizer.decode(item["input_ids"]).startswith(f"What {number} does")
    assert data.train.meta["dropped_tokens"] > 0


def test_pairs_of_a_table_have_a_column_each(tmp_path, cache_dir):
    rows = [{"source": f"say {i}", "target": f"{i}!"} for i in range(40)]
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"source": "no", "target": None}])
    )
    arguments = DataArguments(
        str(tmp_path / "t.jsonl"), cache_dir=cache_dir, objective="pairs", vocab_size=300, validation_fraction=0.2
    )
    data = load_data(arguments)
    found = [
        [data.tokenizer.decode(item[key][:-1]) for key in ("input_ids", "labels")]
        for split in (data.train, data.validation)
        for item in (split[i] for i in range(len(split)))
    ]
    assert sorted(found) == sorted([row["source"], row["target"]] for row in rows)
    (tmp_path / "none.txt").write_text("no code, no pairs\n")
    with pytest.raises(DataError, match="columns 'source' and 'target', or Python files"):
        load_data(
            DataArguments(str(tmp_path / "none.txt"), objective="pairs", validation_data=str(tmp_path / "none.txt"))
        )


def test_digits_are_those_of_scikit_learn(cache_dir, tmp_path):
    data = load_data(DataArguments("digits", objective="image", cache_dir=cache_dir, validation_fraction=0.2))
    known = load_digits()
    expected = Counter(
        (image.astype(int).tobytes(), int(label)) for image, label in zip(known.images, known.target, strict=True)
    )
    found = Counter()
    for split in (data.train, data.validation):
        for item in (split[i] for i in range(len(split))):
            pixels = ((item["pixel_values"] + 1) * 8).round().int()[0]  # -1 to 1 -> 0 to 16
            found[pixels.numpy().astype(int).tobytes(), int(item["labels"])] += 1
    assert found == expected
    assert len(data.validation) == pytest.approx(0.2 * 1797, abs=70)
    assert (data.fields["id2label"][7], data.fields["num_channels"]) == ("7", 1)
    data.processor.save_pretrained(tmp_path)
    again = ViTImageProcessorPil.from_pretrained(tmp_path)
    raw = data.train.pixels[data.train.chosen[0]][0]
    torch.testing.assert_close(
        again(raw[..., None], return_tensors="pt").pixel_values[0], data.train[0]["pixel_values"]
    )


def pictures(folder, sizes=((6, 6),), modes=("L",), count=12):
    source = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            shape = sizes[i % len(sizes)][::-1] + ((3,) if modes[i % len(modes)] == "RGB" else ())
            Image.fromarray(source.integers(0, 256, shape, dtype=np.uint8)).save(folder / label / f"{i}.png")


def test_a_folder_of_images_has_a_folder_for_each_label(tmp_path, cache_dir):
    pictures(tmp_path / "some", sizes=((6, 8), (8, 6)), modes=("L", "RGB"))
    arguments = {
        "data": str(tmp_path / "some"),
        "objective": "image",
        "cache_dir": cache_dir,
        "validation_fraction": 0.3,
    }
    with pytest.raises(DataError, match=r"2 sizes. Bring them to one: --image-size"):
        load_data(DataArguments(**arguments))
    data = load_data(DataArguments(**arguments, image_size=4))
    assert data.train[0]["pixel_values"].shape == (3, 4, 4)
    assert (data.train.meta["labels"], len(data.train) + len(data.validation)) == (["cat", "dog"], 24)
    first = Image.open(tmp_path / "some" / "cat" / "1.png").convert("RGB").resize((4, 4), Image.Resampling.BILINEAR)
    assert np.array_equal(data.train.pixels[1], np.asarray(first).transpose(2, 0, 1))

    pictures(tmp_path / "other", count=1)
    (tmp_path / "other" / "dog").rename(tmp_path / "other" / "eel")
    with pytest.raises(DataError, match=r"labels that .* does not have: eel"):
        load_data(DataArguments(**arguments, image_size=4, validation_data=str(tmp_path / "other")))
    (tmp_path / "some" / "lone.png").write_bytes((tmp_path / "some" / "cat" / "1.png").read_bytes())
    with pytest.raises(DataError, match=r"Not in one: lone.png"):
        load_data(DataArguments(**arguments))
    (tmp_path / "some" / "lone.png").replace(tmp_path / "some" / "cat" / "0.png")
    (tmp_path / "some" / "dog" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"0.png cannot be read as an image"):
        load_data(DataArguments(**arguments, image_size=4))


def test_the_same_image_twice_is_on_one_side(tmp_path, cache_dir):
    pictures(tmp_path / "a", count=8)
    for file in list((tmp_path / "a" / "cat").iterdir()):
        (tmp_path / "a" / "cat" / f"again-{file.name}").write_bytes(file.read_bytes())
    data = load_data(
        DataArguments(str(tmp_path / "a"), objective="image", cache_dir=cache_dir, validation_fraction=0.4)
    )
    train, held_out = ({x.tobytes() for x in s.pixels[s.chosen]} for s in (data.train, data.validation))
    assert not train & held_out
    assert len(data.train) + len(data.validation) == 24


def test_an_objective_that_is_none_is_refused():
    with pytest.raises(SettingsError, match=r"objective='mask' is not known. Allowed: 'causal', 'masked', 'span'"):
        DataArguments(objective="mask")


def speak(folder, texts, rate=16_000, width=2, seconds=0.5):
    """A WAV file for each text, whose words are tones."""
    folder.mkdir(exist_ok=True)
    time = np.arange(int(rate * seconds)) / rate
    rows = []
    for index, text in enumerate(texts):
        tone = sum(np.sin(2 * np.pi * (200 + 37 * ord(letter)) * time) for letter in text) / len(text)
        dtype, top, zero = {1: (np.uint8, 127, 128), 2: (np.int16, 32767, 0)}[width]
        with wave.open(str(folder / f"{index}.wav"), "wb") as file:
            file.setparams((2, width, rate, 0, "NONE", ""))
            samples = (tone * top + zero).astype(dtype)
            file.writeframes(np.stack((samples, samples), 1).tobytes())
        rows.append({"file_name": f"{index}.wav", "text": text})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return time


def test_recordings_become_what_whisper_reads(tmp_path, cache_dir):
    words = [f"{a}{b}" for a in "abcdefgh" for b in "klmno"]
    time = speak(tmp_path / "said", words)
    arguments = {"objective": "speech", "cache_dir": cache_dir, "vocab_size": 300, "validation_fraction": 0.2}
    data = load_data(DataArguments(str(tmp_path / "said"), **arguments, audio_seconds=1))
    assert len(data.train) + len(data.validation) == 40
    assert data.fields["max_source_positions"] == 50
    item = data.train[0]
    text = data.tokenizer.decode(item["labels"][:-1])
    assert item["labels"][-1] == data.tokenizer.eos_token_id
    tone = sum(np.sin(2 * np.pi * (200 + 37 * ord(letter)) * time) for letter in text) / 2
    expected = WhisperFeatureExtractor(chunk_length=1)(tone, sampling_rate=16_000, return_tensors="pt").input_features
    torch.testing.assert_close(item["input_features"], expected[0], atol=2e-2, rtol=0)
    data.processor.save_pretrained(tmp_path / "saved")
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "saved").chunk_length == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").decode(item["labels"][:-1]) == text


def test_recordings_that_cannot_be_read_are_refused(tmp_path, cache_dir):
    def load(folder, **more):
        return load_data(DataArguments(str(folder), objective="speech", cache_dir=cache_dir, **more))

    speak(tmp_path / "slow", ["ab", "cd"], rate=8000)
    with pytest.raises(DataError, match=r"8000 samples a second of 16 bits. Convert it: ffmpeg"):
        load(tmp_path / "slow", validation_data=str(tmp_path / "slow")).train[0]
    speak(tmp_path / "coarse", ["ab"], width=1)
    assert (
        load(tmp_path / "coarse", validation_data=str(tmp_path / "coarse")).train[0]["input_features"].isfinite().all()
    )
    (tmp_path / "coarse" / "0.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"0.wav cannot be read as WAV"):
        load(tmp_path / "coarse", validation_data=str(tmp_path / "coarse")).train[0]
    (tmp_path / "coarse" / "0.wav").unlink()
    with pytest.raises(DataError, match=r"'0.wav' is no file of its folder"):
        load(tmp_path / "coarse")
    (tmp_path / "coarse" / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match=r"has no table of its recordings: metadata.jsonl or metadata.csv"):
        load(tmp_path / "coarse")
    (tmp_path / "slow" / "metadata.jsonl").rename(tmp_path / "slow" / "m")
    (tmp_path / "slow" / "metadata.csv").write_text("file_name,words\n0.wav,ab\n1.wav,cd\n")
    with pytest.raises(DataError, match=r"has no column text or transcription or sentence; it has file_name, words"):
        load(tmp_path / "slow")
