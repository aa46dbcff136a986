"""Who refuses what: prompts, responses, judges, and how much particles differ."""

from renyi_engine.refusal.evaluation import RefusalConfig, evaluate_refusal

__all__ = ["RefusalConfig", "evaluate_refusal"]
