"""Stock checkpoints, as transformers writes them, become models of ours with the same logits to the bit."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from hf_lnfree.conversion import Checkpoint, convert, convert_checkpoint, load
from hf_lnfree.conversion.stock_to_ours import ours

from ..conftest import GPT2, GPT_NEOX, HEADS
from ..hub import Hub, run_commands
from .conftest import logits, trained


@pytest.fixture
def stock(family, tmp_path):
    """A stock model and the folder it is saved in."""
    model = trained(family.stock_model())
    model.save_pretrained(tmp_path / "stock")
    return model, tmp_path / "stock"


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_logits_equal_stock_bit_for_bit(family, form, shard, input_ids, tmp_path):
    model = trained(family.stock_model(**form))
    model.save_pretrained(tmp_path / "stock", max_shard_size=shard)
    count = len(list((tmp_path / "stock").glob("*.safetensors")))
    assert (count > 1) == (shard == "20KB")
    convert_checkpoint(Checkpoint(tmp_path / "stock"), tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) == count
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(converted) is family.head("CausalLM")
    assert torch.equal(logits(converted, input_ids), logits(model, input_ids))
    assert torch.equal(logits(load(Checkpoint(tmp_path / "stock"))[0], input_ids), logits(model, input_ids))
    assert torch.equal(logits(ours(model), input_ids), logits(model, input_ids))


@pytest.mark.parametrize("head", HEADS[1:])
def test_other_heads_come_along(family, head, input_ids, tmp_path):
    model = trained(family.stock_model(head=head))
    model.save_pretrained(tmp_path / "stock")
    convert_checkpoint(Checkpoint(tmp_path / "stock"), tmp_path / "ours")
    converted = family.head(head).from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        for value, expected in zip(converted(input_ids).values(), model(input_ids).values(), strict=True):
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, expected)


def test_one_shard_at_a_time_is_in_memory(family, tmp_path, monkeypatch):
    family.stock_model().save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    alive = []
    read = Checkpoint.shard

    def watched(self, file):
        gc.collect()
        assert not [ref for ref in alive if ref() is not None], "an earlier shard is still in memory"
        tensors = read(self, file)
        alive.extend(map(weakref.ref, tensors.values()))
        return tensors

    monkeypatch.setattr(Checkpoint, "shard", watched)
    convert_checkpoint(Checkpoint(tmp_path / "stock"), tmp_path / "ours")
    assert len(alive) > 10


def test_old_checkpoints(family, stock, input_ids, tmp_path):
    """Pickled weights, names without the backbone's prefix, and the masks of former times."""
    model, folder = stock
    prefix = f"{model.base_model_prefix}."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    block = next(name for name in tensors if name.endswith(("attn.c_attn.bias", "query_key_value.bias")))
    tensors[block.rpartition(".")[0].rpartition(".")[0] + ".bias"] = torch.ones(1, 1, 64, 64).tril().bool()
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    convert_checkpoint(Checkpoint(folder), tmp_path / "ours")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(logits(converted, input_ids), logits(model, input_ids))


def test_tokenizer_and_generation_settings_come_along(family, stock, tmp_path):
    from tokenizers import Tokenizer, models

    _, folder = stock
    vocabulary = {letter: index for index, letter in enumerate("abcdefgh")}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a"))).save_pretrained(
        folder
    )
    convert(str(folder), tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("c")["input_ids"] == [2]
    assert (tmp_path / "ours" / "generation_config.json").is_file()
    assert json.loads((tmp_path / "ours" / "conversion.json").read_text())["largest_difference"] == 0


def test_a_stored_head_that_differs_from_the_embedding_is_kept(family, input_ids, tmp_path):
    model = trained(family.stock_model(tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "stock")
    edit_config(tmp_path / "stock", tie_word_embeddings=True)
    result = convert_checkpoint(Checkpoint(tmp_path / "stock"), tmp_path / "ours")
    assert "weight of its own" in result.notes[0]
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(logits(converted, input_ids), logits(model, input_ids))


def forget_architecture(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "architectures"}))


@pytest.mark.parametrize("head", HEADS)
def test_a_configuration_that_names_no_class_has_the_one_that_its_tensors_fit(family, head, tmp_path):
    """Of a stock checkpoint and of one of ours; GPT-2's head has no tensor of its own."""
    for place, model in (("stock", family.stock_model(head=head)), ("ours", family.model(head=head))):
        model.save_pretrained(tmp_path / place)
        forget_architecture(tmp_path / place)
        assert type(load(Checkpoint(tmp_path / place))[0]) is family.head(head)


def test_a_backbone_that_names_no_class_stays_one(family, tmp_path):
    for place, model in (("stock", family.stock_model()), ("ours", family.model())):
        model.base_model.save_pretrained(tmp_path / place)
        forget_architecture(tmp_path / place)
        assert type(load(Checkpoint(tmp_path / place))[0]) is type(family.model().base_model)


def test_a_class_that_is_not_ours_is_refused_by_name(family, tmp_path):
    family.model().save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["LNFreeMistralForCausalLM"])
    with pytest.raises(ValueError, match=r"no class of ours for LNFreeMistralForCausalLM, only for"):
        load(Checkpoint(tmp_path))


def damage_missing(folder):
    edit_weights(folder, lambda t: [t.pop(name) for name in list(t) if "mlp" in name and name.endswith("bias")])


def damage_extra(folder):
    edit_weights(folder, lambda t: t.update({"adapter.down.weight": torch.ones(2, 2)}))


def damage_half_a_norm(folder):
    edit_weights(
        folder, lambda t: t.pop(next(name for name in t if "ln_1.weight" in name or "input_layernorm.w" in name))
    )


def damage_shape(folder):
    edit_config(folder, vocab_size=100)


def damage_overflow(folder):
    def overflow(tensors):
        for name in tensors:
            tensors[name] = (tensors[name] * (1e6 if "ln_2.weight" in name or "post_attention" in name else 1)).half()

    edit_weights(folder, overflow)


def damage_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def damage_no_weights(folder):
    (folder / "model.safetensors").unlink()


def damage_missing_shard(folder):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def damage_adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, r"lacks \d+ tensors: .*mlp.*bias"),
        (damage_extra, r"has unknown 1 tensors: adapter.down.weight"),
        (damage_half_a_norm, r"lacks 1 tensors: .*(ln_1|input_layernorm).weight"),
        (damage_shape, r"as \[99, 32\] instead of \[100, 32\]"),
        (damage_overflow, r"not finite \(torch.float16\).*65504.*float32"),
        (damage_file, r"model.safetensors is damaged"),
        (damage_no_weights, "holds no weights"),
        (damage_missing_shard, "names shards that are not there: model-00001-of-00002"),
        (damage_adapter, "adapter: merge it"),
        (lambda f: edit_config(f, architectures=["GPT2DoubleHeadsModel"]), "no class of ours for GPT2DoubleHeadsModel"),
        (lambda f: edit_config(f, quantization_config={"bits": 4}), "quantized"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_leaves_nothing(stock, damage, message, tmp_path):
    _, folder = stock
    damage(folder)
    with pytest.raises((ValueError, OSError), match=message):
        convert_checkpoint(Checkpoint(folder), tmp_path / "ours")
    assert {path.name for path in tmp_path.iterdir()} == {"stock"}


def test_from_the_hub(input_ids, tmp_path):
    stock = {family.name: trained(family.stock_model()) for family in (GPT2, GPT_NEOX)}
    for name, model in stock.items():
        model.save_pretrained(tmp_path / "hub" / "someone" / name, max_shard_size="20KB")
    hub = Hub(tmp_path / "hub")
    commands = [["convert", f"someone/{name}", str(tmp_path / name), "--revision", "main"] for name in stock]
    commands.append(["convert", "someone/nothing", str(tmp_path / "none")])
    *done, missing = run_commands(hub, [(command, {}) for command in commands])
    hub.shutdown()
    hub.server_close()
    for (name, model), result in zip(stock.items(), done, strict=True):
        assert result["code"] == 0, result["err"]
        assert "largest difference 0.0e+00" in result["out"]
        converted = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert torch.equal(logits(converted, input_ids), logits(model, input_ids))
    assert missing["code"] == 1
    assert "someone/nothing" in missing["err"]


def test_other_families_are_refused(tmp_path):
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    MistralForCausalLM(MistralConfig(**sizes, intermediate_size=32)).save_pretrained(tmp_path / "mistral")
    with pytest.raises(ValueError, match=r"model_type 'mistral'.*GPT2 \(gpt2\), GPTNeoX \(gpt_neox\)"):
        convert(str(tmp_path / "mistral"), tmp_path / "ours")


def test_refusals_of_convert(stock, tmp_path):
    _, folder = stock
    convert(str(folder), tmp_path / "ours")
    with pytest.raises(ValueError, match="is there already"):
        convert(str(folder), tmp_path / "ours")
    with pytest.raises(ValueError, match="a model of this package already"):
        convert(str(tmp_path / "ours"), tmp_path / "again")
    with pytest.raises(ValueError, match="copied as it is"):
        convert(str(folder), tmp_path / "again", dtype=torch.float64)
    with pytest.raises(ValueError, match="Allowed: lnfree, folded, fused, stock, onnx"):
        convert(str(folder), tmp_path / "again", to="tensorflow")
    shutil.rmtree(tmp_path / "ours")
    (tmp_path / "ours").mkdir()  # an empty folder is as good as none
    assert convert(str(folder), tmp_path / "ours", to="folded")["divisions_left"] > 0
