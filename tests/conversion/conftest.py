"""Stock models whose norms and biases are not at their initial ones and zeros."""

import pytest
import torch

FORMS = {
    "gpt2": [{}, {"tie_word_embeddings": False}, {"n_embd": 36}],
    "gpt_neox": [{}, {"tie_word_embeddings": True}, {"use_parallel_residual": False}, {"hidden_size": 36}],
}


def trained(model, seed=1):
    """The model as if it had been trained: gains around 1, biases around 0, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(params=[0, 1, 2, 3])
def form(request, family):
    """Tied and untied heads, odd widths, both residual forms of GPT-NeoX."""
    forms = FORMS[family.name]
    return forms[request.param % len(forms)]
