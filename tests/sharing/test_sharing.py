"""Cards and pushes: what a run recorded, nothing else, to a Hub of the tests and out of it again."""

import ast
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_lnfree.cli.main import main
from hf_lnfree.sharing import push
from hf_lnfree.sharing.card import write_card

from ..fences import fenced
from ..hub import Hub, run_commands

TINY = "{n_layer: 2, n_embd: 32, n_head: 2, n_positions: 32}"
NEOX = "{num_hidden_layers: 1, hidden_size: 32, num_attention_heads: 2, intermediate_size: 64}"
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


@pytest.mark.parametrize("secret", ["s3cr3t-value", 's3cr3t-"quoted"-value'])
@pytest.mark.parametrize(
    "name", ["merges.txt", "chat_template.jinja", "assets/table.json", "model.safetensors", "LICENSE", "deep/log.jsonl"]
)
def test_what_is_checked_for_secrets_is_what_is_pushed(run, tmp_path, monkeypatch, capsys, name, secret):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    monkeypatch.setenv("SERVICE_TOKEN", secret)
    (folder / name).parent.mkdir(exist_ok=True)
    with open(folder / name, "a") as file:
        file.write(json.dumps({"key": secret}))
    assert name in push.shared_files(folder)
    monkeypatch.setattr(push, "HfApi", lambda **_: pytest.fail("it was pushed"))
    assert main(["push", str(folder), "--repo-id", "me/tiny"]) == 1
    assert f"{folder / name} holds a secret" in capsys.readouterr().err


def test_a_token_that_is_logged_in_is_a_secret_too(run, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("hf_of_the_login")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "notes.json").write_text('{"by": "hf_of_the_login"}')
    with pytest.raises(ValueError, match=r"notes\.json holds a secret"):
        push.push_run(folder, "me/tiny")
    (folder / "notes.json").write_text('{"by": "hf_given_here"}')
    with pytest.raises(ValueError, match=r"notes\.json holds a secret"):
        push.push_run(folder, "me/tiny", token="hf_given_here")


def test_names_are_text_in_a_card(run, tmp_path, capsys):
    for name in ('a"); import os; os.system("true', "a/b/c", "me/<script>"):
        assert main(["card", str(run), "--repo-id", name]) == 1
        assert "Repo id must" in capsys.readouterr().err
    folder = tmp_path / 'it\'s "); 1 / 0; ("'
    shutil.copytree(run, folder)
    results = json.loads((folder / "results.json").read_text())
    results["row"] = results["name"] = "<script>alert(1)</script> | a\n# b"
    results["environment"]["device"] = "<img src=x>"
    (folder / "results.json").write_text(json.dumps(results))
    text = ModelCard.load(write_card(folder)).text
    assert "<" not in text
    assert "&lt;img src=x&gt;" in text
    assert not [line for line in text.splitlines() if line.startswith("# b")]
    loading = ast.parse(fenced(folder / "README.md", "python")[0])
    names = [call.args[0].value for call in ast.walk(loading) if isinstance(call, ast.Call)]
    assert names == [folder.name] * 2


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_a_colleague_without_the_package_runs_the_example_of_a_card(run, corpus, cache_dir, tmp_path, name):
    """transformers asks "[y/N]" on the terminal where a tokenizer's class follows from code that it may not run."""
    folder = run
    if name == "gpt_neox":
        folder = tmp_path / "tiny"
        train = [
            "train",
            "--family",
            "gpt_neox",
            "--row",
            "SM+G",
            "--config-overrides",
            NEOX,
            "--data",
            str(corpus),
            "--vocab-size",
            "300",
        ]
        train += ["--context-length", "32", "--max-steps", "1", "--probe-steps", "0", "--device", "cpu"]
        train += ["--cache-dir", cache_dir, "--out", str(folder), "--disable-tqdm", "true"]
        assert main(train) == 0
    (example,) = fenced(write_card(folder.resolve()), "python")
    assert example.count("trust_remote_code=True") == 2
    example += 'assert model(**tokenizer("def function(", return_tensors="pt")).logits.isfinite().all()'
    program = "import sys; sys.modules['hf_lnfree'] = None; exec(sys.argv[1])"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, example],
        **{"cwd": folder.parent, "env": environment, "stdin": subprocess.DEVNULL, "timeout": 120},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[y/N]" not in done.stdout


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
    assert pushed == set(push.shared_files(run))
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
