"""Cards and pushes: what a run recorded, nothing else, to a Hub of the tests and out of it again."""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_lnfree.cli.main import main
from hf_lnfree.sharing import push
from hf_lnfree.sharing.card import write_card

from ..hub import Hub, run_commands

TINY = "{n_layer: 2, n_embd: 32, n_head: 2, n_positions: 32}"
LOADS = """
import sys
sys.modules["hf_lnfree"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
name, folder = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
ids = AutoTokenizer.from_pretrained(name)("def function(", return_tensors="pt")["input_ids"]
torch.save((ids, model(ids).logits.detach()), folder + "/out.pt")
"""


@pytest.fixture(scope="module")
def run(corpus, cache_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    arguments = ["train", "--row", "SM+R", "--config_overrides", TINY, "--data", str(corpus), "--vocab_size", "300"]
    arguments += ["--context_length", "32", "--max_steps", "3", "--save_steps", "2", "--probe_steps", "0", "--use_cpu"]
    arguments += ["--cache_dir", cache_dir, "--output_dir", str(folder), "--disable_tqdm", "true"]
    assert main(arguments) == 0
    data = ["--data", str(corpus), "--context-length", "32", "--out", str(folder / "evaluation.json")]
    assert main(["evaluate", str(folder), *data]) == 0
    return folder


@pytest.fixture
def hub(tmp_path):
    server = Hub(tmp_path / "hub")
    yield server
    server.shutdown()
    server.server_close()


def test_a_card_tells_what_was_recorded(run, capsys):
    assert 'from_pretrained("tiny", trust_remote_code=True)' in (run / "README.md").read_text()  # written by the run
    assert main(["card", str(run), "--repo-id", "me/tiny"]) == 0
    results = json.loads((run / "results.json").read_text())
    evaluation = json.loads((run / "evaluation.json").read_text())
    card = ModelCard.load(run / "README.md")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["perplexity"] == results["eval_perplexity"]
    assert values["bits_per_byte"] == evaluation["bits_per_byte"]["bits_per_byte"]
    assert values["overloaded_heads"] == results["overloaded_heads"]
    assert {r.dataset_name for r in card.data.eval_results} == {"local files, held out"}  # no path of this machine
    assert card.data.get("base_model") is None
    assert results["data"]["train"]["sha256"] in card.text
    assert 'from_pretrained("me/tiny", trust_remote_code=True)' in card.text
    assert "LNFreeGPT2ForCausalLM, norm none in the blocks and layernorm after the last, activation relu" in card.text
    assert "None" not in card.text
    assert str(run.parent) not in card.text


def test_what_is_not_known_is_left_out(run, tmp_path):
    results = json.loads((run / "results.json").read_text())
    for name in ("overloaded_heads", "collapsed_heads"):
        del results[name]
    results["eval_perplexity"] = None  # of a run that diverged
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    card = ModelCard.load(write_card(tmp_path))
    assert card.data.eval_results is None
    for absent in ("Measured", "entropy", "nan", "None"):
        assert absent not in card.text
    with pytest.raises(ValueError, match=r"holds no readable results\.json"):
        write_card(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        write_card(tmp_path)


def test_secrets_and_homes_stay_here(run, tmp_path, monkeypatch):
    results = json.loads((run / "results.json").read_text())
    monkeypatch.setenv("SERVICE_TOKEN", "s3cr3t-value")
    results["environment"]["device"] = "s3cr3t-value on the machine"
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "*** on the machine" in write_card(tmp_path).read_text()
    assert main(["push", str(tmp_path), "--repo-id", "me/tiny"]) == 1


def test_push_and_load_elsewhere(run, hub, tmp_path):
    hub.cut = ["create", "commit", "commit"]  # the connection breaks before the commit and in the middle of it
    command = ["push", str(run), "--repo-id", "me/tiny", "--private", "--revision", "first"]
    (done,) = run_commands(hub, [(command, {})])
    assert done["code"] == 0, done["err"]
    assert "/me/tiny/commit/" in done["out"]
    assert hub.cut == []
    assert hub.private == {"me/tiny": True}
    assert set(hub.branches) == {"first"}
    folder = hub.root / "me" / "tiny"
    pushed = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    wanted = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    wanted |= {"results.json", "entropy.json", "entropy.svg", "modeling_lnfree_gpt2.py", "normfree.py", "removal.py"}
    assert wanted <= pushed
    assert not [name for name in pushed if "checkpoint" in name or name.endswith(".bin") or name.startswith(".")]
    environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    start = [sys.executable, "-W", "ignore", "-c", LOADS, "me/tiny", str(tmp_path)]
    loaded = subprocess.run(start, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    ids, logits = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(run).eval()(ids).logits, logits)


def test_a_push_that_cannot_be_is_one_line(run, hub):
    cases = [
        ("me/tiny", {"HF_TOKEN": "hf_wrong"}, "Set HF_TOKEN"),
        ("me/tiny", {"HF_TOKEN": ""}, "Set HF_TOKEN"),
        ("others/tiny", {"HF_TOKEN": "hf_dummy"}, "may not write there"),
        ("a/b/c", {}, "Repo id must be in the form"),
        ("me/--bad--", {}, "me/--bad--"),
    ]
    commands = [(["push", str(run), "--repo-id", name], environment) for name, environment, _ in cases]
    cases += [("a protected branch", {}, "may not write there"), ("a gated model", {}, "gated/model")]
    dummy = {"HF_TOKEN": "hf_dummy"}
    commands += [(["push", str(run), "--repo-id", "me/tiny", "--revision", "protected"], dummy)]
    commands += [(["evaluate", "gated/model", "--data", str(run / "results.json")], dummy)]
    for (name, _, message), done in zip(cases, run_commands(hub, commands), strict=True):
        assert done["code"] == 1, name
        assert message in done["err"]
        assert len(done["err"].strip().splitlines()) == 1
    assert not [path for path in hub.root.rglob("*") if path.is_file() and path.is_relative_to(hub.root / "me")]


def test_a_run_with_push_to_hub_ends_on_the_hub(hub, corpus, cache_dir, tmp_path):
    command = ["train", "--row", "SM+G", "--config_overrides", TINY, "--data", str(corpus), "--vocab_size", "300"]
    command += [
        "--context_length",
        "32",
        "--max_steps",
        "2",
        "--probe_steps",
        "0",
        "--use_cpu",
        "--cache_dir",
        cache_dir,
    ]
    command += ["--output_dir", str(tmp_path / "run"), "--push_to_hub", "--hub_model_id", "me/pushed"]
    (done,) = run_commands(hub, [([*command, "--hub_token", "hf_dummy"], {"HF_TOKEN": ""})])
    assert done["code"] == 0, done["err"]
    folder = hub.root / "me" / "pushed"
    assert ModelCard.load(folder / "README.md").data.eval_results[0].metric_type == "perplexity"
    assert {"results.json", "entropy.svg", "model.safetensors", "normfree.py"} <= {p.name for p in folder.iterdir()}
    texts = [path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".md", ".py")]
    assert not [path.name for path in texts if "hf_dummy" in path.read_text()]


def test_a_hub_that_does_not_answer_is_asked_four_times(run, monkeypatch):
    asked = []

    class Unreachable:
        def __init__(self, token): ...

        def create_repo(self, *args, **kwargs):
            asked.append(args)
            raise push.TransportError("no route to host")

    monkeypatch.setattr(push, "HfApi", Unreachable)
    monkeypatch.setattr(push, "WAIT", 0)
    with pytest.raises(OSError, match="me/tiny could not be pushed: no route to host"):
        push.push_run(run, "me/tiny")
    assert len(asked) == 4
