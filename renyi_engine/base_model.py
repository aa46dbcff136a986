"""The frozen base and its tokenizer, from a local folder or the hub."""

from __future__ import annotations

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from renyi_engine.config import ModelConfig
from renyi_engine.limits import use_a_pad_token_within


def device_for(config: ModelConfig) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")


def load_config(config: ModelConfig) -> PretrainedConfig:
    """The base's own configuration: small, and the first thing that fails where there is no such model."""
    try:
        return AutoConfig.from_pretrained(config.model_name_or_path, **_source(config))
    except (OSError, ValueError) as error:
        raise _unknown(config, error) from None


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path, **_source(config))
    except (OSError, ValueError) as error:
        raise _unknown(config, error) from None
    num_embeddings = getattr(load_config(config).get_text_config(), "vocab_size", None)
    if num_embeddings is not None:
        use_a_pad_token_within(tokenizer, num_embeddings)
    return tokenizer


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The language model in its compute dtype. Pickled weights are refused unread."""
    try:
        model = auto_class(load_config(config)).from_pretrained(
            config.model_name_or_path,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
            **_source(config),
        )
    except (OSError, ValueError, ImportError) as error:
        raise _unknown(config, error) from None
    if model.dtype == torch.float16:
        raise ValueError(
            f"dtype: {config.model_name_or_path} is stored in float16, whose range gradients fall out of; "
            "pass --dtype bfloat16 or float32"
        )
    return model.to(device_for(config))


def skeleton(config: ModelConfig) -> PreTrainedModel:
    """The model that `load_model` loads, without its weights."""
    base_config = load_config(config)
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(base_config).from_config(
            base_config, trust_remote_code=config.trust_remote_code
        )
    return model


def auto_class(base_config: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """The class that loads a base: for causal language models, or, where transformers has none for a configuration,
    for text and images, which runs on text alone too."""
    kind = type(base_config)
    text_only = kind in MODEL_FOR_CAUSAL_LM_MAPPING or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForCausalLM if text_only else AutoModelForImageTextToText


def _source(config: ModelConfig) -> dict:
    return {"revision": config.model_revision or "main", "trust_remote_code": config.trust_remote_code}


def _unknown(config: ModelConfig, error: Exception) -> ValueError:
    return ValueError(
        f"model_name_or_path: {config.model_name_or_path!r} cannot be loaded; expected a folder with config.json, a "
        f"tokenizer and .safetensors weights, or the id of such a model on the hub ({str(error).splitlines()[0]})"
    )
