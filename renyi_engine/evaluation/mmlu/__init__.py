"""MMLU, asked and weighted as lm-eval does."""
