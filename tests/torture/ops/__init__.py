"""Every op on random, strided, mixed and extreme inputs, forward and backward, against fp64.

How large an error may be follows from what rounding can do: for a sum of products, the limit is a multiple of the same
sum of absolute values. The memory between the entries of a strided input is NaN, and so is new memory that was not yet
written. So an op that reads a wrong cell gives NaN.

Layout: K particles, B sequences, T tokens, N labels, M rows, I/O in/out features, R rank, D hidden size, V vocabulary.
"""

import os

import torch

# off a GPU the kernels run in Triton's interpreter; it has to be chosen before anything imports triton
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from .attack import prepare as prepare
