"""Alpha-Renyi ensembles of LoRA adapters: K coupled particles on one frozen language model."""

from renyi_engine.ensemble import EnsembleConfig, LoraEnsemble

__all__ = ["EnsembleConfig", "LoraEnsemble"]
