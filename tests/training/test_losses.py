"""Three forms of the loss: equal in value and gradient, in float64 against autograd, whole models under Trainer too."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from hf_lnfree.training import losses
from hf_lnfree.training.losses import chunked_causal_lm_loss, use_loss


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 50 * 7)  # seven rows of fifty logits


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("items", [None, 11, torch.tensor(13)])
def test_chunked_equals_autograd(items):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 9, 8, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (3, 9), generator=g)
    labels[1, 4:] = -100
    bias = torch.randn(50, generator=g, dtype=torch.float64, requires_grad=True)
    logits = (hidden @ weight.T + bias)[:, :-1].flatten(0, 1)
    reference = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="mean" if items is None else "sum")
    reference = reference if items is None else reference / items
    expected = torch.autograd.grad(3.0 * reference, (hidden, weight, bias))
    loss = chunked_causal_lm_loss(hidden, weight, labels, items, bias)
    found = torch.autograd.grad(3.0 * loss, (hidden, weight, bias))
    torch.testing.assert_close(loss, reference.float())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # logits are float32, as in transformers


@pytest.mark.usefixtures("small_chunks")
def test_chunked_keeps_nan_and_a_batch_without_labels():
    hidden = torch.full((1, 3, 4), torch.nan, requires_grad=True)
    assert chunked_causal_lm_loss(hidden, torch.ones(50, 4), torch.zeros(1, 3, dtype=torch.long)).isnan()
    nothing = torch.full((1, 3), -100)
    assert chunked_causal_lm_loss(torch.ones(1, 3, 4), torch.ones(50, 4), nothing, 5) == 0.0


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo's own look
@pytest.mark.parametrize("form", ["chunked", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_get_the_same_loss_and_gradients(family, input_ids, form, dtype):
    outcomes = []
    for chosen in ("plain", form):
        model = family.model(lm_head_bias=True).train()
        use_loss(model, chosen)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = model(input_ids, labels=input_ids, num_items_in_batch=torch.tensor(22))
        output.loss.backward()
        assert (output.logits is None) == (chosen == "chunked")
        outcomes.append((output.loss, {n: p.grad for n, p in model.named_parameters()}))
        model.eval()
        assert model(input_ids, labels=input_ids).logits.shape == (2, 12, 99)
    (plain, plain_grads), (other, grads) = outcomes
    torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, plain_grads[name], rtol=tolerance, atol=tolerance * plain_grads[name].abs().max()
        )


def test_stock_models_take_it_and_generate_as_before(input_ids):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=99, bos_token_id=0, eos_token_id=1))
    before = model.eval().generate(input_ids, max_new_tokens=3, do_sample=False)
    use_loss(model, "chunked")
    assert torch.equal(model.generate(input_ids, max_new_tokens=3, do_sample=False), before)


def test_a_head_that_is_more_than_a_matrix_is_refused(family):
    model = family.model(head="SequenceClassification")
    with pytest.raises(ValueError, match="needs a head that is one linear map"):
        use_loss(model, "chunked")
