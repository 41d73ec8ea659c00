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

from ..conftest import BERT, EVERY, T5, VIT, WHISPER, Family

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
LEFT_OUT = ("EncoderModel", "ForTokenClassification", "ForAudioClassification", "ForSequenceClassification")
"""Of the families with encoder and decoder: what is an encoder alone, or wants as many ends in each example."""

NOT_OF_STOCK = {
    "gpt_neox": ("test_model_rope_scaling_frequencies", "test_model_rope_scaling_from_config_1_dynamic"),
    "t5": ("test_model_base_model_prefix",),
    "vit": ("test_model_get_set_embeddings",),
}
"""Tests that the stock classes of a family do not pass at these sizes."""


def classes(family: Family) -> tuple[type, ...]:
    base = getattr(hf_lnfree, f"{family.prefix}Model")
    both = family in (T5, WHISPER)
    return tuple(c for c in (base, *FAMILIES[base]) if not (both and c.__name__.endswith(LEFT_OUT)))


class Tester:
    """What these tests ask for beside the classes: a configuration, inputs, and their sizes."""

    batch_size, hidden_size, num_hidden_layers, num_attention_heads, is_training = B, 32, 2, 4, True
    num_masks, mask_length, decoder_seq_length = 2, PATCHES, S

    def __init__(self, family: Family, fields: dict[str, Any]):
        self.family, self.fields = family, fields
        self.seq_length = PATCHES + 1 if family is VIT else S
        self.encoder_seq_length = MEL if family is WHISPER else self.seq_length

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        tiny = {name: value for name, value in ALIKE.items() if name in self.family.tiny}
        wide = {} if self.family is T5 or not self.fields else {"initializer_range": 0.2}  # or all attend alike
        config = replace(self.family, tiny={**self.family.tiny, **tiny}).config(
            **{"norm": self.family.norm, **self.fields, **wide}
        )
        ids, mask = torch.randint(3, 99, (2, B, S)), torch.ones(B, S, dtype=torch.long)
        inputs = {"input_ids": ids[0], "attention_mask": mask.tril()}
        if self.family in (VIT, WHISPER):
            inputs = {"pixel_values": torch.randn(B, 1, 8, 8)} if self.family is VIT else {}
            inputs |= {"input_features": torch.randn(B, 8, 2 * MEL)} if self.family is WHISPER else {}
        if config.is_encoder_decoder:
            inputs |= {"decoder_input_ids": ids[1], "decoder_attention_mask": mask}
        return config, inputs


def case(family: Family, fields: dict[str, Any]) -> type[unittest.TestCase]:
    """The test case of a family in one setting."""
    models = classes(family)

    def set_up(self: Any) -> None:
        transformers.set_seed(0)
        self.model_tester = Tester(family, fields)
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
        "is_encoder_decoder": family in (T5, WHISPER),
        "test_resize_embeddings": family not in (VIT, WHISPER),
        "test_can_init_all_missing_weights_before_2023": True,
        **dict.fromkeys(NOT_OF_STOCK.get(family.name, ())),
    }
    return type("CommonTest", bases, members)


for tested in (*EVERY, BERT, VIT, T5, WHISPER):
    for setting, asked in SETTINGS.items():
        globals()[f"Test_{tested.name}_{setting}"] = case(tested, asked)
