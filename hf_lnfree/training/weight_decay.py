"""Which parameters weight decay pulls to zero: the matrices alone."""

from typing import TYPE_CHECKING

from torch import nn
from transformers import Trainer

# At run time the base of the mixin is the trainer that it stands before.
if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object


class DecayMatrices(Base):
    """
    Put before any trainer of transformers or TRL: gains and alphas of norms, slopes and temperatures are not decayed.

    Example:
        >>> class MatrixSFTTrainer(DecayMatrices, SFTTrainer): ...
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Those of the host's that have two dimensions or more."""
        matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
        return [name for name in super().get_decay_parameter_names(model) if name in matrices]
