"""renyi-engine: the command line.

Exit codes: 0 done; 1 training failed; 2 bad input, told in one line; 75 stopped by a signal after saving (resume it);
130 stopped by Ctrl-C before there was anything to save.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from renyi_engine import environment, export
from renyi_engine.alpha_star import AlphaStarConfig, alpha_star
from renyi_engine.answers import GenerateConfig, answer
from renyi_engine.config import EvalConfig, TrainConfig
from renyi_engine.diagnostics import NllConfig, evaluate_nll
from renyi_engine.dpo import DpoConfig
from renyi_engine.dry_run import dry_run
from renyi_engine.memory import DoesNotFit, first_line, is_out_of_memory
from renyi_engine.mmlu import MmluConfig, evaluate_mmlu
from renyi_engine.progress import use_plain_warnings
from renyi_engine.refusal import RefusalConfig, evaluate_refusal
from renyi_engine.report import write_report
from renyi_engine.settings import parse, to_yaml
from renyi_engine.sft import SftConfig
from renyi_engine.terminal import only_text
from renyi_engine.trainer import TrainingDiverged, TrainingInterrupted, train

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_NOTHING_SAVED = 1, 2, 75, 130


@only_text()
def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="renyi-engine",
        description="alpha-Renyi ensembles of LoRA adapters",
        epilog="renyi-engine COMMAND --help tells more",
    )
    parser.add_argument(
        "command", choices=sorted(_COMMANDS), help="; ".join(f"{n}: {c.__doc__}" for n, c in _COMMANDS.items())
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    command = parser.parse_args(argv[:1] or ["--help"]).command
    use_plain_warnings()
    _quiet_libraries()
    try:
        _COMMANDS[command](argv[1:])
    except ValueError as error:
        print(f"renyi-engine {command}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except TrainingInterrupted as stop:
        print(f"renyi-engine {command}: {stop}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return EXIT_NOTHING_SAVED
    except (TrainingDiverged, DoesNotFit, OSError) as error:
        print(f"renyi-engine {command}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        remedy = "smaller batches, shorter sequences or fewer particles need less memory"
        print(f"renyi-engine {command}: {first_line(error)}; {remedy}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _sft(argv: Sequence[str]) -> None:
    """fine-tune an ensemble"""
    _train(SftConfig, argv, "renyi-engine sft")


def _dpo(argv: Sequence[str]) -> None:
    """train an ensemble on preferences"""
    _train(DpoConfig, argv, "renyi-engine dpo")


def _train(settings: type[TrainConfig], argv: Sequence[str], prog: str) -> None:
    config, options = parse(settings, argv, prog, dry_run=True)
    with options.source.named_in_errors():
        if options.print_config:
            print(to_yaml(config), end="")
        elif options.dry_run:
            print(dry_run(config), end="")
        else:
            train(config)


def _eval(argv: Sequence[str]) -> None:
    """evaluate an ensemble, or a base alone: mmlu, refusal or nll"""
    parser = argparse.ArgumentParser(
        prog="renyi-engine eval", description="Evaluate.", epilog="renyi-engine eval KIND --help tells more"
    )
    parser.add_argument("kind", choices=sorted(_EVALUATIONS))
    kind = parser.parse_args(argv[:1] or ["--help"]).kind
    settings, evaluate = _EVALUATIONS[kind]
    _print_result(evaluate, *parse(settings, argv[1:], f"renyi-engine eval {kind}"))


def _alpha_star(argv: Sequence[str]) -> None:
    """estimate the alpha from which on particles that start at an adapter part"""
    _print_result(alpha_star, *parse(AlphaStarConfig, argv, "renyi-engine alpha-star"))


def _generate(argv: Sequence[str]) -> None:
    """let every particle answer a few prompts"""
    _print_result(answer, *parse(GenerateConfig, argv, "renyi-engine generate"))


def _print_result(work: Callable[[Any], str], config: Any, options: argparse.Namespace) -> None:
    with options.source.named_in_errors():
        print(to_yaml(config) if options.print_config else work(config))


def _export(argv: Sequence[str]) -> None:
    """write a checkpoint as PEFT adapter folders"""
    parser = argparse.ArgumentParser(prog="renyi-engine export", description=export.__doc__)
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoint-N, or RUN for its newest")
    parser.add_argument("--output_dir", type=Path, required=True, help="where p000, p001, ... go")
    options = parser.parse_args(argv)
    print(export.export(options.checkpoint, options.output_dir))


def _report(argv: Sequence[str]) -> None:
    """make the HTML report of one run, or of several side by side"""
    parser = argparse.ArgumentParser(prog="renyi-engine report")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--output", type=Path, help="default: report.html in the first run")
    options = parser.parse_args(argv)
    print(write_report(options.runs, options.output or options.runs[0] / "report.html"))


def _env(argv: Sequence[str]) -> None:
    """tell versions, devices and the path that each op takes here"""
    argparse.ArgumentParser(prog="renyi-engine env").parse_args(argv)
    print(environment.describe(), end="")


_EVALUATIONS: dict[str, tuple[type[EvalConfig], Callable[[Any], str]]] = {
    "mmlu": (MmluConfig, evaluate_mmlu),
    "nll": (NllConfig, evaluate_nll),
    "refusal": (RefusalConfig, evaluate_refusal),
}
_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "sft": _sft,
    "dpo": _dpo,
    "eval": _eval,
    "generate": _generate,
    "alpha-star": _alpha_star,
    "export": _export,
    "report": _report,
    "env": _env,
}


def _quiet_libraries() -> None:
    # one progress display, ours; errors still come through
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
