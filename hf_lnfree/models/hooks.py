"""A function on the output of whatever module stands at a path of a block: adapters are put around modules later."""

from typing import Any

import torch
from torch import Tensor, nn


class OutputHook:
    """Mixin of a module that changes what a projection of its block returns."""

    path: str | None = None

    def change(self, projection: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """A forward hook of the projection."""
        raise NotImplementedError

    def attach(self, block: nn.Module, path: str) -> None:
        self.path = path
        block.get_submodule(path).register_forward_hook(self.change)
        block.register_forward_pre_hook(self.follow)

    def detach(self, block: nn.Module) -> None:
        """Undo `attach`."""
        for module in block.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if hook in (self.change, self.follow)]:
                    del hooks[key]

    def follow(self, block: nn.Module, args: Any) -> None:
        """Stay outermost at the path, also when an adapter was put around what stood there."""
        if torch.compiler.is_compiling():
            return
        assert self.path is not None
        outer = block.get_submodule(self.path)
        if self.change in outer._forward_hooks.values():
            return
        self.detach(block)
        self.attach(block, self.path)
