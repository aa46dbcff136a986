"""A tiny random model of every causal language model class that the installed transformers knows.

A configuration is the class's own default with its sizes shrunk by name, at every depth. Of its layers one of each
kind stays, two at least: what a configuration says layer by layer (a list as long as there are layers, or a list of
layer numbers) is cut to those that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

VOCAB = 128
TEXT_IDS = range(3, 96)
"""Token ids that mean nothing special to any of the models."""

SIZES: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim_model_base", "word_embed_proj_dim", "embedding_size"), 32
    ),
    **dict.fromkeys(
        ("emb_dim", "embed_dim", "hidden_size_global", "input_embedding_size", "output_embedding_size"), 32
    ),
    **dict.fromkeys(("lru_width", "attention_hidden_size", "backbone_hidden_size", "decoder_hidden_size"), 32),
    **dict.fromkeys(("text_hidden_size", "image_text_hidden_size", "out_hidden_size", "projection_dim"), 32),
    **dict.fromkeys(("encoder_hidden_size", "projector_input_dim", "projector_output_dim", "merged_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "dff", "dim_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(
        ("moe_intermediate_size", "moe_hidden_size", "expert_ffn_hidden_size", "dense_intermediate_size"), 24
    ),
    **dict.fromkeys(("shared_intermediate_size", "shared_expert_intermediate_size", "share_expert_dim"), 24),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "mlp_dim"), 24),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_sliding_attention_heads", "index_n_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_query_groups", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "d_head", "dim_head", "d_kv", "attention_head_size", "swa_head_dim"), 8),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "index_head_dim", "kv_channels", "rotary_dim"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_d_state", "mamba_dt_rank", "time_step_rank", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("o_lora_rank", "laurel_rank", "adapter_rank", "hc_lowrank", "router_hidden_size"), 16),
    **dict.fromkeys(("qk_head_dim", "global_head_dim", "mamba_d_ssm"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "zero_expert_num"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("model_max_length", "original_max_position_embeddings", "seq_len"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("image_size", "img_size"), 16),
    **dict.fromkeys(
        ("output_channels", "ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"), 16
    ),
    **dict.fromkeys(("alignment_intermediate_size", "projector_hidden_size", "projector_intermediate_size"), 48),
}
"""What an attribute of a configuration is cut to, where it is larger."""

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth")
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
"""Where a tiny head's rotary dimensions go that text and images divide."""
HALF_MROPE = {"rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}}
FOUR_LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}
VQ = {"base_channels": 32, "latent_channels": 32, "num_embeddings": 32, "channel_multiplier": (1, 1)}
SPECIAL: dict[str, dict[str, Any]] = {
    "BailingHybridConfig": {"num_experts_per_token": 2, "num_expert_group": 2, "topk_group": 1},
    "BambaConfig": {"attn_layer_indices": [1]},
    "BltConfig": {"encoder_hash_byte_group_vocab": 50},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 100}},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": MROPE["rope_parameters"]}},
    "Cosmos3EdgeConfig": {"projector_hidden_size": 48},
    "DbrxConfig": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 0.5}},
    "DeepseekOcr2TextConfig": EXPERTS | {"mlp_layer_types": ["dense", "sparse"]},
    "DeepseekV2Config": EXPERTS | {"first_k_dense_replace": 1},
    "DiffusionGemmaTextConfig": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "Dots1Config": EXPERTS | {"first_k_dense_replace": 1},
    "Dots3NoteVisionConfig": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "Dots3NoteAudioConfig": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "Dots3NoteTextConfig": {
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
        **{"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    },
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [24, 24],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "FalconH1Config": {"mamba_d_ssm": 64, "mamba_d_head": 16, "lm_head_multiplier": 0.5},
    "ChameleonVQVAEConfig": VQ,
    "DeepseekOcr2SamVisionConfig": {"downsample_channels": [16, 32]},
    "UnlimitedOcrSamVisionConfig": {"downsample_channels": (16, 32)},
    "PPFormulaNetVisionConfig": {
        "post_conv_in_channels": 16,
        "post_conv_mid_channels": 16,
        "post_conv_out_channels": 32,
    },
    "Florence2VisionConfig": {
        "embed_dim": (8, 8, 16, 32),
        "num_heads": (1, 1, 2, 4),
        "num_groups": (1, 1, 2, 4),
        "projection_dim": 32,
    },
    # the second half of its layers reads the keys and values of the first
    "Gemma3nTextConfig": FOUR_LAYERS
    | {
        **{
            "num_kv_shared_layers": 2,
            "intermediate_size": [48] * 4,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        },
    },
    "Gemma4TextConfig": FOUR_LAYERS | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    "Glm4vTextConfig": MROPE,
    "Glm4vMoeTextConfig": HALF_MROPE,
    "GlmOcrTextConfig": MROPE,
    "GraniteConfig": {"logits_scaling": 0.7},
    "Granite4VisionConfig": {
        **{"deepstack_layer_map": [], "downsample_rate": "1/2", "spatial_target_layers": []},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "num_attention_heads": 4,
            "image_size": 16,
        }
        | {"num_hidden_layers": 2, "intermediate_size": 48, "patch_size": 8},
    },
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "HrmTextConfig": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "HunYuanVLTextConfig": MROPE,
    "InklingTextConfig": {"swa_num_key_value_heads": 2, "logits_mup_width_multiplier": 2.0},
    "Inkling2TextConfig": {"swa_num_key_value_heads": 2},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "JanusVisionConfig": {"projection_dim": 32},
    "JanusVQVAEConfig": VQ,
    "KimiLinearConfig": {"num_experts_per_token": 2},
    "Lfm2MoeConfig": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "Mamba2Config": {"head_dim": 16, "n_groups": 2},
    "Mistral4Config": {"head_dim": 16},
    "Molmo2AdapterConfig": {"vision_feature_layer": [1, 0]},
    "MuseGlimmerConfig": {"out_hidden_size": 128, "projector_hidden_size": 48},
    "MuseSparkAudioConfig": {"hidden_sizes": (8, 8, 16, 32), "depths": (1, 1, 1, 1), "out_hidden_size": 32},
    "NemotronHConfig": {"n_groups": 2},
    "NemotronH_Omni_Reasoning_V3_Config": {"vision_hidden_size": 32, "projector_hidden_size": 48},
    "PaddleOCRTextConfig": MROPE,
    "Qwen2_5_VLTextConfig": MROPE,
    "Qwen2_5OmniTextConfig": MROPE,
    "Qwen2VLTextConfig": MROPE,
    "Qwen3OmniMoeAudioEncoderConfig": {"downsample_hidden_size": 16, "output_dim": 32},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "ReformerConfig": {"axial_pos_embds": False},
    "RoCBertConfig": {
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
        "pronunciation_vocab_size": 128,
        "shape_vocab_size": 128,
    },
    "Step3p7TextConfig": {"sliding_window": 3},
    "XLNetConfig": {"d_inner": 48},
    "xLSTMConfig": {"hidden_size": 64, "embedding_dim": 64, "num_blocks": 2, "qk_dim_factor": 1.0},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "Zamba2Config": {"n_mamba_heads": 4, "mamba_headdim": 16, "attention_hidden_size": 64, "attention_head_dim": 16},
}
"""What a class needs beside its sizes, by the name of its configuration."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_text, mixture of experts": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
        | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "use_double_wide_mlp": False},
    ),
    "gemma4_text, keys as values": (
        "gemma4_text",
        {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
        | {"use_double_wide_mlp": False},
    ),
}
"""More tiny models of a class, for what its default configuration leaves out: by name, (model type, settings)."""

NOT_TINY: dict[str, str] = {
    "evolla": "transformers maps its configuration to no class",
    "fast_vlm": "its pictures need the package timm",
    "gemma3n": "its pictures need the package timm",
    "gemma4_assistant": "it drafts tokens from the cache of another model",
    "gemma4_unified_assistant": "it drafts tokens from the cache of another model",
    "musicgen": "its configuration makes no causal language model",
    "musicgen_melody": "its configuration makes no causal language model",
    "perception_lm": "its pictures need the package timm",
}
"""Classes that cannot be built here, and why."""

TOO_LARGE = 3_000_000
"""A model of more parameters is not tiny: its class has sizes that `SIZES` does not know."""


def tiny_config(config: PretrainedConfig, settings: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """The same configuration with small sizes, and with `settings`."""
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    depth = next((values[name] for name in DEPTHS if isinstance(values.get(name), int)), 0)
    kept = _kept_layers(values, depth)
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PretrainedConfig):
            changed[name] = tiny_config(value)
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int):
            changed[name] = _tiny_number(name, value, kept)
        elif _layer_numbers(value, depth):
            changed[name] = type(value)(place for place, layer in enumerate(kept) if layer in value)
        elif _by_layer(value, depth):
            changed[name] = type(value)(_tiny_number(name, value[layer], kept) for layer in kept)
    if "is_decoder" in values:
        changed["is_decoder"] = True
    heads = [name for name in ("num_attention_heads", "num_key_value_heads") if values.get(name) is not None]
    if len(heads) == 2 and values[heads[0]] == values[heads[1]]:
        changed["num_key_value_heads"] = changed["num_attention_heads"]
    for name, value in {"head_dim": 8, "num_key_value_heads": 2}.items():
        if values.get(name, value) is None:
            changed[name] = value
    if values.get("rope_parameters"):
        changed["rope_parameters"] = _tiny_rope(values["rope_parameters"])
    return type(config)(**changed | SPECIAL.get(type(config).__name__, {}) | dict(settings or {}))


def _tiny_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The same, where rotary dimensions are divided among sections for the few that a tiny head has."""
    tiny = {name: _tiny_rope(value) if isinstance(value, dict) else value for name, value in rope.items()}
    if "mrope_section" in tiny:
        tiny["mrope_section"] = [2, 1, 1] if rope.get("partial_rotary_factor", 1.0) == 1.0 else [1, 1, 0]
    return tiny


def _kept_layers(values: dict[str, Any], depth: int) -> list[int]:
    """One layer of each kind that the lists of the configuration tell apart, two at least."""
    kinds: dict[tuple, int] = {}
    for layer in range(depth):
        kind = tuple(
            layer in value if _layer_numbers(value, depth) else str(value[layer])
            for value in values.values()
            if _by_layer(value, depth) or _layer_numbers(value, depth)
        )
        kinds.setdefault(kind, layer)
    kept = list(kinds.values())
    return sorted({*kept, *range(min(depth, 2))}) if len(kept) < 2 else kept


def _by_layer(value: Any, depth: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == depth > 2


def _layer_numbers(value: Any, depth: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(item, int) and 0 <= item < depth for item in value)
        and list(value) == sorted(set(value))
    )


def _tiny_number(name: str, value: Any, kept: list[int]) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if name in DEPTHS:
        return len(kept)
    if name.endswith(("_token_id", "_token_index")):
        return {"pad": 0, "bos": 1, "eos": 2}.get(name.split("_")[0], value if value < 3 else 96 + value % 32)
    return min(value, SIZES.get(name, value))


def config_classes() -> dict[str, type[PretrainedConfig]]:
    """Every configuration that makes a causal language model, or one for text and images: by model type."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    return {config_class.model_type: config_class for mapping in mappings for config_class in mapping}


def names() -> list[str]:
    """What `tiny_model` can build: model types, and variants of some."""
    return sorted({*config_classes(), *VARIANTS} - set(NOT_TINY))


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model in eval mode, in float32."""
    model_type, settings = VARIANTS.get(name, (name, {}))
    config_class = config_classes()[model_type]
    config = tiny_config(config_class(), settings)
    auto = AutoModelForCausalLM if config_class in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    with torch.device("meta"):
        size = auto.from_config(config).num_parameters()
    if size > TOO_LARGE:
        raise ValueError(f"{name}: {size} parameters are not tiny; SIZES does not know what makes it large")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                _randomise(parameter)
    return model.eval()


def _randomise(parameter: nn.Parameter) -> None:
    """Far from uniform predictions, and no norm or bias that an error in its use would not show in."""
    if parameter.dim() == 1:
        parameter.add_(0.2 * torch.randn_like(parameter))
    else:
        parameter.normal_(0.0, 0.3)
