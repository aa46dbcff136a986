"""Train what an experiment needs, and write its results; or make docs/evidence.md of all results.

    python -m examples.evidence run contested [--setting cpu|gpu] [--model NAME] [--dtype NAME]
                                          [--data FOLDER] [--output_dir FOLDER] [--no_training]
    python -m examples.evidence page

`run` may be stopped and started again. Started in two terminals, it uses two processors.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from examples.evidence.cells import Work
from examples.evidence.page import EXPERIMENTS, load, write_page
from examples.evidence.summary import LEAST_SEEDS, summarise, write

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m examples.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train, measure and write results")
    run.add_argument("experiment", choices=EXPERIMENTS)
    run.add_argument("--setting", choices=("cpu", "gpu"), default="cpu")
    run.add_argument("--model", help="a folder or a hub id, in place of the setting's")
    run.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the model, in place of the setting's")
    run.add_argument("--data", type=Path, help="folder of the data, for experiments that need one")
    run.add_argument("--output_dir", type=Path, default=Path("runs/evidence"))
    run.add_argument(
        "--no_training", action="store_true", help=f"sum up the parts of which {LEAST_SEEDS} seeds are trained"
    )
    commands.add_parser("page", help="make docs/evidence.md of all results")
    options = parser.parse_args()
    if options.command == "page":
        print(write_page())
        return
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    experiment = load(options.experiment)
    if experiment.data_file and not (options.data and (options.data / experiment.data_file).is_file()):
        run.error(f"--data: expected a folder that holds {experiment.data_file} (see README.md); got {options.data}")
    changes = {name: value for name in ("model", "dtype") if (value := getattr(options, name))}
    work = Work(experiment, options.setting, options.output_dir, options.data, changes)
    if not options.no_training and (left := work.run()):
        print(f"{left} trainings are still being done by other processes; start this again when they have finished")
        return
    print(write(summarise(work, machine()), HERE / options.experiment))


def machine() -> str:
    """What the experiment ran on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
