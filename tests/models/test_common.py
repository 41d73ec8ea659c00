"""
The tests that transformers has for every model of its own, over ours: with the stock norms and without norms.

They run where `TRANSFORMERS_TESTS` names the folder `tests` of the sources of the installed transformers: see
CONTRIBUTING.md. Its tests of generation and export are in no source distribution, and are left out.
"""

import importlib
import os
import sys
import unittest
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

import hf_lnfree
from hf_lnfree.models import FAMILIES

from ..conftest import BERT, EVERY, GATED_T5, T5, VIT, WHISPER, Family

FOLDER = os.environ.get("TRANSFORMERS_TESTS")
if not FOLDER:
    pytest.skip("TRANSFORMERS_TESTS does not name transformers' own tests", allow_module_level=True)

PACKAGE = "tests_of_transformers"  # they are called "tests", as ours are
for module, left_out in (("exporters.test_export", "Export"), ("generation.test_utils", "Generation")):
    for name in (PACKAGE, f"{PACKAGE}.{module.partition('.')[0]}", f"{PACKAGE}.{module}"):
        sys.modules[name] = ModuleType(name)
    setattr(sys.modules[name], f"{left_out}TesterMixin", type(f"{left_out}TesterMixin", (), {}))
sys.modules[PACKAGE].__path__ = [FOLDER]
common = importlib.import_module(f"{PACKAGE}.test_modeling_common")

B, S, MEL, PATCHES = 5, 7, 8, 16  # examples, tokens, steps that a Whisper encoder makes of its frames, patches
# No more layers are allowed, and as many of everything in an encoder as in its decoder.
TWO = dict.fromkeys(("n_layer", "num_hidden_layers", "num_decoder_layers", "decoder_layers"), 2)
ALIKE = {**TWO, "decoder_attention_heads": 4, "init_std": 0.02}
SETTINGS: dict[str, dict[str, Any]] = {
    "stock": {},
    "none": {"norm": "none", "activation": "relu"},
    "slopes": {"norm": "none", "activation": "learnable_leaky_relu", "slope_scope": "global"},
}
APART = {
    "encoder": ("T5EncoderModel", "T5ForTokenClassification", "WhisperForAudioClassification"),
    "ends": ("T5ForSequenceClassification",),
}
"""Classes of families with two stacks that have test cases of their own: an encoder alone; one end in each example."""

TWO_STACKS = (T5, GATED_T5, WHISPER)
NOT_OF_STOCK = {
    "gpt_neox": ("test_model_rope_scaling_frequencies", "test_model_rope_scaling_from_config_1_dynamic"),
    "t5": ("test_model_base_model_prefix",),
    "gated_t5": ("test_model_base_model_prefix",),
    "vit": ("test_model_get_set_embeddings",),
    "whisper, encoder": ("test_model_get_set_embeddings",),
    "ends": ("test_inputs_embeds", *(name for name in vars(common.ModelTesterMixin) if "eager_matches_sdpa" in name)),
}
"""Tests that the stock classes do not pass, by family, kind, or both: at these sizes, or for inputs of their own."""


def classes(family: Family, kind: str) -> tuple[type, ...]:
    base = getattr(hf_lnfree, f"{family.prefix}Model")
    kinds = {
        c: next((k for k, ends in APART.items() if c.__name__.endswith(ends)), "") for c in (base, *FAMILIES[base])
    }
    return tuple(c for c, found in kinds.items() if found == kind)


class Tester:
    """What these tests ask for beside the classes: a configuration, inputs, and their sizes."""

    batch_size, hidden_size, num_hidden_layers, num_attention_heads, is_training = B, 32, 2, 4, True
    num_masks, mask_length, decoder_seq_length = 2, PATCHES, S

    def __init__(self, family: Family, fields: dict[str, Any], kind: str):
        self.family, self.fields, self.kind = family, fields, kind
        self.seq_length = PATCHES + 1 if family is VIT else S
        self.encoder_seq_length = MEL if family is WHISPER else self.seq_length

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        tiny = {name: value for name, value in ALIKE.items() if name in self.family.tiny}
        t5 = self.family in (T5, GATED_T5)
        wide = {"initializer_range": 0.5 if t5 else 0.2} if self.fields else {}  # or all attend alike; T5's own is 1
        config = replace(self.family, tiny={**self.family.tiny, **tiny}).config(
            **{"norm": self.family.norm, **self.fields, **wide}
        )
        ids, mask = torch.randint(3, 99, (2, B, S)), torch.ones(B, S, dtype=torch.long)
        config.is_encoder_decoder &= self.kind != "encoder"
        if self.kind == "ends":
            ids[0, :, -1] = config.eos_token_id
        inputs = {"input_ids": ids[0], "attention_mask": mask.tril()}
        if self.family in (VIT, WHISPER):
            inputs = {"pixel_values": torch.randn(B, 1, 8, 8)} if self.family is VIT else {}
            inputs |= {"input_features": torch.randn(B, 8, 2 * MEL)} if self.family is WHISPER else {}
        if config.is_encoder_decoder:
            inputs |= {"decoder_input_ids": ids[1], "decoder_attention_mask": mask}
        return config, inputs


def case(family: Family, fields: dict[str, Any], kind: str) -> type[unittest.TestCase]:
    """The test case of a family in one setting: of its classes, or of those of a kind that is `APART`."""
    models = classes(family, kind)

    def set_up(self: Any) -> None:
        transformers.set_seed(0)
        self.model_tester = Tester(family, fields, kind)
        # A backbone has no loss, which the tests know by a table of transformers' own.
        backbone = {models[0].config_class.model_type: models[0].__name__}
        self.enterContext(mock.patch.dict(common.MODEL_MAPPING_NAMES, backbone))

    def with_labels(self: Any, inputs: Any, model: type, return_labels: bool = False) -> dict[str, torch.Tensor]:
        labelled = return_labels and model is hf_lnfree.LNFreeWhisperForConditionalGeneration  # not in their table
        labels = {"labels": torch.zeros(B, S, dtype=torch.long)} if labelled else {}
        return common.ModelTesterMixin._prepare_for_class(self, inputs, model, return_labels) | labels

    generates = [common.GenerationTesterMixin] if any(model.can_generate() for model in models) else []
    bases = (common.ModelTesterMixin, *generates, unittest.TestCase)
    members = {
        "setUp": set_up,
        "_prepare_for_class": with_labels,
        "all_model_classes": models,
        "is_encoder_decoder": family in TWO_STACKS and kind != "encoder",
        "test_resize_embeddings": family not in (VIT, WHISPER),
        "test_can_init_all_missing_weights_before_2023": True,
        **{name: None for part in (family.name, kind, f"{family.name}, {kind}") for name in NOT_OF_STOCK.get(part, ())},
    }
    return type("CommonTest", bases, members)


for tested in (*EVERY, BERT, VIT, *TWO_STACKS):
    for setting, asked in SETTINGS.items():
        for kind in filter(lambda kind: classes(tested, kind), ("", *APART)):
            globals()["_".join(filter(None, ("Test", tested.name, kind, setting)))] = case(tested, asked, kind)
