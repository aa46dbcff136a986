"""What an evaluation looks at: the particles of an ensemble, and the frozen base under them."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from renyi_engine import base_model
from renyi_engine.ensemble import EnsembleConfig, LoraEnsemble
from renyi_engine.evaluation.config import EvalConfig


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the particles of an ensemble and, inside `ensemble.disable_adapters()`, the frozen base.

    Attributes:
        num_particles: K; 0 if there is the bare base alone.
        alpha: the coupling of responsibilities, where it was given or the ensemble's folder records it.
    """

    ensemble: LoraEnsemble
    tokenizer: PreTrainedTokenizerBase
    num_particles: int
    alpha: float | None

    def require_alpha(self) -> float:
        """alpha. Raises ValueError where nothing says it."""
        if self.alpha is None:
            raise ValueError("alpha: the ensemble's folder does not record the one it was trained with; pass --alpha")
        return self.alpha


def load_subject(config: EvalConfig) -> Subject:
    """The base of `config` with the particles of its `ensemble` folder, if it names one.

    Raises:
        ValueError: the model or the folder cannot be used.
    """
    tokenizer = base_model.load_tokenizer(config)
    model = base_model.load_model(config)
    if not config.ensemble:
        # the least that can be attached; nothing asks these adapters anything
        ensemble = LoraEnsemble.attach(model, EnsembleConfig(num_particles=1, rank=1))
        return Subject(ensemble, tokenizer, 0, None)
    ensemble = LoraEnsemble.from_pretrained(model, config.ensemble)
    alpha = ensemble.alpha if config.alpha is None else config.alpha
    return Subject(ensemble, tokenizer, ensemble.config.num_particles, alpha)
