"""Loads the checkpoints of the command line in two processes, each with its share; prints logits, or the error."""

import os
import sys
import warnings

import torch

from hf_lnfree import LNFreeGPTNeoXForCausalLM
from hf_lnfree.models.errors import ConfigurationError

warnings.simplefilter("ignore")
torch.distributed.init_process_group("gloo")
for folder in sys.argv[1:]:
    try:
        model = LNFreeGPTNeoXForCausalLM.from_pretrained(folder, tp_plan="auto")
        with torch.no_grad():
            said = f"{model(torch.arange(8)[None]).logits.double().sum().item():.6f}"
    except ConfigurationError as error:
        said = f"refused: {error}"
    if os.environ["RANK"] == "0":
        print(f"{os.path.basename(folder)}|{said}", flush=True)
torch.distributed.destroy_process_group()
