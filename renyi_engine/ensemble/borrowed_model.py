"""The user's model is lent to an ensemble: to one at a time, and it is given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

_MARK = "_renyi_ensemble"
"""The attribute of a model that carries an ensemble."""
_CARRIES = "model: it already carries an ensemble; call detach() on that one first"


def require_bare(model: PreTrainedModel) -> None:
    """Raise TypeError if it is no transformers model, ValueError if it already carries an ensemble or PEFT adapters."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: expected a transformers PreTrainedModel; got {type(model).__name__}; "
            "of a PEFT model, pass model.unload() or its base model"
        )
    if getattr(model, "_hf_peft_config_loaded", False) or any("lora_A" in name for name, _ in model.named_modules()):
        raise ValueError("model: it already carries PEFT adapters; pass the bare base model")
    if _MARK in vars(model):
        raise ValueError(_CARRIES)


@contextmanager
def claimed(model: PreTrainedModel) -> Iterator[None]:
    """The block puts an ensemble on the model. From then on, no other one can be put on it, unless the block fails.

    Raises:
        TypeError, ValueError: see `require_bare`.
    """
    require_bare(model)
    mine = object()
    if vars(model).setdefault(_MARK, mine) is not mine:  # atomic: of two threads, one gets it
        raise ValueError(_CARRIES)
    try:
        yield
    except BaseException:
        vars(model).pop(_MARK, None)
        raise


class Loan:
    """A model, and the flags that it had before an ensemble froze it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._training = [module for module in model.modules() if module.training]
        self._trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def give_back(self) -> None:
        """Set the flags again, and let another ensemble claim the model."""
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        self.model.eval()
        for module in self._training:
            module.training = True
        vars(self.model).pop(_MARK, None)
