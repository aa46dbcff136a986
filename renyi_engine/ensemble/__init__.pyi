from . import adapter_folder as adapter_folder, model_limits as model_limits, targets as targets
from .adapted_maps import Rows as Rows
from .borrowed_model import require_bare as require_bare
from .captured import records as records, with_gradients as with_gradients
from .config import AdapterConfig as AdapterConfig, EnsembleConfig as EnsembleConfig, ModelConfig as ModelConfig
from .ensemble_file import is_distribution as is_distribution
from .fingerprint import Fingerprint as Fingerprint, difference as difference, is_fingerprint as is_fingerprint
from .lora_ensemble import LoraEnsemble as LoraEnsemble, sum_tokens as sum_tokens
from .model_limits import (
    changing_positions as changing_positions,
    check_tokens as check_tokens,
    num_positions as num_positions,
    use_a_pad_token_within as use_a_pad_token_within,
)
from .particle_matrix import ParticleMatrix as ParticleMatrix
from .peft_adapter import is_number as is_number
