"""renyi-engine: the command line.

Exit codes: 0 done; 1 training failed; 2 bad input, or too little memory or disk outside of training, explained in one
line; 75 stopped by a signal after saving (resume it); 130 stopped by Ctrl-C before there was anything to save.

The whole command line is checked before torch and transformers are imported, which takes seconds.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import renyi_engine
from renyi_engine.core import DoesNotFit, Parser, exit_at_once, is_out_of_memory, only_text, parse, reason, to_yaml
from renyi_engine.critical_alpha import AlphaStarConfig
from renyi_engine.evaluation import EvalConfig, FitWeightsConfig, GenerateConfig, MmluConfig, NllConfig, RefusalConfig
from renyi_engine.training import DpoConfig, SftConfig, TrainConfig

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_NOTHING_SAVED = 1, 2, 75, 130
NOTHING_SAVED = "stopped by Ctrl-C before there was anything to save"


@only_text()
def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    prog = "renyi-engine"
    try:
        parser = Parser(prog=prog, description="Alpha-Renyi ensembles of LoRA adapters.")
        parser.add_argument("--version", action="store_true", help="show the version")
        commands = parser.add_subparsers(
            dest="command", metavar="COMMAND", title="commands", description=f"{prog} COMMAND --help says more."
        )
        for name, command in _COMMANDS.items():
            commands.add_parser(name, help=command.__doc__, add_help=False)
        options = parser.parse_args(argv[:1] or ["--help"])
        if options.version:
            print(f"renyi-engine {renyi_engine.__version__}")
            return 0
        prog += f" {options.command}"
        return _COMMANDS[options.command](argv[1:]) or 0
    except ValueError as error:
        return _told(prog, error, EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        return _told(prog, NOTHING_SAVED, EXIT_NOTHING_SAVED)
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, OSError):
            message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        elif isinstance(error, DoesNotFit):
            message = str(error)
        elif is_out_of_memory(error):
            message = f"{reason(error)}; smaller batches, shorter sequences or fewer particles need less memory"
        else:
            raise
        return _told(prog, message, EXIT_FAILED if options.command in ("sft", "dpo") else EXIT_BAD_INPUT)


def _told(prog: str, message: object, exit_code: int) -> int:
    print(f"{prog}: {message}", file=sys.stderr)
    return exit_code


def _sft(argv: Sequence[str]) -> int:
    """train an ensemble on texts, chats, or prompts with completions"""
    return _train(SftConfig, argv, "renyi-engine sft")


def _dpo(argv: Sequence[str]) -> int:
    """train an ensemble on pairs of a chosen and a rejected completion"""
    return _train(DpoConfig, argv, "renyi-engine dpo")


def _train(settings: type[TrainConfig], argv: Sequence[str], prog: str) -> int:
    config, options = parse(settings, argv, prog, dry_run=True)
    with options.source.named_in_errors():
        if options.print_config:
            print(to_yaml(config), end="")
        elif options.dry_run:
            print(_imported(prog, "training", "describe_run")(config), end="")
        else:
            train = _imported(prog, "training", "train")
            from renyi_engine.training import TrainingDiverged, TrainingInterrupted

            try:
                train(config)
            except TrainingInterrupted as stop:
                return _told(prog, stop, EXIT_INTERRUPTED)
            except TrainingDiverged as error:
                return _told(prog, error, EXIT_FAILED)
    return 0


def _eval(argv: Sequence[str]) -> int | None:
    """evaluate an ensemble, or a base model alone: nll, mmlu or refusal"""
    parser = Parser(prog="renyi-engine eval", description="Evaluate an ensemble, or a base model alone.")
    kinds = parser.add_subparsers(
        dest="kind",
        metavar="KIND",
        required=True,
        title="kinds",
        description="renyi-engine eval KIND --help says more.",
    )
    for name, (_, _, what) in _EVALUATIONS.items():
        kinds.add_parser(name, help=what, add_help=False)
    kind = parser.parse_args(argv[:1] or ["--help"]).kind
    settings, function, _ = _EVALUATIONS[kind]
    prog = f"renyi-engine eval {kind}"
    try:
        _print_result(settings, argv[1:], prog, "evaluation", function)
    except KeyboardInterrupt:
        if kind != "refusal":
            raise
        stopped = "stopped by Ctrl-C; the same command goes on from the responses that are saved"
        return _told(prog, stopped, EXIT_INTERRUPTED)
    return None


def _alpha_star(argv: Sequence[str]) -> None:
    """estimate the critical alpha of an adapter, above which particles move apart"""
    _print_result(AlphaStarConfig, argv, "renyi-engine alpha-star", "critical_alpha", "find_alpha_star")


def _fit_weights(argv: Sequence[str]) -> None:
    """fit the weights of an ensemble's particles to held-out rows"""
    _print_result(FitWeightsConfig, argv, "renyi-engine fit-weights", "evaluation", "fit_weights")


def _generate(argv: Sequence[str]) -> None:
    """show what every particle answers to a few prompts"""
    _print_result(GenerateConfig, argv, "renyi-engine generate", "evaluation", "answer")


def _print_result(settings: type[Any], argv: Sequence[str], prog: str, package: str, function: str) -> None:
    config, options = parse(settings, argv, prog)
    with options.source.named_in_errors():
        print(to_yaml(config) if options.print_config else _imported(prog, package, function)(config))


def _export(argv: Sequence[str]) -> None:
    """write the adapters of a checkpoint as folders that PEFT loads"""
    parser = Parser(
        prog="renyi-engine export",
        description="Write the adapters of a checkpoint as folders that PEFT and vLLM load. The base's weights are "
        "not read.",
    )
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoint-N, or RUN for its newest")
    parser.add_argument(
        "--output_dir", "--output-dir", type=Path, required=True, metavar="FOLDER", help="where p000, p001, ... go"
    )
    parser.add_argument(
        "--trust_remote_code",
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with the base model; the run's own setting for this is ignored",
    )
    options = parser.parse_args(argv)
    export = _imported(parser.prog, "training", "export_particles")
    print(export(options.checkpoint, options.output_dir, trust_remote_code=options.trust_remote_code))


def _report(argv: Sequence[str]) -> None:
    """write the HTML report of one run, or of several runs side by side"""
    parser = Parser(prog="renyi-engine report")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the first run")
    options = parser.parse_args(argv)
    write_report = _imported(parser.prog, "training", "write_report")
    print(write_report(options.runs, options.output or options.runs[0] / "report.html"))


def _env(argv: Sequence[str]) -> None:
    """show versions, devices, and which code path each op takes here"""
    parser = Parser(prog="renyi-engine env")
    parser.parse_args(argv)
    print(_imported(parser.prog, "environment", "describe")(), end="")


_EVALUATIONS: dict[str, tuple[type[EvalConfig], str, str]] = {
    "nll": (NllConfig, "evaluate_nll", "which examples are contested, and which are out of support"),
    "mmlu": (MmluConfig, "evaluate_mmlu", "right answers and uncertainty on MMLU, with lm-eval's prompts"),
    "refusal": (RefusalConfig, "evaluate_refusal", "how often particles refuse prompts, and where they disagree"),
}
_COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "sft": _sft,
    "dpo": _dpo,
    "eval": _eval,
    "generate": _generate,
    "fit-weights": _fit_weights,
    "alpha-star": _alpha_star,
    "export": _export,
    "report": _report,
    "env": _env,
}


def _imported(prog: str, package: str, name: str) -> Any:
    """Import a function from a package of renyi_engine, and with it torch and transformers; keep transformers quiet."""
    # one progress display, ours; errors still come through
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with exit_at_once(EXIT_NOTHING_SAVED, f"{prog}: {NOTHING_SAVED}"):
        import transformers

        from renyi_engine.core import use_plain_warnings

        use_plain_warnings()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        return getattr(importlib.import_module(f"renyi_engine.{package}"), name)


if __name__ == "__main__":
    sys.exit(main())
