"""Which package of the standard library does a piece of code come from? LoRA on models with and without LayerNorm.

    python examples/finetune_lora.py runs/without-norms runs/with-norms --seeds 0 1 2

Prints accuracy and F1 (averaged over classes) with 95 % intervals over seeds, beside always saying the commonest class.
"""

from code_tasks import main
from peft import LoraConfig, get_peft_model

import hf_lnfree  # noqa: F401  registers the models


def with_lora(model):
    """LoRA needs no targets named: PEFT knows the model types of hf_lnfree. The head is trained beside it."""
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16))


if __name__ == "__main__":
    main(__doc__, "packages", with_lora, learning_rate=3e-3)
