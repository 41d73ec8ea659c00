"""Every model type of the installed transformers, small and random: is every softmax attention recorded, and right?

The truth is independent of the package: each softmax that the eager model computes inside an attention (by the name of
the function or the class around it), and each attention of torch that it calls, in float64. A type is built and fed by
the first of several settings with which it runs. Verdicts:

    pass        every softmax is recorded, with its entropy and number of keys, under eager attention and under sdpa
    refused     an AttentionError names the attention that is not recorded
    wrong       something recorded is not what eager attention computes
    missing     a softmax was left out without a word
    crash       any other exception
    none        the model has no softmax attention, and the recorder says so
    not run     no setting builds the model here, or runs it (a missing library, inputs that are not guessed)

Usage: python benchmarks/census.py OUT.json [TYPE ...]
"""

import collections
import itertools
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import torch.nn.functional as F
import transformers
from census_models import configurations, inputs
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from hf_lnfree.analysis.capture import record_attention_entropy
from hf_lnfree.errors import AttentionError

SECONDS, PARAMETERS = 120, 3e8
TOLERANCE = 2e-4  # nats, at logits of some tens
UNUSED = ("Sam2MultiScaleAttention",)  # compute a softmax that nothing reads
SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class Truth(TorchFunctionMode):
    """Collects entropies and numbers of keys [..., Q] of the softmaxes of attentions; names those elsewhere."""

    def __init__(self):
        super().__init__()
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.largest = 0.0  # logit
        self.elsewhere: collections.Counter = collections.Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in SOFTMAX or function is torch.logsumexp:
            logits = args[0] if args else kwargs["input"]
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            place, attends, frame = where()
            if function is torch.logsumexp and "sink_scale" in frame.f_code.co_varnames:
                pass  # the softmax beside it is told of the sink
            elif type(frame.f_locals.get("self")).__name__ in UNUSED:
                pass
            elif attends and dim in (-1, logits.dim() - 1) and logits.dim() > 2:
                self.keep(*with_sink(logits, frame), windows="Swin" in place or "ClapAudio" in place)
            else:
                self.elsewhere[f"{place} {list(logits.shape)} over {dim}"] += 1
        elif function is F.scaled_dot_product_attention:
            self.keep(sdpa_logits(*args, **kwargs))
        elif function is F.multi_head_attention_forward:
            again = {**kwargs, "need_weights": True, "average_attn_weights": False}
            self.keep(function(*args, **again)[1].double().log())
        return function(*args, **kwargs)

    def keep(self, logits: Tensor, sinks: int = 0, windows: bool = False) -> None:
        logs, kept = logits.double().log_softmax(-1), slice(0, logits.shape[-1] - sinks)
        logs = logs[..., kept]
        keys = keys_of(logits.double()[..., kept], windows)
        self.largest = max(self.largest, float(logits.amax()))
        self.rows.append((-(logs.exp() * logs.clamp_min(-1e4)).sum(-1), keys))


def keys_of(logits: Tensor, windows: bool) -> Tensor:
    """
    How many keys [..., Q] are not hidden, as most models do with -1e4 and less.

    Shifted `windows` hide with -100: there the widest gap in a row tells, if it is wider than logits make it.
    """
    logits = logits.clamp_min(-1e9)
    top = logits.amax(-1, keepdim=True)
    if not windows or logits.shape[-1] == 1:
        return ((logits > -9e3) | (logits > top - 5e3)).sum(-1)
    ranked = logits.sort(-1, descending=True).values
    gap, last = (ranked[..., :-1] - ranked[..., 1:]).max(-1)
    return (last + 1).where(gap > 60, ranked.shape[-1])


def where() -> tuple[str, bool, Any]:
    """The innermost module's class, whether it or a function inside is named for attention, and the calling frame."""
    frame = caller = sys._getframe(2)
    names = []
    while frame is not None:
        owner = frame.f_locals.get("self")
        names.append(frame.f_code.co_name)
        if isinstance(owner, nn.Module) and not type(owner).__module__.startswith("torch."):
            names.append(type(owner).__name__)
            if "softmax" not in names[-1].lower():
                break
        frame = frame.f_back
    text = " ".join(names).lower()
    while caller.f_code.co_filename.startswith(os.path.dirname(torch.__file__)):
        caller = caller.f_back
    return names[-1], ("attention" in text or "attn" in text) and "deformable" not in text, caller


def with_sink(logits: Tensor, frame: Any) -> tuple[Tensor, int]:
    """Logits with the sinks of the module whose attention function runs, and how many columns they are."""
    module, key = frame.f_locals.get("module"), frame.f_locals.get("key")
    if not isinstance(key, Tensor) or logits.shape[-1] == key.shape[-2] + 1:
        return logits, int(isinstance(key, Tensor) and logits.dim() == 4)
    if isinstance(sinks := getattr(module, "sinks", None), Tensor):
        return torch.cat((logits, sinks.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)), -1), 1
    return logits, 0


def sdpa_logits(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """[..., Q, K] in float64."""
    query, key = query.double(), key.double()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is None:
        return logits
    return logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask


def compare(truth: list[tuple[Tensor, Tensor]], found: list[tuple[Tensor, Tensor]]) -> str:
    """What is wrong with the rows found, else nothing; calls that are cut or ordered otherwise are compared sorted."""
    counts = [sum(entropy.numel() for entropy, _ in rows) for rows in (truth, found)]
    if counts[0] != counts[1]:
        return f"missing: {counts[1]} of {counts[0]} rows, {len(found)} of {len(truth)} calls"
    shapes = [sorted(entropy.shape for entropy, _ in rows) for rows in (truth, found)]
    if shapes[0] != shapes[1]:  # cut or ordered otherwise
        sides = (in_order(joined(rows)) for rows in (truth, found))
        reason = difference(*itertools.chain(*sides))
        return reason and f"wrong: sorted, {reason}"
    unmatched = list(truth)  # modules that run several times are recorded together, whatever ran between
    for index, (ours, support) in enumerate(found):
        places = [i for i, (true, _) in enumerate(unmatched) if true.shape == ours.shape]
        reasons = [difference(*unmatched[i], ours, support) for i in places]
        if "" not in reasons:
            return f"wrong: call {index}, {list(ours.shape)}, {min(reasons, key=len)}"
        unmatched.pop(places[reasons.index("")])
    return ""


def difference(true: Tensor, keys: Tensor, ours: Tensor, support: Tensor) -> str:
    alive = support > 0  # eager attention gives hidden rows a uniform map
    off = (true - ours.double()).abs().where(alive, 0.0).max()
    if not off <= TOLERANCE * max(1.0, float(true.max())):
        return f"by {float(off):.2g} nats"
    if (keys != support).logical_and(alive).any():
        return f"{keys.unique().tolist()[:4]} keys, said {support.unique().tolist()[:4]}"
    return ""


def joined(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return tuple(torch.cat([part.flatten() for part in parts]) for parts in zip(*rows, strict=True))


def in_order(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Sorted by entropy and, apart, by keys."""
    return tuple(part.flatten().sort().values for part in rows)


def recorded(model: nn.Module, batch: dict[str, Any], method: str) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad(), record_attention_entropy(model, method) as record:
        run(model, batch)
    return [(r.entropy, r.support.expand_as(r.entropy)) for calls in record.calls.values() for r in calls]


def run(model: nn.Module, batch: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**batch)


def same(output: Any, other: Any) -> bool:
    """Whether the first tensors of two outputs are alike."""
    first, second = (next(x for x in o.to_tuple() if isinstance(x, Tensor)) for o in (output, other))
    return torch.allclose(first, second, rtol=1e-2, atol=1e-2 * float(second.abs().max()))


def build(cls: type, config: Any, implementation: str, factor: float = 3.0) -> nn.Module:
    """A model whose weights are multiplied by a factor, so that its logits are not all alike."""
    torch.manual_seed(0)
    model = cls._from_config(type(config).from_dict(config.to_dict()), attn_implementation=implementation).eval()
    for parameter in model.parameters():
        if parameter.dim() in (2, 4):  # of linear maps and convolutions, no temperatures
            parameter.data.mul_(factor)
    return model


def first_that_runs(kind: str) -> Iterator[Any]:
    """Class, configuration, inputs and eager model of every setting that runs."""
    names = MODEL_MAPPING_NAMES[kind]
    cls = getattr(transformers, names if isinstance(names, str) else names[0])
    reasons: list[str] = []
    for config in configurations(kind, CONFIG_MAPPING[kind], reasons):
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in cls._from_config(type(config).from_dict(config.to_dict())).parameters())
            if size > PARAMETERS:
                reasons.append(f"{size / 1e6:.0f} million parameters")
                continue
            model = build(cls, config, "eager")
        except Exception as error:
            reasons.append(f"build: {type(error).__name__} {str(error).strip()[:150]}")
            continue
        for batch in itertools.islice(inputs(kind, model, config), 24):
            try:
                run(model, batch)
            except Exception as error:
                reasons.append(f"run: {type(error).__name__} {str(error).strip()[:150]}")
                continue
            yield cls, config, batch, model
            break
    raise LookupError(" | ".join(dict.fromkeys(reasons[-6:])))


def examine(kind: str) -> dict[str, Any]:
    """The verdict on a model type, with its reason."""
    silent = None
    try:
        for cls, config, batch, model in first_that_runs(kind):
            factor = 3.0
            with Truth() as truth:
                output = run(model, batch)
            if truth.largest > 500:  # as far apart as what a mask hides
                factor, model = 1.0, build(cls, config, "eager", 1.0)
                with Truth() as truth:
                    output = run(model, batch)
            silent = (cls, config, batch, model, truth, output, factor)
            if truth.rows:
                break
    except LookupError as error:
        if silent is None:
            return {"verdict": "not run", "note": str(error)}
    cls, config, batch, model, truth, output, factor = silent
    result: dict[str, Any] = {"calls": len(truth.rows), "elsewhere": dict(truth.elsewhere)}
    settings = [("eager", "auto"), ("eager", "attentions"), ("sdpa", "auto")]
    verdicts = {}
    for implementation, method in settings:
        if implementation == "sdpa":
            try:
                model = build(cls, config, "sdpa", factor)
                alike = same(run(model, batch), output)
            except Exception:
                continue
            if not alike:
                verdicts["sdpa/auto"] = "differs from eager attention in transformers itself"
                continue
        verdicts[f"{implementation}/{method}"] = judge(model, batch, method, truth.rows)
    order = ("crash", "wrong", "missing", "refused", "none", "pass")
    judged = [v.partition(":")[0] for v in verdicts.values() if "differs" not in v]
    return {"verdict": min(judged, key=order.index), **result, "settings": verdicts}


def judge(model: nn.Module, batch: dict[str, Any], method: str, truth: list[tuple[Tensor, Tensor]]) -> str:
    try:
        found = recorded(model, batch, method)
    except AttentionError as error:
        named = "No attention of" not in str(error) or "A softmax ran in" in str(error)
        return f"refused: {error}" if named else "missing: not named" if truth else "none"
    except Exception as error:
        return f"crash: {type(error).__name__} {str(error).strip()[:300]}"
    return compare(truth, found) or "pass"


def child(kind: str, pipe: Any) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(50)
    torch.set_num_threads(1)
    try:
        pipe.send(examine(kind))
    except BaseException as error:
        pipe.send({"verdict": "not run", "note": f"{type(error).__name__} {error}"[:300]})


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """How many types have each verdict, which have it, and why where it is neither good nor empty."""
    counts = collections.Counter(result["verdict"] for result in results.values())
    types = {verdict: [kind for kind, r in results.items() if r["verdict"] == verdict] for verdict in sorted(counts)}
    reasons = {
        kind: result.get("settings") or result["note"]
        for kind, result in results.items()
        if result["verdict"] not in ("pass", "none")
    }
    return {"counts": dict(counts), "types": types, "reasons": reasons}


def main(path: str, kinds: list[str]) -> None:
    """Each type in a process of its own, which may die or be too slow."""
    context = multiprocessing.get_context("fork")
    results: dict[str, Any] = {}
    for kind in kinds or sorted(MODEL_MAPPING_NAMES):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(kind, send))
        process.start()
        send.close()
        try:
            results[kind] = receive.recv() if receive.poll(SECONDS) else {"verdict": "not run", "note": "too slow"}
        except EOFError:
            results[kind] = {"verdict": "not run", "note": "the process died"}
        process.kill()
        process.join()
    report = {"transformers": transformers.__version__, "torch": torch.__version__, **summary(results)}
    with open(path, "w") as file:
        json.dump(report, file, indent=1)
    print(f"transformers {transformers.__version__}, {len(results)} model types: {report['counts']}")
    for kind, result in results.items():
        if result["verdict"] not in ("pass", "none", "not run"):
            print(f"  {kind}: {result['verdict']} {result.get('settings', '')}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
