"""Where TRL, transformers or PEFT have a name for a setting of training, ours has that name."""

from __future__ import annotations

import dataclasses

import peft
import trl

from renyi_engine import DpoConfig, SftConfig

# What nobody else has: the ensemble, the weights of its particles, its prior and its alpha; each particle's own skipped
# updates; held-out data from another place than the training data; pairs chosen by their scores; and a limit on the
# tokens of one packed row (TRL has one on the length of a padded one).
OURS = {
    "num_particles", "particle_weights", "particle_weight_floor", "init",
    "prior", "prior_lambda", "prior_std", "kernel_bandwidth",
    "alpha", "alpha_schedule", "alpha_0", "alpha_warmup_steps", "alpha_controller", "alpha_max", "alpha_star_steps",
    "spike_threshold", "max_consecutive_skips", "eval_dataset_name", "min_score_gap", "score_columns",
    "packed_row_tokens", "cuda_graphs",
}  # fmt: skip


def names(*classes) -> set[str]:
    return {field.name for cls in classes for field in dataclasses.fields(cls)}


def test_every_other_name_is_one_of_trl_transformers_or_peft():
    theirs = names(trl.SFTConfig, trl.DPOConfig, trl.ModelConfig, trl.ScriptArguments, peft.LoraConfig)
    assert names(SftConfig, DpoConfig) - theirs == OURS
