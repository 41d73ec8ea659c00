"""TransformerLens, where the extra `lens` is installed: its hook points on models of ours, and their logits."""

import pytest
import torch

from hf_lnfree.conversion import to_transformer_lens

from .conftest import logits, trained

pytest.importorskip("transformer_lens.model_bridge")


def test_what_transformer_lens_cannot_say_is_refused(family):
    for fields in ({"layer_norms": ["none", "layernorm", "none"]}, {"norm": "removal"}):
        with pytest.raises(ValueError, match="one normalization for all blocks"):
            to_transformer_lens(family.model(**fields))
    for fields in ({"query_key_norm": True}, {"attention_softcap": 2.0}):
        with pytest.raises(ValueError, match="neither query-key norm nor soft-cap"):
            to_transformer_lens(family.model(**fields))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"norm": "none", "final_norm": "none", "activation": "relu"}, None),
        ({"norm": "none", "activation": "learnable_leaky_relu", "negative_slope": 0.3, "lm_head_bias": True}, None),
        ({"norm": "none", "residual_gain": "fixed", "attention_temperature": True, "ffn_scale": True}, None),
        ({"norm": "none", "activation": "identity_fused", "weight_norm": "spectral"}, None),
        ({"norm": "rmspre", "final_norm": "rmspre"}, "RMSPre"),
        ({"norm": "layernorm", "final_norm": "layernorm"}, "LN"),
    ],
)
def test_logits_and_hook_points(family, fields, kind, input_ids):
    model = trained(family.model(**fields))
    bridge = to_transformer_lens(model)
    assert bridge.cfg.normalization_type == kind
    with torch.no_grad():
        found, cache = bridge.run_with_cache(input_ids)
    torch.testing.assert_close(found, logits(model, input_ids), rtol=1e-4, atol=1e-4)
    residual = cache["blocks.1.hook_resid_pre"]
    changed = (cache["blocks.1.ln1.hook_out"] - residual).abs().max()
    assert (changed == 0) == (kind is None)
    assert cache["blocks.1.attn.hook_pattern"].shape == (2, 4, 12, 12)
