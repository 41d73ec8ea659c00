"""Does a function return a value? All weights fine-tuned, on models with and without LayerNorm.

    python examples/finetune_classification.py runs/without-norms runs/with-norms --seeds 0 1 2

Prints accuracy and F1 (averaged over classes) with 95 % intervals over seeds, beside always saying the commonest class.
"""

from code_tasks import main

import hf_lnfree  # noqa: F401  registers the models


def all_weights(model):
    return model


if __name__ == "__main__":
    main(__doc__, "returns", all_weights, learning_rate=1e-3)
