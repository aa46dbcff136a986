"""MMLU, asked and weighted as lm-eval does it."""

from renyi_engine.mmlu.evaluation import MmluConfig, evaluate_mmlu

__all__ = ["MmluConfig", "evaluate_mmlu"]
