"""renyi-engine: the command line.

Exit codes: 0 done; 1 training failed; 2 bad input, or too little memory or disk for a command that does not train, told
in one line; 75 stopped by a signal after saving (resume it); 130 stopped by Ctrl-C before there was anything to save.

The whole command line is checked before torch and transformers are imported, which takes seconds.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import renyi_engine
from renyi_engine.core import DoesNotFit, Parser, exit_at_once, first_line, is_out_of_memory, only_text, parse, to_yaml
from renyi_engine.critical_alpha import AlphaStarConfig
from renyi_engine.evaluation import EvalConfig, GenerateConfig, MmluConfig, NllConfig, RefusalConfig
from renyi_engine.training import DpoConfig, SftConfig, TrainConfig

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_NOTHING_SAVED = 1, 2, 75, 130
NOTHING_SAVED = "stopped by Ctrl-C before there was anything to save"


@only_text()
def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    prog = "renyi-engine"
    try:
        parser = Parser(
            prog=prog,
            description="alpha-Renyi ensembles of LoRA adapters",
            epilog="renyi-engine COMMAND --help tells more",
        )
        parser.add_argument("--version", action="store_true", help="tell the version")
        parser.add_argument(
            "command",
            choices=sorted(_COMMANDS),
            nargs="?",
            help="; ".join(f"{n}: {c.__doc__}" for n, c in _COMMANDS.items()),
        )
        parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
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
            message = f"{first_line(error)}; smaller batches, shorter sequences or fewer particles need less memory"
        else:
            raise
        return _told(prog, message, EXIT_FAILED if options.command in ("sft", "dpo") else EXIT_BAD_INPUT)


def _told(prog: str, message: object, exit_code: int) -> int:
    print(f"{prog}: {message}", file=sys.stderr)
    return exit_code


def _sft(argv: Sequence[str]) -> int:
    """fine-tune an ensemble"""
    return _train(SftConfig, argv, "renyi-engine sft")


def _dpo(argv: Sequence[str]) -> int:
    """train an ensemble on preferences"""
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
    """evaluate an ensemble, or a base alone: mmlu, refusal or nll"""
    parser = Parser(
        prog="renyi-engine eval", description="Evaluate.", epilog="renyi-engine eval KIND --help tells more"
    )
    parser.add_argument("kind", choices=sorted(_EVALUATIONS))
    kind = parser.parse_args(argv[:1] or ["--help"]).kind
    settings, function = _EVALUATIONS[kind]
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
    """estimate the critical alpha of an adapter: above it, particles that start there part"""
    _print_result(AlphaStarConfig, argv, "renyi-engine alpha-star", "critical_alpha", "find_alpha_star")


def _generate(argv: Sequence[str]) -> None:
    """let every particle answer a few prompts"""
    _print_result(GenerateConfig, argv, "renyi-engine generate", "evaluation", "answer")


def _print_result(settings: type[Any], argv: Sequence[str], prog: str, package: str, function: str) -> None:
    config, options = parse(settings, argv, prog)
    with options.source.named_in_errors():
        print(to_yaml(config) if options.print_config else _imported(prog, package, function)(config))


def _export(argv: Sequence[str]) -> None:
    """write a checkpoint as PEFT adapter folders"""
    parser = Parser(
        prog="renyi-engine export",
        description="Write the adapters of a checkpoint as folders that PEFT and vLLM load. The base's weights are "
        "not read.",
    )
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoint-N, or RUN for its newest")
    parser.add_argument("--output_dir", "--output-dir", type=Path, required=True, help="where p000, p001, ... go")
    parser.add_argument(
        "--trust_remote_code",
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with the base model; what the run's own settings say about it does not count",
    )
    options = parser.parse_args(argv)
    export = _imported(parser.prog, "training", "export_particles")
    print(export(options.checkpoint, options.output_dir, trust_remote_code=options.trust_remote_code))


def _report(argv: Sequence[str]) -> None:
    """make the HTML report of one run, or of several side by side"""
    parser = Parser(prog="renyi-engine report")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--output", type=Path, help="default: report.html in the first run")
    options = parser.parse_args(argv)
    write_report = _imported(parser.prog, "training", "write_report")
    print(write_report(options.runs, options.output or options.runs[0] / "report.html"))


def _env(argv: Sequence[str]) -> None:
    """tell versions, devices and the path that each op takes here"""
    parser = Parser(prog="renyi-engine env")
    parser.parse_args(argv)
    print(_imported(parser.prog, "environment", "describe")(), end="")


_EVALUATIONS: dict[str, tuple[type[EvalConfig], str]] = {
    "mmlu": (MmluConfig, "evaluate_mmlu"),
    "nll": (NllConfig, "evaluate_nll"),
    "refusal": (RefusalConfig, "evaluate_refusal"),
}
_COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "sft": _sft,
    "dpo": _dpo,
    "eval": _eval,
    "generate": _generate,
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
