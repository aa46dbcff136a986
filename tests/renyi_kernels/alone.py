"""Run a test in a process of its own: on a GPU an access beyond memory takes every later test of its process along."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

ALONE = "RENYI_TEST_ALONE"
MARKER = "own_process"


def is_wanted(item):
    """On a GPU, for a test with the marker, unless this is the process of its own."""
    return torch.cuda.is_available() and ALONE not in os.environ and item.get_closest_marker(MARKER) is not None


def run_alone(test, folder):
    """Run the test of that name from `folder`; that it fails, or its process dies, is a failure here."""
    of_this_run = "PYTEST_"  # what a worker of xdist tells its children
    environment = {k: v for k, v in os.environ.items() if not k.startswith(of_this_run)} | {ALONE: "1"}
    command = [sys.executable, "-m", "pytest", test, "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"exit code {done.returncode} in a process of its own\n{done.stdout[-6000:]}{done.stderr[-2000:]}")
