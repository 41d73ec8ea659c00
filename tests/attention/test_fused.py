"""Fused entropies against the definition in float64: every back end, every kind of mask, and the gradient."""

import math

import pytest
import torch

from hf_lnfree.attention.fused import attention_entropy_with_grad, fused_attention_entropy, head_entropy_with_grad

# Flex attention is compiled on a GPU; here its uncompiled reference runs, and says so.
FLEX = pytest.param("flex", marks=pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"))
SAVING = ["cpu_flash", "chunked"]
BACKENDS = [*SAVING, FLEX]


def tensors(queries=24, keys=24, heads=4, kv_heads=4, width=8, value_width=8, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, queries, width, generator=g, dtype=torch.float64) * scale
    k = torch.randn(2, kv_heads, keys, width, generator=g, dtype=torch.float64)
    v = torch.randn(2, kv_heads, keys, value_width, generator=g, dtype=torch.float64)
    return q, k, v


def definition(q, k, v=None, mask=None, is_causal=False, scale=None, sinks=None, softcap=None):
    """(entropy, output) from the whole map, in float64."""
    groups = q.shape[1] // k.shape[1]
    k = k.double().repeat_interleave(groups, 1)
    logits = q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if is_causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        hide = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
        logits = (logits if mask.dtype == torch.bool else logits + mask.double()).masked_fill(hide, -math.inf)
    if sinks is not None:
        column = sinks.double() if sinks.dim() == 4 else sinks.double()[None, :, None, None]
        column = column.expand(*logits.shape[:3], 1)
        p = torch.cat((logits, column), -1).softmax(-1)[..., :-1]
    else:
        p = logits.softmax(-1)
    p = p.nan_to_num(0.0)  # a fully masked row
    output = None if v is None else p @ v.double().repeat_interleave(groups, 1)
    return torch.special.entr(p).sum(-1), output


def padding_mask(side):
    mask = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
    columns = slice(0, 5) if side == "left" else slice(19, 24)
    mask[1, :, :, columns] = False
    return mask


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


BIAS = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(5)) * 2
WINDOW = torch.ones(24, 24).tril().triu(-4).bool()[None, None]
CAPPED = ("causal", "left padding")  # those whose gradients are taken with a soft-cap
MASKS = {
    "bidirectional": {},
    "causal": {"is_causal": True},
    "left padding": {"attention_mask": padding_mask("left")},
    "right padding": {"attention_mask": padding_mask("right")},
    "additive": {"attention_mask": additive(padding_mask("left"))},
    "sliding window": {"attention_mask": WINDOW},
    "two-dimensional": {"attention_mask": WINDOW[0, 0]},
}


def check(q, k, v, expected, found, atol=2e-5):
    entropy, output = expected
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=0, atol=atol)
    if output is not None:
        torch.testing.assert_close(found.output.double(), output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", [{}, {"kv_heads": 2}, {"value_width": 12}, {"value_width": 5}])
def test_masks_and_shapes(backend, name, shape):
    q, k, v = tensors(**shape)
    options = dict(MASKS[name])
    expected = definition(q, k, v, mask=options.get("attention_mask"), is_causal=options.get("is_causal", False))
    found = fused_attention_entropy(q.float(), k.float(), v.float(), backend=backend, **options)
    check(q, k, v, expected, found)


@pytest.mark.parametrize("name", MASKS)
def test_support_counts_the_keys_and_bounds_the_entropy(name):
    q, k, _ = tensors()
    found = fused_attention_entropy(q.float(), k.float(), **MASKS[name])
    mask = MASKS[name].get("attention_mask", torch.ones(24, 24, dtype=torch.bool))
    mask = mask.tril() if name == "causal" else mask
    mask = mask if mask.dtype == torch.bool else mask == 0
    counts = mask.expand(2, 4, 24, 24).sum(-1)
    assert torch.equal(found.support.expand(2, 4, 24), counts)
    assert (found.entropy[counts == 0] == 0).all()
    assert (found.entropy <= counts.clamp_min(1).log() + 1e-5).all()
    assert (found.entropy >= -1e-5).all()


def test_additive_bias_of_any_kind():
    q, k, v = tensors()
    mask = BIAS + additive(padding_mask("right"))
    expected = definition(q, k, v, mask=mask)
    check(q, k, v, expected, fused_attention_entropy(q.float(), k.float(), v.float(), attention_mask=mask))
    with pytest.raises(ValueError, match="neither a bias nor softcap"):
        fused_attention_entropy(q.float(), k.float(), attention_mask=mask, backend="cpu_flash")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sinks", [torch.tensor([-2.0, 0.0, 1.0, 4.0]), torch.linspace(-2, 4, 192).view(2, 4, 24, 1)])
def test_attention_sinks(sinks, backend):
    q, k, v = tensors()
    expected = definition(q, k, v, is_causal=True, sinks=sinks)
    found = fused_attention_entropy(q.float(), k.float(), v.float(), is_causal=True, sinks=sinks, backend=backend)
    check(q, k, v, expected, found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_batch_item_for_all(backend):
    q, k, v = tensors()
    for one in ((q[:1], k, v), (q, k[:1], v[:1])):
        check(q, k, v, definition(*one), fused_attention_entropy(*(x.float() for x in one), backend=backend))


def test_softcap():
    q, k, v = tensors(scale=10.0)
    expected = definition(q, k, v, is_causal=True, softcap=5.0)
    check(q, k, v, expected, fused_attention_entropy(q.float(), k.float(), v.float(), is_causal=True, softcap=5.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 24), (7, 24), (24, 9)])
def test_cached_decoding_and_cross_attention(backend, queries, keys):
    q, k, v = tensors(queries=queries, keys=keys)
    expected = definition(q, k, v, scale=0.5)
    check(q, k, v, expected, fused_attention_entropy(q.float(), k.float(), v.float(), scale=0.5, backend=backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_inputs_are_summed_in_float32(dtype, backend):
    q, k, v = (t.to(dtype) for t in tensors(scale=4.0))
    entropy, _ = definition(q, k, is_causal=True)
    found = fused_attention_entropy(q, k, v, is_causal=True, backend=backend)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=0, atol=2e-5)
    assert found.output.dtype == dtype


# Reached, in nats, by standard deviation of the logits. The flash kernel's lse is a float32 of the logits' own size.
BOUNDS = {
    "chunked": {1: 1e-5, 10: 1e-5, 100: 1e-4, 1000: 1e-3},
    "cpu_flash": {1: 1e-5, 10: 4e-5, 100: 4e-4, 1000: 4e-3},
    "flex": {1: 1e-5, 10: 4e-5, 100: 4e-4, 1000: 4e-3},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [128, 512, 2048])
@pytest.mark.parametrize("logit_scale", [1, 10, 100, 1000])
def test_accuracy_in_float32(backend, length, logit_scale):
    g = torch.Generator().manual_seed(length)
    q = torch.randn(1, 2, length, 64, generator=g)
    k = torch.randn(1, 2, length, 64, generator=g) + 3.0  # a common part, as trained keys have it
    scale = logit_scale / 8
    logits_sd = (q @ (k - 3.0).mT).std() / 8
    assert 0.9 < logits_sd < 1.1
    found = fused_attention_entropy(q, k, is_causal=True, scale=scale, backend=backend)
    entropy, _ = definition(q, k, is_causal=True, scale=scale)
    bound = BOUNDS[backend][logit_scale]
    assert (found.entropy.double() - entropy).abs().max().item() <= bound
    assert found.entropy.min() >= -bound
    assert (found.entropy <= found.support.clamp_min(1).log() + bound).all()


def test_nan_stays_nan_and_masked_rows_do_not():
    q, k, _ = (t.float() for t in tensors())
    q[0, 1, 3] = math.nan
    mask = padding_mask("left")
    found = fused_attention_entropy(q, k, attention_mask=mask)
    assert found.entropy.isnan().nonzero().tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_gradient_in_float64(name, kv_heads, monkeypatch):
    monkeypatch.setattr("hf_lnfree.attention.kernels.BLOCK_BYTES", 2 * 4 * 24 * 8 * 5)  # blocks of five queries
    q, k, _ = (t.requires_grad_() for t in tensors(kv_heads=kv_heads, width=3))
    options = MASKS[name] | ({"softcap": 0.7} if name in CAPPED else {})
    entropy = attention_entropy_with_grad(q, k, **options)
    expected, _ = definition_with_grad(q, k, options)
    torch.testing.assert_close(entropy, expected, rtol=0, atol=1e-12)
    check_gradients(entropy, expected, q, k)
    heads = head_entropy_with_grad(q, k, **options)
    alive = fused_attention_entropy(q.detach(), k.detach(), **options).support.expand_as(expected) > 0
    means = (expected * alive).sum((0, 2)) / alive.sum((0, 2))
    torch.testing.assert_close(heads, means, rtol=0, atol=1e-12)
    check_gradients(heads, means, q, k)


def check_gradients(value, expected, *inputs):
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad((value * weights).sum(), inputs)
    reference = torch.autograd.grad((expected * weights).sum(), inputs, retain_graph=True)
    for ours, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def definition_with_grad(q, k, options):
    """The definition in operations whose gradient is right at p = 0 too: ln p only where a key is visible."""
    mask = options.get("attention_mask", torch.ones(24, 24, dtype=torch.bool))
    mask = mask if mask.dtype == torch.bool else mask == 0
    mask = mask.tril() if options.get("is_causal") else mask
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    if cap := options.get("softcap"):
        logits = cap * torch.tanh(logits / cap)
    log_p = logits.masked_fill(~mask, -1e30).log_softmax(-1)
    rows = mask.any(-1, keepdim=True)
    return -(log_p.exp() * log_p.where(mask & rows, 0.0)).where(rows, 0.0).sum(-1), None


@pytest.mark.parametrize("function", [attention_entropy_with_grad, head_entropy_with_grad])
def test_gradcheck(function):
    q, k, _ = (t[:1, :1, :6].detach().requires_grad_() for t in tensors(width=3))
    assert torch.autograd.gradcheck(lambda q, k: function(q, k, is_causal=True), (q, k))


def test_what_is_refused():
    q, k, _ = (t.float() for t in tensors())
    with pytest.raises(ValueError, match="carries no gradient"):
        fused_attention_entropy(q.requires_grad_(), k)
    q = q.detach()
    biased = torch.full((24, 24), 0.5)
    for function in (attention_entropy_with_grad, head_entropy_with_grad):
        with pytest.raises(ValueError, match="no gradient here"):
            function(q.requires_grad_(), k, attention_mask=biased, softcap=2.0).sum().backward()
        q = q.detach()
    with pytest.raises(ValueError, match="H a multiple of G"):
        fused_attention_entropy(q, k[:, :3])
    with pytest.raises(ValueError, match="exclude each other"):
        fused_attention_entropy(q, k, is_causal=True, attention_mask=WINDOW)
    with pytest.raises(ValueError, match="'cpu_flash', 'cuda_efficient', 'flex', 'chunked'"):
        fused_attention_entropy(q, k, backend="fast")
    with pytest.raises(ValueError, match="its own device"):
        fused_attention_entropy(q, k, backend="cuda_efficient")


def test_memory_does_not_grow_with_the_square(monkeypatch):
    """The largest tensor that either back end makes at T=4096 is far from a map of 4096 x 4096."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    Largest.elements = max(Largest.elements, t.numel())
            return out

    monkeypatch.setattr("hf_lnfree.attention.kernels.BLOCK_BYTES", 2**20)
    q, k = torch.randn(1, 1, 4096, 16), torch.randn(1, 1, 4096, 16)
    for backend in SAVING:
        Largest.elements = 0
        with Largest():
            fused_attention_entropy(q, k, is_causal=True, backend=backend)
        assert Largest.elements <= 2**18


@pytest.mark.parametrize("keys", [300, 1500])
def test_no_entropy_is_negative(keys):
    query = torch.randn(1, 2, keys, 16, generator=torch.Generator().manual_seed(0)) * 30  # rows are all but one-hot
    assert fused_attention_entropy(query, query, is_causal=True).entropy.min() == 0
    query[0, 0, 7] = torch.nan
    assert fused_attention_entropy(query, query, is_causal=True).entropy[0, 0, 7].isnan()


def test_learned_queries_of_batch_one():
    query, key = torch.randn(1, 2, 3, 4), torch.randn(8, 2, 5, 4)
    found = fused_attention_entropy(query, key).entropy
    logits = (query @ key.mT / 2).double()
    torch.testing.assert_close(found.double(), torch.special.entr(logits.softmax(-1)).sum(-1), rtol=0, atol=1e-5)
