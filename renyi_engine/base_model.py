"""The frozen base and its tokenizer, from a local folder or the hub."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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

from renyi_engine.core import is_out_of_memory, reason, some
from renyi_engine.ensemble import ModelConfig, use_a_pad_token_within

ARGUMENT = "model_name_or_path"
"""The setting that names a base. Errors begin with it."""
MOST_LAYERS = 10_000
"""A config with more layers is refused, because building such a model would take all memory."""


def device_for(config: ModelConfig) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")


def load_config(config: ModelConfig, argument: str = ARGUMENT) -> PretrainedConfig:
    """The configuration of the base. It is small, so an error about a missing model comes early."""
    with _loading("config", config, argument):
        found = AutoConfig.from_pretrained(config.model_name_or_path, **_source(config))
        num_layers = getattr(found.get_text_config(), "num_hidden_layers", 1)
        if not (isinstance(num_layers, int) and 1 <= num_layers <= MOST_LAYERS):
            raise ValueError(f"num_hidden_layers: expected a number from 1 to {MOST_LAYERS}; got {num_layers!r}")
        return found


def load_tokenizer(config: ModelConfig, argument: str = ARGUMENT) -> PreTrainedTokenizerBase:
    with _loading("tokenizer", config, argument):
        tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path, **_source(config))
        if not isinstance(tokenizer.model_max_length, (int, float)):
            raise ValueError(f"model_max_length: expected a number; got {tokenizer.model_max_length!r}")
    base_config = load_config(config, argument)
    with _loading("config", config, argument):
        fit_pad_token(tokenizer, base_config)
    return tokenizer


def fit_pad_token(tokenizer: PreTrainedTokenizerBase, base_config: PretrainedConfig) -> None:
    """Give the tokenizer another pad token if the base has no embedding for its own."""
    num_embeddings = getattr(base_config.get_text_config(), "vocab_size", None)
    if num_embeddings is not None:
        use_a_pad_token_within(tokenizer, num_embeddings)


def load_model(config: ModelConfig, argument: str = ARGUMENT) -> PreTrainedModel:
    """The language model in its compute dtype. Pickled weights are never opened.

    Raises:
        ValueError: it cannot be loaded, or its files lack tensors, which transformers would fill with random numbers.
    """
    base_config = load_config(config, argument)
    with _loading("weights", config, argument):
        model, found = auto_class(base_config).from_pretrained(
            config.model_name_or_path,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **_source(config),
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{argument}: {config.model_name_or_path} lacks {some(missing)}, which would be random numbers; "
            f"expected every tensor of a {type(model).__name__}; download it again, or give a model that was saved as "
            "one"
        )
    if unread := sorted(found["unexpected_keys"]):
        warnings.warn(
            f"{argument}: {config.model_name_or_path} has tensors that a {type(model).__name__} does not use: "
            f"{some(unread)}",
            stacklevel=2,
        )
    return made_ready(model, config)


def made_ready(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    """The model on its device. Raises ValueError if its numbers are float16."""
    if model.dtype == torch.float16:
        raise ValueError(
            f"dtype: {config.model_name_or_path or 'the model'} is stored in float16, whose range is too small for "
            "gradients; pass --dtype bfloat16 or float32"
        )
    return model.to(device_for(config))


def skeleton(config: ModelConfig) -> PreTrainedModel:
    """The model that `load_model` loads, without its weights."""
    base_config = load_config(config)
    with torch.device("meta"), _loading("config", config, ARGUMENT):
        model: PreTrainedModel = auto_class(base_config).from_config(
            base_config, trust_remote_code=config.trust_remote_code
        )
    return model


def auto_class(base_config: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """The class that loads a base: the one for causal language models. For a configuration that has no such model,
    it is the one for text and images, whose models run on text alone too."""
    kind = type(base_config)
    text_only = kind in MODEL_FOR_CAUSAL_LM_MAPPING or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForCausalLM if text_only else AutoModelForImageTextToText


def _source(config: ModelConfig) -> dict:
    return {"revision": config.model_revision or "main", "trust_remote_code": config.trust_remote_code}


@contextmanager
def _loading(what: str, config: ModelConfig, argument: str) -> Iterator[None]:
    """Inside the block, any error but a lack of memory becomes a ValueError of one line. Every kind of file has its own
    reader, and for a broken file it may raise any error."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        is_plain = isinstance(error, (OSError, ValueError, ImportError))
        said = reason(error) if is_plain else f"{type(error).__name__}: {reason(error)}"
        raise ValueError(
            f"{argument}: {config.model_name_or_path!r} cannot be loaded; expected a folder with config.json, "
            f"a tokenizer and .safetensors weights, or the id of such a model on the hub ({what}: {said})"
        ) from None
