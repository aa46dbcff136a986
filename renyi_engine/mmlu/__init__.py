"""MMLU, asked and weighted as lm-eval does it."""

from renyi_engine.eval_config import MmluConfig
from renyi_engine.mmlu.evaluation import evaluate_mmlu

__all__ = ["MmluConfig", "evaluate_mmlu"]
