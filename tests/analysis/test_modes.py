"""What looks at a model leaves every module in the mode in which it was, also after an exception."""

import pytest
import torch

from hf_lnfree import AttentionEntropyAnalyzer
from hf_lnfree.analysis.likelihood import document_likelihoods
from hf_lnfree.analysis.linearity import attribute


def spoil(module, args):
    raise RuntimeError("in the middle")


LOOKS = {
    "entropy": lambda model, ids: AttentionEntropyAnalyzer(model).run([ids]),
    "likelihood": lambda model, ids: list(document_likelihoods(model, list(ids), 8)),
    "attribution": lambda model, ids: attribute(model, ids),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("raises", [False, True])
def test_modes_stay(family, input_ids, look, raises):
    model = family.model().train()
    family.block_list(model)[1].eval()  # as a frozen part of a model that is trained
    before = {name: module.training for name, module in model.named_modules()}
    if raises:
        family.block_list(model)[2].register_forward_pre_hook(spoil)
        with pytest.raises(RuntimeError, match="in the middle"):
            LOOKS[look](model, input_ids)
    else:
        LOOKS[look](model, input_ids)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.is_grad_enabled()
