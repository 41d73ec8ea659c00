"""What looks at a model leaves every module in the mode in which it was, also after an exception."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model

from hf_lnfree import AttentionEntropyAnalyzer
from hf_lnfree.analysis.likelihood import document_likelihoods
from hf_lnfree.analysis.linearity import attribute
from hf_lnfree.analysis.modes import execution_device


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


OFFLOADS = {
    "wholly": lambda model: cpu_offload(model, torch.device("cpu")),
    "in part": lambda model: dispatch_model(
        model,
        {name: "disk" if index % 2 else "cpu" for index, name in enumerate(leaves(model))},
        main_device="cpu",
        state_dict=model.state_dict(),
        offload_dir=model.name_or_path,
        force_hooks=True,
    ),
}


def leaves(model):
    return [name for name, module in model.named_modules() if dict(module.named_parameters(recurse=False))]


@pytest.mark.parametrize("how", OFFLOADS)
def test_an_offloaded_model_is_measured_where_it_computes(family, input_ids, how, tmp_path):
    model = family.model(tie_word_embeddings=False)
    model.name_or_path = str(tmp_path)
    wanted = AttentionEntropyAnalyzer(model).run([input_ids]).entropy, list(document_likelihoods(model, input_ids, 8))
    OFFLOADS[how](model)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert execution_device(model) == torch.device("cpu")
    found = AttentionEntropyAnalyzer(model).run([input_ids]).entropy, list(document_likelihoods(model, input_ids, 8))
    assert torch.equal(found[0], wanted[0])
    assert found[1] == wanted[1]
