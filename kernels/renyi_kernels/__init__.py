"""Ops for alpha-Renyi ensembles of LoRA adapters. They need torch alone; a GPU and triton are optional."""

from renyi_kernels.backend import BACKENDS, use_backend
from renyi_kernels.grouped_lora import grouped_lora
from renyi_kernels.linear_logprob import linear_logprob
from renyi_kernels.lora_linears import lora_linears
from renyi_kernels.reference import IGNORE_INDEX
from renyi_kernels.renyi_loss import renyi_loss
from renyi_kernels.renyi_reduce import RenyiOutput, renyi_reduce

__all__ = [
    "BACKENDS",
    "IGNORE_INDEX",
    "RenyiOutput",
    "grouped_lora",
    "linear_logprob",
    "lora_linears",
    "renyi_loss",
    "renyi_reduce",
    "use_backend",
]
