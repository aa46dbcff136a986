"""Whether tensors hold the same values: next to the largest of them, and next to what the naive path makes of them."""

from __future__ import annotations

import torch


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def assert_close(ours, theirs, relative):
    """Of the same size and, by the largest entry or 1, the same values; None where an input is None."""
    for x, truth in zip(ours, theirs, strict=True):
        if truth is not None:
            torch.testing.assert_close(x.double(), truth.double(), rtol=0, atol=relative * max(1.0, largest(truth)))


def assert_errs_at_most_half_again_as_much(ours, naive, gold):
    """As the naive path in the same precision; gold is in fp64, and None where an input is None."""
    for x, theirs, truth in zip(ours, naive, gold, strict=True):
        if truth is not None:
            error, naive_error = largest(x.double() - truth), largest(theirs.double() - truth)
            assert error <= 1.5 * naive_error + 1e-3 * largest(truth)
