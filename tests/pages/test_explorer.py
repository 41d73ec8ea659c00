"""What the explorer tells of a text, against stock transformers; and its page, without and with a real browser."""

import importlib.util
import itertools
import json
import math
import subprocess
import sys
import urllib.request

import pytest
import torch
import transformers as tf

from hf_lnfree.cli.explore import load_explorer
from hf_lnfree.cli.main import main
from hf_lnfree.data.tokenization import train_bpe
from hf_lnfree.pages.explorer_panel import panel

from ..browser import TEXT, Browser, find_browser
from ..conftest import GPT2

LINES = "def function(first, second):\n    return first * 2 + second - 1\n"
SHORT = "def function"
ACCESS = {"trust_remote_code": False, "revision": None}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([LINES, "one two three"], 270)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Checkpoints: stock GPT-2, ours without any norm, BERT and RoBERTa."""
    torch.manual_seed(0)
    special = {"vocab_size": len(tokenizer), "pad_token_id": 0, "initializer_range": 0.2}
    models = {
        "stock": GPT2.stock_model(vocab_size=len(tokenizer), n_positions=256),
        "free": GPT2.model(vocab_size=len(tokenizer), n_positions=256, norm="none", final_norm="none"),
        "normed": GPT2.model(vocab_size=len(tokenizer), n_positions=256),
        "bert": tf.BertForMaskedLM(tf.BertConfig(**SIZES, **special, max_position_embeddings=256)),
        "roberta": tf.RobertaModel(
            tf.RobertaConfig(**SIZES, **{**special, "pad_token_id": 1}, max_position_embeddings=34)
        ),
    }
    found = {}
    for name, model in models.items():
        found[name] = tmp_path_factory.mktemp("explorer") / name
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture
def explorers(folders):
    cpu = torch.device("cpu")
    return {name: load_explorer(str(folder), name, cpu, ACCESS) for name, folder in folders.items()}


@pytest.mark.parametrize(("name", "stock"), [("stock", tf.GPT2LMHeadModel), ("bert", tf.BertForMaskedLM)])
def test_entropies_and_maps_are_those_of_an_eager_model_in_float64(folders, explorers, tokenizer, name, stock):
    eager = stock.from_pretrained(folders[name], dtype=torch.float64, attn_implementation="eager").eval()
    ids = torch.tensor([tokenizer(LINES)["input_ids"]])
    with torch.no_grad():
        out = eager(ids, output_attentions=True)
    reading = explorers[name].read(LINES)
    assert ids.shape[1] >= 32
    assert not reading.report.too_short
    assert "".join(reading.tokens) == LINES.replace("\n", "\\n")
    for layer, maps in enumerate(out.attentions):
        expected = torch.special.entr(maps[0]).sum(-1).mean(-1)
        torch.testing.assert_close(reading.report.entropy[layer].double(), expected, rtol=0, atol=1e-5)
        for head in range(4):
            found = explorers[name].head_map(LINES, layer, head)
            torch.testing.assert_close(found.double(), maps[0, head], rtol=0, atol=1e-5)
    if name == "bert":
        assert reading.next_tokens == []
        assert "predicts no next token" in " ".join(reading.notes)
        return
    probabilities = out.logits[0, -1].softmax(-1).sort(descending=True)
    assert [token for token, _ in reading.next_tokens] == [
        repr(tokenizer.decode([i])) for i in probabilities.indices[:10]
    ]
    assert [share for _, share in reading.next_tokens] == pytest.approx(probabilities.values[:10].tolist(), abs=1e-6)
    assert reading.attribution is None


def test_the_attribution_adds_up_to_the_logit_of_the_first_next_token(explorers, tokenizer):
    free = explorers["free"]
    reading = free.read(LINES)
    with torch.no_grad():
        logits = free.model(torch.tensor([tokenizer(LINES)["input_ids"]])).logits[0, -1]
    assert reading.attribution.direct.sum().item() == pytest.approx(logits.max().item(), abs=1e-4)
    assert repr(tokenizer.decode(reading.attribution.targets[0])) == reading.next_tokens[0][0]
    assert explorers["normed"].read(LINES).attribution is None
    assert "No exact attribution" in panel(explorers["normed"], LINES, 0, 0)


def test_models_stay_as_they_were(explorers):
    model = explorers["stock"].model.train()
    explorers["stock"].read(LINES)
    explorers["stock"].head_map(LINES, 1, 2)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("text", "layer", "head", "words"),
    [
        ("", 0, 0, "The text is empty."),
        (" \n", 0, 0, "The text is empty."),
        (50 * LINES, 0, 0, "stock takes 256."),
        (LINES, 3, 0, "stock has no layer 3: its layers are 0 to 2."),
        (LINES, None, 0, "stock has no layer None"),
        (LINES, 1, -1, "stock has no head -1 in layer 1: its heads are 0 to 3."),
    ],
)
def test_what_a_user_gives_wrong_is_one_line(explorers, text, layer, head, words):
    shown = panel(explorers["stock"], text, layer, head)
    assert shown.count('role="alert"') == 1
    assert words in shown


def test_a_short_text_gets_no_verdict(explorers):
    shown = panel(explorers["free"], SHORT, 0, 0)
    assert "too short for a verdict on heads" in shown
    assert "overloaded" not in shown
    assert "not finite" not in panel(explorers["free"], "d", 0, 0)  # a single token has no choice
    assert " overloaded, " in panel(explorers["free"], LINES, 0, 0)


def test_tokens_are_text_and_no_markup(explorers):
    shown = panel(explorers["stock"], "<script>alert(1)</script> $x$ 漢字 \0 " + LINES, 0, 0)
    assert "<script>" not in shown


def test_the_positions_of_roberta_begin_after_padding(explorers):
    roberta, one = explorers["roberta"], "1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1"
    lengths = [len(roberta.tokenizer(one[:i])["input_ids"]) for i in range(len(one) + 1)]
    assert max(lengths) > 32 or "takes 32" in panel(roberta, LINES, 0, 0)
    assert "takes 32" in panel(roberta, LINES, 0, 0)
    fits = one[: max(i for i, length in enumerate(lengths) if length <= 32)]
    assert 'role="alert"' not in panel(roberta, fits, 0, 0)


def test_a_model_that_has_diverged_says_so(explorers):
    explorer = explorers["stock"]
    with torch.no_grad():
        explorer.model.transformer.h[0].attn.c_attn.weight.fill_(math.nan)
    assert "not finite" in panel(explorer, LINES, 0, 0)


def test_without_gradio_the_error_says_how_to_get_it(folders, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "hf_lnfree.pages.explorer_app", raising=False)
    assert main(["explore", str(folders["free"])]) == 1
    assert "pip install 'hf_lnfree[app]'" in " ".join(capsys.readouterr().err.split())


ASK = """
import json, sys
from gradio_client import Client
client = Client(sys.argv[1], verbose=False)
asked = [client.predict(sys.argv[2], layer, head, api_name="/show") for layer, head in ((1, 2), (2, 0))]
print(json.dumps(asked))
"""


@pytest.fixture(scope="module")
def address(folders):
    """Where the command serves two models, in a process of its own that is ended as the system ends it."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("needs the extra app")
    command = [sys.executable, "-W", "ignore", "-m", "hf_lnfree.cli.main", "explore"]
    command += [str(folders["free"]), str(folders["bert"]), "--no-browser", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            (line,) = [line for line in itertools.islice(process.stdout, 1) if line.startswith("http://127.0.0.1:")]
            yield line.split()[0]
        finally:
            process.terminate()
            assert process.wait(20) == 143


def test_the_app_by_its_own_client(address):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ASK, address, LINES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (free, bert), (free_again, bert_again) = json.loads(done.stdout)
    assert "Layer 1, head 2" in free
    assert "The logit of" in free
    assert "predicts no next token" in bert
    assert "bert has no layer 2" in bert_again
    assert 'role="alert"' not in free_again
    with urllib.request.urlopen(address) as page:
        assert "default-src 'self'" in page.headers["content-security-policy"]


@pytest.mark.skipif(find_browser() is None, reason="needs a Chromium on the path, or named by CHROME")
def test_the_app_in_a_browser(address, tmp_path):
    with Browser(find_browser(), str(tmp_path)) as browser:
        browser.send("Page.navigate", url=address)
        browser.wait_for("document.querySelectorAll('svg').length >= 4")
        assert "The logit of" in browser.ask(TEXT)
        browser.fill("textarea", SHORT)
        browser.ask("[...document.querySelectorAll('button')].find(each => each.innerText == 'Show').click()")
        browser.wait_for(f"{TEXT}.includes('too short for a verdict')")
        browser.fill("input[type=number]", "2")
        browser.wait_for(f"{TEXT}.includes('bert has no layer 2') && {TEXT}.includes('Layer 2, head 0')")
        assert browser.problems == []
        assert [url for url in browser.requests if not url.startswith((address, "data:", "blob:", "about:"))] == []
