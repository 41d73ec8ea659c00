"""What eager attention computes, in float64: the logits of every softmax over keys that a model runs."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Softmaxes(TorchFunctionMode):
    """Collects logits [B, H, Q, K] inside, in the order of the calls; they carry a gradient."""

    def __init__(self):
        super().__init__()
        self.logits = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.softmax, torch.softmax, torch.Tensor.softmax) and args[0].dim() == 4:
            self.logits.append(args[0].double())
        return function(*args, **(kwargs or {}))

    def entropies(self, sinks=0):
        """[B, H, Q] by the definition, of all but the last `sinks` columns."""
        found = []
        for logits in self.logits:
            logs = logits.log_softmax(-1)[..., : logits.shape[-1] - sinks].clamp_min(-1e4)  # 0 ln 0 is 0
            found.append(-(logs.exp() * logs).sum(-1))
        return found
