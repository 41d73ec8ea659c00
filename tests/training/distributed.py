"""What two processes do, told by themselves.

Usage: torchrun --nproc-per-node 2 -m tests.training.distributed ddp|fsdp2 FOLDER CORPUS CACHE (writes FOLDER/told.json)
       accelerate launch ... -m tests.training.distributed killed ARGUMENTS (of hf-lnfree)
"""

import json
import math
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import default_data_collator

from hf_lnfree.cli.main import main
from hf_lnfree.data import DataArguments, load_data
from hf_lnfree.data.windows import TokenWindows, window_batches
from hf_lnfree.training import LNFreeTrainer, LNFreeTrainingArguments
from hf_lnfree.training.divergence import DivergenceGuard
from hf_lnfree.training.recorder import FlightRecorder
from hf_lnfree.training.steps import StepRecord
from tests.conftest import GPT2, GPT_NEOX


class Recording(TokenWindows):
    """Remembers which windows were read."""

    def __getitems__(self, indices):
        self.read.extend(indices)
        return super().__getitems__(indices)


def ddp(folder, corpus, cache):
    """One epoch: the windows each process read, its samples, and whether its weights are those of the others."""
    data = load_data(DataArguments(data=corpus, cache_dir=cache, vocab_size=300, context_length=32))
    data.train.__class__, data.train.read = Recording, []
    model = GPT2.model(vocab_size=300, norm="none", activation="learnable_leaky_relu", slope_scope="global")
    args = LNFreeTrainingArguments(
        str(folder / "run"), num_train_epochs=1, per_device_train_batch_size=4, logging_steps=5, probe_steps=5,
        save_steps=20, use_cpu=True, disable_tqdm=True, learning_rate=1e-3, seed=1,
    )  # fmt: skip
    trainer = LNFreeTrainer(
        model,
        args,
        train_dataset=data.train,
        data_collator=default_data_collator,
        probe=window_batches(data.validation, 4),
    )
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    samples = [{k: v for k, v in s.items() if "entropy" in k} for s in trainer.recorder.samples]
    return {"read": data.train.read, "windows": len(data.train), "samples": samples, "weights": weights.sum().item()}


def fsdp2(folder, corpus, cache):
    """Losses and a sample of the recorder: of a sharded model with half a batch each, and of a whole one with all."""
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    told = {}
    ids = torch.randint(3, 99, (4, 16), generator=torch.Generator().manual_seed(0))
    for family in (GPT2, GPT_NEOX):
        for sharded in (True, False):
            model = family.model(norm="none", activation="learnable_leaky_relu").train()
            if sharded:
                for block in family.block_list(model):
                    fully_shard(block, mesh=mesh)
                fully_shard(model, mesh=mesh)
            batch = ids.chunk(2)[dist.get_rank()] if sharded else ids
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            found = []
            for _ in range(4):
                loss = model(batch, labels=batch).loss
                loss.backward()
                mean = loss.detach().clone()
                if sharded:
                    dist.all_reduce(mean)
                    mean /= dist.get_world_size()
                found.append(mean.item())
                optimizer.step()
                optimizer.zero_grad()
            # Gradients of all of `ids` on both sides: each process has half of them when they are sharded.
            model(batch, labels=batch).loss.backward()
            recorder = FlightRecorder(
                [ids], model=lambda model=model: model, step=StepRecord(), log=print, every=1, kept=1
            )
            sample = recorder.grad_norms(1.0) | recorder.sample([ids])
            told.setdefault(family.name, {})["sharded" if sharded else "whole"] = {"losses": found, "sample": sample}
    return told | {"commands": commands(folder)}


# As `accelerate launch` tells it the processes that it starts.
ASKS_FOR_SHARDS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


def commands(folder):
    """
    The commands in FOLDER/jobs.json, one after the other, with sharded models.

    Of each the exit code and what was not finite. A job with a step `nan` has an MLP of process 1 give NaN then, in the
    second batch of that step.
    """
    os.environ |= ASKS_FOR_SHARDS
    step, diverge, found = LNFreeTrainer.training_step, DivergenceGuard.diverge, []

    def training_step(self, model, inputs, num_items_in_batch=None):
        second = len(self.step_record.batches) == 1
        if dist.get_rank() == 1 and second and self.state.global_step + 1 == job.get("nan"):
            mlp = self.unwrapped.transformer.h[1].mlp
            mlp.register_forward_hook(lambda *call: call[-1].index_fill(-1, torch.tensor([0]), math.nan))
        return step(self, model, inputs, num_items_in_batch)

    def remembered(self, *args):
        diverge(self, *args)
        found.append(self.events[-1]["first"])

    LNFreeTrainer.training_step, DivergenceGuard.diverge = training_step, remembered
    told = []
    for job in json.loads((folder / "jobs.json").read_text()):
        found.clear()
        os.environ["FSDP_STATE_DICT_TYPE"] = job["state_dict"]
        told.append({"code": main(job["arguments"]), "not finite": list(found)})
    return told


def killed(*arguments):
    """`hf-lnfree` with these arguments, of which process 1 dies in its fifth step."""
    take = LNFreeTrainer._get_grad_norm

    def get_grad_norm(self, *args, **kwargs):
        if self.state.global_step == 4 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, *args, **kwargs)

    LNFreeTrainer._get_grad_norm = get_grad_norm
    sys.exit(main(arguments))


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        killed(*sys.argv[2:])
    mode, folder = sys.argv[1], Path(sys.argv[2])
    mine = {"ddp": ddp, "fsdp2": fsdp2}[mode](folder, *sys.argv[3:])
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        (folder / "told.json").write_text(json.dumps(everyone))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # past gloo's teardown, which now and then aborts
