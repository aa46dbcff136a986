"""What an ensemble predicts: the subject of an evaluation, and how it scores answers that are given.

Layout: K particles, N questions, C choices.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from renyi_engine import base_model
from renyi_engine.config import EvalConfig
from renyi_engine.ensemble import EnsembleConfig, LoraEnsemble


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the particles of an ensemble and, inside `ensemble.disable_adapters()`, the frozen base.

    Attributes:
        num_particles: K; 0 if there is the bare base alone.
        alpha: the coupling of responsibilities.
    """

    ensemble: LoraEnsemble
    tokenizer: PreTrainedTokenizerBase
    num_particles: int
    alpha: float


def load_subject(config: EvalConfig) -> Subject:
    """The base of `config` with the particles of its `ensemble` folder, if it names one.

    Raises:
        ValueError: the model or the folder does not do, or nothing says which alpha to take.
    """
    tokenizer = base_model.load_tokenizer(config)
    model = base_model.load_model(config)
    if not config.ensemble:
        # the least that can be attached; nothing asks these adapters anything
        ensemble = LoraEnsemble.attach(model, EnsembleConfig(num_particles=1, rank=1))
        return Subject(ensemble, tokenizer, 0, 0.0)
    ensemble = LoraEnsemble.from_pretrained(model, config.ensemble)
    alpha = ensemble.alpha if config.alpha is None else config.alpha
    if alpha is None:
        raise ValueError(f"alpha: {config.ensemble} does not record the one it was trained with; pass --alpha")
    return Subject(ensemble, tokenizer, ensemble.config.num_particles, alpha)
