"""Does a function return a value? All weights fine-tuned, on models with and without LayerNorm.

    python examples/finetune_classification.py runs/without-norms runs/with-norms --seeds 0 1 2

Prints accuracy and F1 (averaged over classes) with 95 % intervals over seeds, beside always saying the commonest class.
"""

import argparse

from code_tasks import compare

import hf_lnfree  # noqa: F401  registers the models


def all_weights(model):
    return model


def main(args):
    settings = (args.steps, args.learning_rate, args.examples, args.out)
    return compare("returns", args.models, args.seeds, all_weights, *settings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders or Hub names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--examples", type=int, default=4000, help="to train on, at most")
    parser.add_argument("--out", help="a JSON file for the results")
    main(parser.parse_args())
