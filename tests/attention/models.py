"""Small models that hand their mask to the attention function by name, with inputs: what their modules share."""

import torch
import transformers as tf
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.3}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
VISION = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "initializer_range": 0.3}
SIDES = {"image_size": 32, "patch_size": 4}


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texts():
    ids = torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pictures(*sizes):
    """As Qwen2-VL takes them: the patches of all in one row, and how many each has in height and width."""
    grid = torch.tensor([(1, *size) for size in sizes])
    return numbers(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4), grid


def qwen2_vl_vision():
    patches, grid = pictures((4, 4), (2, 6))
    config = tf.Qwen2VLConfig(vision_config={**VISION, "embed_dim": 32, "mlp_ratio": 2}).vision_config
    return Qwen2VisionTransformerPretrainedModel, config, {"hidden_states": patches, "grid_thw": grid}


def qwen2_5_vl_vision():
    """Windows of 4 x 4 patches in the first layer."""
    patches, grid = pictures((4, 4), (2, 6))
    fields = {"out_hidden_size": 32, "intermediate_size": 64, "window_size": 16, "fullatt_block_indexes": [1]}
    config = tf.Qwen2_5_VLConfig(vision_config={**VISION, **fields}).vision_config
    return Qwen2_5_VisionTransformerPretrainedModel, config, {"hidden_states": patches, "grid_thw": grid}


def qwen2_vl(sizes=((4, 4), (2, 6))):
    """Two texts, the first of which begins with picture tokens."""
    patches, grid = pictures(*sizes)
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    vision = {**VISION, "embed_dim": 32, "mlp_ratio": 2}
    config = tf.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens, bos_token_id=0, eos_token_id=1)
    inputs = texts()
    inputs["input_ids"].flatten()[: len(patches) // 4] = 90  # four patches a token
    positions = torch.arange(12).expand(3, 2, 12)
    return (
        tf.Qwen2VLModel,
        config,
        {**inputs, "position_ids": positions, "pixel_values": patches, "image_grid_thw": grid},
    )


def sam():
    """Its mask decoder by name; its vision encoder calls scaled_dot_product_attention by itself."""
    vision = {"output_channels": 16, "num_pos_feats": 8, "window_size": 3, "mlp_dim": 64, "global_attn_indexes": [1]}
    vision |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    prompts = {"hidden_size": 16, "mask_input_channels": 4}
    parts = {"vision_config": SIDES | vision, "prompt_encoder_config": SIDES | prompts, "mask_decoder_config": decoder}
    config = tf.SamConfig(**parts, initializer_range=0.3)
    return tf.SamModel, config, {"pixel_values": numbers(2, 3, 32, 32), "input_points": numbers(2, 1, 2, 2).abs() * 9}


def blip_2_vision():
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.Blip2VisionConfig(**fields, image_size=8, patch_size=4, initializer_range=0.3)
    return tf.Blip2VisionModel, config, {"pixel_values": numbers(2, 3, 8, 8)}


def afmoe():
    fields = {"head_dim": 8, "num_dense_layers": 2, "sliding_window": 5}
    return tf.AfmoeForCausalLM, tf.AfmoeConfig(**TEXT, **fields), texts()


def doge():
    """A learned bias in the mask of every head, and only the best five keys."""
    return tf.DogeForCausalLM, tf.DogeConfig(**TEXT, keep_window_size=5), texts()


BY_NAME = (qwen2_vl_vision, qwen2_5_vl_vision, qwen2_vl, sam, blip_2_vision, afmoe, doge)


def build(family, implementation, *args):
    cls, config, inputs = family(*args)
    torch.manual_seed(0)
    return cls._from_config(config, attn_implementation=implementation).eval(), inputs


def doubled(model, inputs):
    """The same in float64."""
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
