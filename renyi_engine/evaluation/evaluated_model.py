"""What is evaluated: the particles of an ensemble, and the frozen base that they share."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from renyi_engine import base_model
from renyi_engine.ensemble import EnsembleConfig, LoraEnsemble
from renyi_engine.evaluation.config import EvalConfig


@dataclass(frozen=True)
class Subject:
    """The particles of an ensemble and, inside `ensemble.disable_adapters()`, the frozen base.

    Attributes:
        num_particles: K; 0 if only the base is evaluated.
        alpha: for responsibilities: the one in the settings, else the one in the ensemble's folder, else None.
    """

    ensemble: LoraEnsemble
    tokenizer: PreTrainedTokenizerBase
    num_particles: int
    alpha: float | None

    @property
    def particle_weights(self) -> list[float]:
        """[K]; empty if only the base is evaluated."""
        return self.ensemble.particle_weights.tolist() if self.num_particles else []

    def require_alpha(self) -> float:
        """alpha. Raises ValueError if it is not known."""
        if self.alpha is None:
            raise ValueError("alpha: the ensemble's folder does not record the alpha of its training; pass --alpha")
        return self.alpha


def load_subject(config: EvalConfig) -> Subject:
    """The base that `config` names, with the particles of its `ensemble` folder if it names one.

    Raises:
        ValueError: the model or the folder cannot be used.
    """
    tokenizer = base_model.load_tokenizer(config)
    model = base_model.load_model(config)
    if not config.ensemble:
        # an ensemble has at least one adapter; nobody uses this one
        ensemble = LoraEnsemble.attach(model, EnsembleConfig(num_particles=1, rank=1))
        return Subject(ensemble, tokenizer, 0, None)
    ensemble = LoraEnsemble.from_pretrained(model, config.ensemble)
    alpha = ensemble.alpha if config.alpha is None else config.alpha
    return Subject(ensemble, tokenizer, ensemble.config.num_particles, alpha)
