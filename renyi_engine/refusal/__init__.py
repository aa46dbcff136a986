"""Who refuses what: prompts, responses, judges, and how much particles differ."""

from renyi_engine.eval_config import RefusalConfig
from renyi_engine.refusal.evaluation import evaluate_refusal

__all__ = ["RefusalConfig", "evaluate_refusal"]
