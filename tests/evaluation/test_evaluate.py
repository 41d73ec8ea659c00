"""Evaluation of any causal language model: against transformers' own loss, over processes, on files of every kind."""

import json
import math
import re

import evaluate as hf_evaluate
import pytest
import torch
from datasets import disable_progress_bars
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_lnfree.cli.main import main
from hf_lnfree.data import DataArguments
from hf_lnfree.data.splits import load_splits
from hf_lnfree.data.tokenization import tokenizer_for
from hf_lnfree.data.windows import cache_folder
from hf_lnfree.evaluation.run import evaluate
from hf_lnfree.files import write_json
from hf_lnfree.metrics import METRICS, metric_path

from ..conftest import run_in_two
from ..conversion.conftest import trained


@pytest.fixture(scope="module")
def model_folder(corpus, cache_dir, tmp_path_factory):
    """A Llama of transformers, with a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    data = DataArguments(data=str(corpus), vocab_size=300, cache_dir=cache_dir)
    tokenizer = tokenizer_for(None, load_splits(data)[0], 300, cache_folder(data))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.3)
    trained(LlamaForCausalLM(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def texts(corpus):
    return [path.read_text()[: 60 + 17 * i] for i, path in enumerate(sorted(corpus.glob("*.py"))[:12])]


def test_perplexity_and_bits_are_those_of_the_formula(model_folder, texts):
    found = evaluate(model_folder, [*texts, "", "x"], metrics=["perplexity", "bits_per_byte"], context_length=64)
    model = LlamaForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    nats = tokens = size = 0
    short = [text for text in texts if len(tokenizer(text)["input_ids"]) <= 64]
    assert len(short) > 5
    for text in short:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
        size += len(text.encode()) - len(tokenizer.decode(ids[0, :1]).encode())
    alone = evaluate(model_folder, short, context_length=64)
    assert alone["perplexity"]["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert alone["perplexity"]["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert alone["bits_per_byte"]["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert (alone["documents"], alone["tokens"], alone["bytes"]) == (len(short), tokens, size)
    assert (found["documents"], found["documents_scored"]) == (14, 12)
    low, high = found["perplexity"]["interval_95"]
    assert low < found["perplexity"]["perplexity"] < high
    one = evaluate(model_folder, short[:1], context_length=64)["perplexity"]  # of which no interval is known
    assert all(math.isnan(end) for end in one["interval_95"])
    assert one["perplexity"] == pytest.approx(math.exp(one["loss"]))


def test_a_first_token_makes_all_of_a_document_predicted(model_folder, texts):
    without = evaluate(model_folder, texts, context_length=32)
    found = evaluate(model_folder, texts, context_length=32, first_token=True)
    assert found["tokens"] == without["tokens"] + len(texts)
    assert found["bytes"] == sum(len(text.encode()) for text in texts)


def test_entropy_and_sparsity(model_folder, texts):
    found = evaluate(model_folder, texts, metrics=["entropy", "sparsity"], context_length=32)
    assert 0 < found["entropy"]["mean_entropy"] < math.log(32)
    assert found["sparsity"]["layers"] == [found["sparsity"]["sparsity"]] * 2 == [0, 0]  # silu
    assert "perplexity" not in found


def test_two_processes_give_what_one_gives(model_folder, corpus, tmp_path, capsys):
    command = ["evaluate", model_folder, "--data", str(corpus), "--context-length", "32"]
    command += ["--metrics", "perplexity,bits_per_byte,entropy,sparsity", "--out"]
    files = [tmp_path / name for name in ("two.json", "one.json")]
    done = run_in_two("-m", "hf_lnfree.cli.main", *command, str(files[0]))
    assert done.returncode == 0, done.stderr[-2000:]
    assert main([*command, str(files[1])]) == 0
    for shown in (done.stdout, capsys.readouterr().out):
        assert shown.count("bits per byte") == 1
    two, one = (json.loads(file.read_text()) for file in files)
    assert two["tokens"] == one["tokens"]
    assert two["perplexity"]["loss"] == pytest.approx(one["perplexity"]["loss"], rel=1e-5)
    assert two["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-5)
    assert two["environment"]["processes"] == 2
    assert (two["entropy"], two["sparsity"]) == (one["entropy"], one["sparsity"])  # all shares, not the first one's


def test_entropy_is_that_of_the_first_documents_of_all_processes(model_folder, texts, tmp_path):
    """Also where a share begins with empty documents, and the documents wanted are fewer than there are."""
    given = ["", "", texts[0], "", *texts[1:]]
    options = {"metrics": ["entropy", "sparsity"], "context_length": 32, "attention_documents": 4}
    (tmp_path / "work.json").write_text(json.dumps([model_folder, given, options]))
    program = (
        "import json, pathlib, sys, torch.distributed as dist; from hf_lnfree.evaluation.run import evaluate; "
        "from hf_lnfree.files import write_json; folder = pathlib.Path(sys.argv[1]); "
        "model, texts, options = json.loads((folder / 'work.json').read_text()); "
        "found = evaluate(model, texts, device='cpu', **options); "
        "write_json(folder / f'{dist.get_rank()}.json', found['entropy'])"
    )
    (tmp_path / "program.py").write_text(program)
    done = run_in_two(str(tmp_path / "program.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    write_json(tmp_path / "one.json", evaluate(model_folder, given, **options)["entropy"])
    one, *two = ((tmp_path / f"{name}.json").read_text() for name in ("one", 0, 1))
    assert two == [one] * 2
    write_json(
        tmp_path / "more.json", evaluate(model_folder, given, **{**options, "attention_documents": 5})["entropy"]
    )
    assert (tmp_path / "more.json").read_text() != one


def evaluated(model_folder, file, capsys, *more):
    code = main(["evaluate", model_folder, "--data", str(file), "--context-length", "32", *more])
    return code, capsys.readouterr()


def test_files_of_every_kind(model_folder, texts, tmp_path, capsys):
    lines = [json.dumps({"text": text}) for text in (*texts[:3], "", "   ")]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    code, shown = evaluated(model_folder, tmp_path / "rows.jsonl", capsys)
    assert code == 0
    assert "3 documents" in shown.out
    (tmp_path / "other.jsonl").write_text(json.dumps({"body": texts[0]}))
    assert "no text column" in evaluated(model_folder, tmp_path / "other.jsonl", capsys)[1].err
    assert evaluated(model_folder, tmp_path / "other.jsonl", capsys, "--text-column", "body")[0] == 0
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    code, shown = evaluated(model_folder, tmp_path / "broken.jsonl", capsys)
    assert code == 1
    assert "cannot be read as .jsonl" in shown.err
    (tmp_path / "endless.txt").write_text("word " * 30_000)  # one line
    code, shown = evaluated(model_folder, tmp_path / "endless.txt", capsys)
    assert code == 0
    assert "1 documents" in shown.out
    (tmp_path / "empty.txt").write_text("")
    assert "is empty" in evaluated(model_folder, tmp_path / "empty.txt", capsys)[1].err
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.warns(UserWarning, match="not UTF-8"):
        assert evaluated(model_folder, tmp_path / "latin.txt", capsys)[0] == 1


def test_one_document_has_no_interval(model_folder, texts, tmp_path, capsys):
    (tmp_path / "one.txt").write_text(texts[0])
    metrics = ["--metrics", "perplexity,bits_per_byte,entropy,sparsity", "--out", str(tmp_path / "found.json")]
    code, shown = evaluated(model_folder, tmp_path / "one.txt", capsys, *metrics)
    assert code == 0
    assert not re.search(r"\bnan\b|not finite|±", shown.out)
    assert "1 documents" in shown.out
    assert "no intervals: two documents are needed" in shown.out
    found = json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)
    assert found["perplexity"]["interval_95"] == [None, None]
    assert found["perplexity"]["half_width_95"] is found["bits_per_byte"]["half_width_95"] is None


def test_a_perplexity_that_overflows_is_infinite_in_words_and_in_the_file(model_folder, texts, tmp_path, capsys):
    model = LlamaForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "sharp")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "sharp")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[:2]))
    code, shown = evaluated(str(tmp_path / "sharp"), tmp_path / "rows.jsonl", capsys, "--out", str(tmp_path / "f.json"))
    assert code == 0
    assert "perplexity not finite" in shown.out
    found = json.loads((tmp_path / "f.json").read_text(), parse_constant=pytest.fail)
    assert found["perplexity"]["perplexity"] is None
    assert found["infinite"]["/perplexity/perplexity"] == "inf"
    assert math.isfinite(found["perplexity"]["loss"])


def test_a_document_that_no_tokenizer_should_take(model_folder, monkeypatch):
    monkeypatch.setattr("hf_lnfree.evaluation.documents.LONGEST", 1000)
    with pytest.raises(ValueError, match=r"Document 1 has 1,001 characters.*jsonl"):
        evaluate(model_folder, ["short enough", "x" * 1001], context_length=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["accuracy"]}, "Unknown metrics: accuracy. Allowed: perplexity"),
        ({"context_length": 65}, "exceeds the 64 positions"),
        ({"context_length": 32, "stride": 32}, "stride at least 1 and smaller"),
    ],
)
def test_refusals(model_folder, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model_folder, ["some text"], **options)
    with pytest.raises(ValueError, match="None of the 2 documents predicts a token"):
        evaluate(model_folder, ["", ""])


def test_metrics_load_by_path(model_folder, texts):
    disable_progress_bars()
    found = {}
    for name in METRICS:
        metric = hf_evaluate.load(metric_path(name))
        found[name] = metric.compute(predictions=texts, model_id=model_folder, context_length=32)
    expected = evaluate(model_folder, texts, context_length=32)
    assert found["token_perplexity"]["perplexity"] == expected["perplexity"]["perplexity"]
    assert found["bits_per_byte"]["bits_per_byte"] == expected["bits_per_byte"]["bits_per_byte"]
    assert found["attention_entropy"]["mean_entropy"] > 0
    assert found["activation_sparsity"]["sparsity"] == 0
    with pytest.raises(ValueError, match=r"There is no metric 'accuracy'. There are: token_perplexity"):
        metric_path("accuracy")
