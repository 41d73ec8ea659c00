"""Two classification tasks out of Python's standard library, and one way to fine-tune and score on them.

Documents are told apart by the hash of their file, so no file stands on both sides.
"""

import argparse
import ast
import hashlib
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_lnfree.data.corpus import STDLIB, load_corpus
from hf_lnfree.provenance import command, environment
from hf_lnfree.studies.statistics import estimate

PACKAGES = ("asyncio", "concurrent", "ctypes", "email", "http", "importlib", "logging", "multiprocessing", "unittest")
PACKAGES += ("xml",)
HELD_OUT = 0.25  # share of files


def held_out(name):
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 < HELD_OUT


def own_nodes(function):
    """What a function consists of, without the functions and classes inside it."""
    stack = list(function.body)
    while stack:
        node = stack.pop()
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield node
            stack.extend(ast.iter_child_nodes(node))


def is_docstring(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def returning_functions():
    """
    (file key, text, label): does this function return a value?

    Shown are its name, its arguments and its first three statements that hold no return; what would give the answer
    away, a docstring, annotations and every statement with a return in it, is left out and leaves no trace.
    """
    for source in load_corpus(STDLIB).texts:
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            label = int(any(isinstance(part, ast.Return) and part.value is not None for part in own_nodes(node)))
            kept = [
                s for s in node.body if not is_docstring(s) and not any(isinstance(n, ast.Return) for n in ast.walk(s))
            ]
            if len(kept) >= 3:
                node.body, node.returns = kept[:3], None
                yield source[:2000], ast.unparse(node), label


def package_windows(length=600):
    """(file key, text, label): which package of the standard library does this piece of a file come from?"""
    root = Path(ast.__file__).parent
    for label, package in enumerate(PACKAGES):
        for path in sorted((root / package).rglob("*.py")):
            if "test" in path.parts or "tests" in path.parts:
                continue
            text = path.read_text(encoding="utf-8", errors="ignore").replace(package, "package")
            for start in range(0, len(text) - length // 2, length):
                yield str(path.relative_to(root)), text[start : start + length], label


TASKS = {"returns": (returning_functions, 2), "packages": (package_windows, len(PACKAGES))}


def load_task(name, most):
    """Train and test sets with `text` and `label`, at most `most` and a quarter of it, and the number of labels."""
    examples, labels = TASKS[name]
    sides = {False: [], True: []}
    for key, text, label in examples():
        sides[held_out(key)].append({"text": text, "label": label})
    rng = np.random.default_rng(0)
    chosen = []
    for side, limit in ((sides[False], most), (sides[True], most // 4)):
        order = rng.permutation(len(side))[:limit]
        chosen.append(Dataset.from_list([side[i] for i in order]))
    return *chosen, labels


def scores(predicted, labels):
    """Accuracy, and F1 averaged over classes."""
    f1 = []
    for label in np.unique(labels):
        hits = np.sum((predicted == label) & (labels == label))
        f1.append(2 * hits / max(1, np.sum(predicted == label) + np.sum(labels == label)))
    return {"accuracy": float(np.mean(predicted == labels)), "f1": float(np.mean(f1))}


def fine_tune(folder, train, test, labels, seed, prepare, steps, learning_rate):
    """Scores on the test set of a model fine-tuned from `folder`; `prepare` may wrap it."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    model.config.pad_token_id = tokenizer.pad_token_id
    longest = model.config.max_position_embeddings

    def tokenise(rows):
        return tokenizer(rows["text"], truncation=True, max_length=longest)

    train, test = (part.map(tokenise, batched=True, remove_columns="text") for part in (train, test))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            learning_rate=learning_rate,
            warmup_steps=0.1,
            weight_decay=0.01,
            save_strategy="no",
            logging_steps=max(1, steps // 4),
            seed=seed,
        )
        trainer = Trainer(
            prepare(model), arguments, train_dataset=train, data_collator=DataCollatorWithPadding(tokenizer)
        )
        trainer.train()
        output = trainer.predict(test)
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    return scores(logits.argmax(-1), output.label_ids)


def compare(task, folders, seeds, prepare, steps, learning_rate, examples=4000, out=None):
    """Fine-tune every model with every seed; print accuracy and F1 with intervals beside the majority baseline."""
    train, test, labels = load_task(task, examples)
    targets = np.array(test["label"])
    majority = Counter(train["label"]).most_common(1)[0][0]
    results = {"majority": scores(np.full_like(targets, majority), targets)}
    print(f"{task}: {len(train)} examples to train on, {len(test)} held out, {labels} classes")
    print(f"majority baseline: accuracy {results['majority']['accuracy']:.3f}, F1 {results['majority']['f1']:.3f}")
    for folder in folders:
        runs = [fine_tune(folder, train, test, labels, seed, prepare, steps, learning_rate) for seed in seeds]
        results[str(folder)] = runs
        shown = {name: estimate([run[name] for run in runs]).format(3) for name in ("accuracy", "f1")}
        print(f"{folder}: accuracy {shown['accuracy']}, F1 {shown['f1']}")
    if out is not None:
        record = {"task": task, "seeds": seeds, "steps": steps, "learning_rate": learning_rate, "results": results}
        record |= {"train": len(train), "test": len(test), "environment": environment(), "command": command()}
        Path(out).write_text(json.dumps(record, indent=1) + "\n")
    return results


def main(description, task, prepare, learning_rate):
    """The command line of a script: models and seeds into `compare`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders or Hub names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--examples", type=int, default=4000, help="to train on, at most")
    parser.add_argument("--out", help="a JSON file for the results")
    args = parser.parse_args()
    compare(task, args.models, args.seeds, prepare, args.steps, args.learning_rate, args.examples, args.out)
