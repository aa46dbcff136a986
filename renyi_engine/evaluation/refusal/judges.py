"""Who decides whether a response refuses: a list of phrases, a local model, or a model on a server."""

from __future__ import annotations

import os
import re

from huggingface_hub import is_offline_mode

from renyi_engine.ensemble import ModelConfig
from renyi_engine.evaluation.config import JUDGES
from renyi_engine.evaluation.refusal.endpoint_judge import EndpointJudge
from renyi_engine.evaluation.refusal.keyword_judge import KeywordJudge
from renyi_engine.evaluation.refusal.model_judge import ModelJudge
from renyi_engine.evaluation.refusal.verdicts import Judge


def make_judge(
    spec: str,
    *,
    compute: ModelConfig,
    model: str | None = None,
    api_key_env: str | None = None,
    timeout_s: float = 60.0,
    max_retries: int = 4,
) -> Judge:
    """The judge that `spec` names: keyword, model:FOLDER_OR_HUB_ID or endpoint:BASE_URL.

    Args:
        compute: dtype, attention and device of a local judge.
        model, api_key_env, timeout_s, max_retries: of an endpoint: the name of the model there, the environment
            variable that holds the key, the seconds that a whole reply may take, and the tries after the first.

    Raises:
        ValueError: there is no such judge, or a setting that it needs is missing.
    """
    kind, _, place = spec.partition(":")
    if spec == "keyword":
        return KeywordJudge()
    if kind == "model" and place:
        # the judge takes over how to compute; revision and trust_remote_code are about the model that is evaluated
        settings = ("dtype", "attn_implementation", "use_cpu")
        return ModelJudge(ModelConfig(place, **{name: getattr(compute, name) for name in settings}))
    if kind == "endpoint" and re.match(r"https?://.", place):
        if not model:
            raise ValueError("judge_model: expected the name of the model at the endpoint; pass --judge_model NAME")
        if is_offline_mode():
            raise ValueError(
                "judge: an endpoint cannot be asked in offline mode; unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
            )
        return EndpointJudge(place, model, api_key=_api_key(api_key_env), timeout_s=timeout_s, max_retries=max_retries)
    raise ValueError(f"judge: expected {JUDGES}; got {spec!r}")


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        # the message does not repeat what was passed: it may be the key itself
        raise ValueError(
            "judge_api_key_env: expected the name of an environment variable that holds the key; no such variable is "
            "set, or it is empty"
        )
    return os.environ[variable]
