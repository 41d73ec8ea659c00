"""The path of a model of more than a billion parameters, with two layers: the benchmark of GPT-2 XL in small."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = {"vocab_size": 300, "n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 32, "dtype": "bfloat16"}


def test_it_trains_is_killed_goes_on_is_measured_and_saved(monkeypatch, corpus, cache_dir, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import billion

    fields = {
        "data": str(corpus),
        "cache_dir": cache_dir,
        "vocab_size": 300,
        "context_length": 32,
        "learning_rate": 1e-3,
    }
    found = billion.prove({**billion.XL, **fields, "config_overrides": TINY}, tmp_path, shard="40KB")
    trained, entropy = found["trained"], found["entropy"]
    assert trained["last_loss"] < trained["first_loss"]
    assert trained["samples"] == 3  # at the start, at step 10, at the end
    assert found["interrupted"]["steps"] < billion.STEPS
    assert found["resumed"]["equal_to_the_bit"]
    assert (entropy["heads"], entropy["finite"]) == (4, 4)
    assert found["evaluation"]["perplexity"] < 300
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert billion.prove({**billion.XL, **fields, "config_overrides": TINY}, tmp_path) == found  # nothing is done twice
