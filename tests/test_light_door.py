"""`import hf_lnfree` loads nothing heavy, and our models are found after it, whoever imports what first."""

import json
import subprocess
import sys

import pytest

from hf_lnfree.data.tokenization import train_bpe

from .conftest import GPT2, GPT_NEOX

HEAVY = (
    "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'accelerate', 'huggingface_hub'} & set(sys.modules)"
)
IMPORTS = {
    "ours alone": "import hf_lnfree",
    "ours, then transformers": "import hf_lnfree, transformers",
    "transformers, then ours": "import transformers, hf_lnfree",
    "the auto module, then ours": "import transformers.models.auto.modeling_auto, hf_lnfree",
    "the auto classes, then ours": "from transformers import AutoConfig, AutoTokenizer; import hf_lnfree",
    "a model of transformers, then ours": "from transformers import GPT2LMHeadModel; import hf_lnfree",
    "peft, then ours": "import peft, hf_lnfree",
    "ours, then peft": "import hf_lnfree, peft",
    "a name of ours": "from hf_lnfree import LNFreeGPT2Config",
    "a room of ours": "import hf_lnfree.models",
    "ours twice, through a room": "import hf_lnfree.errors, transformers, hf_lnfree.models",
}
FINDS = """
import json, sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
checkpoints = json.loads(sys.argv[1])
for folder, family in checkpoints:
    assert AutoConfig.from_pretrained(folder).model_type == family
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__module__.startswith("hf_lnfree.models.")
    assert len(AutoTokenizer.from_pretrained(folder)) > 256
    assert AutoConfig.for_model(family).model_type == family
    assert family in CONFIG_MAPPING
for names in (list(CONFIG_MAPPING), list(CONFIG_MAPPING.keys())):
    assert {family for _, family in checkpoints} <= {name for name in names if name.startswith("lnfree")}
"""
ADAPTS = """
from peft import LoraConfig, get_peft_model
for folder, _ in checkpoints:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert get_peft_model(model, LoraConfig(r=2)).num_parameters(only_trainable=True) > 0
"""
ITERATES = """
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
names = list(CONFIG_MAPPING)
assert names == [name for name, _ in CONFIG_MAPPING.items()]
ends = ["bert", "gpt2", "gpt_neox", "llama", "opt", "qwen3", "t5", "vit", "whisper"]
ours = [f"lnfree_{end}" for end in ends]
assert names[-9:] == ours
assert [config.model_type for config in CONFIG_MAPPING.values()][-9:] == ours
"""
IN_EVERY_ORDER = """
import json, os, sys, traceback
import torch._dynamo, torch.distributed.checkpoint, torch.distributed.tensor  # what transformers imports, once for all
for name, code in json.loads(sys.argv[2]).items():
    if not os.fork():
        try:
            exec(code, {})
        except BaseException:
            print(name, traceback.format_exc(), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    assert os.wait()[1] == 0, name
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    tokenizer = train_bpe(["def function(first): return first"], 300)
    found = []
    for family in (GPT2, GPT_NEOX):
        folder = tmp_path_factory.mktemp(family.name)
        family.model(vocab_size=len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found.append((str(folder), f"lnfree_{family.name}"))
    return json.dumps(found)


def test_a_bare_import_loads_nothing_heavy():
    assert run(f"import sys, hf_lnfree; {HEAVY}; print(sorted(heavy))") == "[]\n"
    assert run(f"import sys, hf_lnfree; dir(hf_lnfree), hf_lnfree.__version__; {HEAVY}; print(sorted(heavy))") == "[]\n"


def test_what_the_command_line_reads_early_is_light():
    modules = ["choices", "errors", "registration", "data.arguments", "removal.arguments", "training.fields"]
    modules += ["training.host_fields", "training.recipes", "cli.main"]
    code = f"import sys\nimport {', '.join(f'hf_lnfree.{module}' for module in modules)}\n{HEAVY}\nprint(sorted(heavy))"
    assert run(code) == "[]\n"


def test_our_models_are_found_in_every_order(checkpoints):
    codes = {name: imports + FINDS + ADAPTS * ("peft" in imports) for name, imports in IMPORTS.items()}
    codes["every configuration, models unseen"] = "import hf_lnfree" + ITERATES
    codes["every configuration, models seen"] = "import hf_lnfree.models" + ITERATES
    run(IN_EVERY_ORDER, checkpoints, json.dumps(codes))
