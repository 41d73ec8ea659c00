"""`hf-lnfree estimate`: what it prints, writes and refuses."""

import json
import shlex

import pytest

from hf_lnfree.cli.main import main
from hf_lnfree.cli.train import parse_arguments

from ..fences import ROOT

SMALL = str(ROOT / "examples" / "accelerate" / "small.yaml")
XL = str(ROOT / "examples" / "models" / "gpt2-xl.yaml")


def test_a_run_that_fits(tmp_path, capsys):
    out = tmp_path / "deep" / "estimate.json"
    flags = ["--devices", "4", "--gpu-memory", "40GiB", "--checkpointing", "--dtype", "float32", "--mfu", "0.4"]
    assert main(["estimate", SMALL, *flags, "--set", "seed=3", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "a vocabulary of 2,048" in text
    assert "Step: 4,096 tokens; 8 windows of 128 tokens on each device, gradient accumulation 1." in text
    found = json.loads(out.read_text())
    assert found["estimate"]["fits"] is True
    assert (found["devices"]["count"], found["devices"]["memory"]) == (4, 40 * 2**30)
    assert found["estimate"]["tokens"] == 600 * 4096
    assert found["accelerate"] == "examples/accelerate/two_gpus.yaml"
    assert (ROOT / found["accelerate"]).is_file()
    launch = shlex.split(found["launch"])
    assert launch[:6] == ["accelerate", "launch", "--config_file", found["accelerate"], "--num_processes", "4"]
    _, _, args = parse_arguments([*launch[launch.index("train") + 1 :], "--device", "cpu"])
    assert (args.seed, args.gradient_checkpointing, args.bf16) == (3, True, False)


def test_what_does_not_fit_is_refused_and_written_all_the_same(tmp_path, capsys):
    out = tmp_path / "estimate.json"
    assert main(["estimate", XL, "--gpu-memory", "24GB", "--out", str(out)]) == 1
    shown = capsys.readouterr()
    assert "does not fit" in shown.err
    assert "makes it fit: " in shown.err
    assert "Start it" not in shown.out
    assert json.loads(out.read_text())["estimate"]["fits"] is False
    assert main(["estimate", XL, "--devices", "2", "--gpu-memory", "40GB", "--fsdp", "--tokens", "1000000"]) == 0
    shown = capsys.readouterr().out
    assert "two_gpus_fsdp2.yaml" in shown
    assert "for 1,000,000 tokens" in shown


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--gpu-memory", "80"], 1, "--gpu-memory must be a size above 0 with its unit"),
        (["--gpu-memory", "manyGB"], 1, "--gpu-memory"),
        (["--gpu-memory", "0GB"], 1, "--gpu-memory"),
        (["--gpu-memory", "-1GB"], 1, "--gpu-memory"),
        (["--dtype", "half"], 1, "--dtype must be one of 'float32'"),
        (["--optim", "adam"], 1, "optim"),
        (["--optim", "galore_adamw", "--set", "optim_target_modules=all"], 1, "no estimate for optim"),
        (["--devices", "0"], 2, "--devices"),
        (["--mfu", "2"], 1, "mfu must be at most 1"),
        (["--mfu", "nan"], 1, "mfu must be above 0"),
        (["--peak-flops", "-1"], 1, "peak_flops must be above 0"),
        (["--tokens", "0"], 2, "--tokens"),
        (["--set", "context_length"], 1, "--set takes field=value"),
    ],
)
def test_what_is_wrong_is_said(flags, code, named, capsys):
    assert main(["estimate", SMALL, *flags]) == code
    assert named in capsys.readouterr().err


def test_a_file_that_is_not_there(capsys):
    assert main(["estimate", "nowhere.yaml"]) == 1
    assert "There is no configuration file nowhere.yaml" in capsys.readouterr().err
