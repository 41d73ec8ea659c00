"""ONNX graphs, run by onnxruntime at other sizes than they were made with: the logits of the model."""

import json
import sys

import pytest
import torch
from onnxruntime import InferenceSession
from transformers import AutoConfig

from hf_lnfree.conversion import convert, export_onnx, to_transformer_lens

from .conftest import logits, trained

NORM_FREE = {"norm": "none", "final_norm": "none", "activation": "relu"}


def run(session, past=(), **inputs):
    """Logits, and keys and values in pairs."""
    for index, (key, value) in enumerate(past):
        inputs |= {f"past_key_values.{index}.key": key, f"past_key_values.{index}.value": value}
    first, *rest = (torch.from_numpy(out) for out in session.run(None, {k: v.numpy() for k, v in inputs.items()}))
    return first, list(zip(rest[::2], rest[1::2], strict=True))


def padded(batch, length):
    ids = torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def test_batch_and_length_are_free(family, tmp_path):
    model = trained(family.model(**NORM_FREE))
    counts = export_onnx(model, tmp_path / "model.onnx")
    assert counts == {"Relu": 3, "Softmax": 3}
    session = InferenceSession(tmp_path / "model.onnx")
    for batch, length in ((1, 1), (3, 17), (2, 40)):
        inputs = padded(batch, length)
        with torch.no_grad():
            expected = model(**inputs).logits
        seen = inputs["attention_mask"].bool()
        torch.testing.assert_close(run(session, **inputs)[0][seen], expected[seen], rtol=1e-4, atol=1e-4)


def test_cached_steps_give_the_logits_of_one_pass(family, tmp_path):
    model = trained(family.model(norm="layernorm", activation="learnable_leaky_relu"))
    counts = export_onnx(model, tmp_path / "model.onnx", with_cache=True)
    assert counts["PRelu"] == 3
    assert counts["LayerNormalization"] > 0
    session = InferenceSession(tmp_path / "model.onnx")
    assert [i.name for i in session.get_inputs()][3:5] == ["past_key_values.0.key", "past_key_values.0.value"]
    inputs = padded(3, 9)
    past, found = [(torch.zeros(3, 4, 0, 8),) * 2] * 3, []
    for start, end in ((0, 5), (5, 6), (6, 9)):
        part = {
            "input_ids": inputs["input_ids"][:, start:end],
            "attention_mask": inputs["attention_mask"][:, :end],
            "position_ids": inputs["position_ids"][:, start:end],
        }
        step, past = run(session, past, **part)
        found.append(step)
    with torch.no_grad():
        expected = model(**inputs).logits
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(found, dim=1)[seen], expected[seen], rtol=1e-4, atol=1e-4)


def test_convert_writes_a_folder(tmp_path, input_ids):
    from ..conftest import GPT2

    model = trained(GPT2.model(**NORM_FREE)).bfloat16()  # exported as float32
    model.save_pretrained(tmp_path / "ours")
    report = convert(str(tmp_path / "ours"), tmp_path / "onnx", to="onnx")
    assert report["nonlinear_operators"] == {"Relu": 3, "Softmax": 3}
    assert report["largest_difference"] < 1e-4
    assert AutoConfig.from_pretrained(tmp_path / "onnx").norm == "none"
    assert json.loads((tmp_path / "onnx" / "conversion.json").read_text())["to"] == "onnx"
    found, _ = run(InferenceSession(tmp_path / "onnx" / "model.onnx"), **padded(2, 8))
    with torch.no_grad():
        expected = model.float()(**padded(2, 8)).logits
    seen = padded(2, 8)["attention_mask"].bool()
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-4)
    assert logits(model, input_ids).isfinite().all()


def test_refusals(family, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is being removed"):
        export_onnx(family.model(norm="removal"), tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"pip install 'hf_lnfree\[onnx\]'"):
        export_onnx(family.model(**NORM_FREE), tmp_path / "model.onnx")


def test_without_transformer_lens_the_error_says_how_to_get_it(family, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    with pytest.raises(ValueError, match=r"pip install 'hf_lnfree\[lens\]'"):
        to_transformer_lens(family.model())
