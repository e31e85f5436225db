# PYTHON_ARGCOMPLETE_OK
"""The command ``minitron``: finds a subcommand by its name and imports only that one.

A subcommand is a module ``minitron_cli.commands.NAME`` with two functions::

    def configure(parser: argparse.ArgumentParser) -> None     # declares the arguments
    def run(args: argparse.Namespace) -> int                   # does it, returns the exit code

This room alone knows all others. The modules of ``commands`` are thin: they turn arguments into a call,
and the result into a table or (``--json``) into exactly one JSON document on stdout.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from minitron import errors, extras
from minitron.arguments import Parser
from minitron.version import VERSION

if TYPE_CHECKING:
    from minitron.recipe import Effective

#: Those of all rooms.
PACKAGES = ("minitron", "minitron_build", "minitron_triton", "minitron_client", "minitron_gateway", "minitron_cli")

COMMANDS: dict[str, str] = {
    "doctor": "check what this machine can do for a recipe",
    "plan": "compute memory, limits and the roofline before anything is built",
    "convert": "turn a model into a TensorRT-LLM checkpoint",
    "inspect": "list the tensors of a checkpoint or a GGUF file",
    "build": "build an engine from a checkpoint",
    "eval": "measure what a precision costs: on a text against the unquantised model, or on lm-eval's tasks",
    "render": "render a Triton model repository from an engine",
    "check": "say what is wrong with a checkpoint, an engine or a model repository",
    "serve": "run Triton on a model repository, until told to stop",
    "status": "list the servers that 'serve' started",
    "stop": "end a server and whatever a killed one left",
    "gateway": "offer OpenAI's HTTP API over running servers",
    "generate": "send a prompt and print the text as it streams",
    "bench": "measure TTFT, ITL, TPOT, E2E and tokens/s: over a grid, under a load, or the capacity",
    "report": "turn load tests into a table, JSON, CSV and an HTML page, and compare them",
    "accept": "judge a recipe check by check, or what is there already: a checkpoint, an engine, a server that runs",
    "up": "bring checkpoint, engine and repository of a recipe up to date, and serve them",
}

#: What commands of version 0.2 are called now; each ends with this line.
RENAMED: dict[str, str] = {
    "recipe": "is 'minitron plan --show-recipe' and 'minitron plan --list-recipes' now",
    "quality": "is 'minitron eval' now, with the same arguments",
    "verify": "is 'minitron check' now, which hashes a model repository with --hash",
    "make": "is 'minitron up' now: '--until convert', '--until build', or all of it, and '--serve'",
    "demo": "is 'minitron up --demo' now",
    "probe": "is part of 'minitron accept' now: '--only tool', 'accept CHECKPOINT', 'accept ENGINE'",
    "audit": "is 'minitron accept DIR --only server' now",
    "conformance": "is 'minitron accept DIR --only behaviour' now",
    "tokens": "is part of 'minitron accept' now: 'accept DIR --only tokens --output FOLDER' stores them, "
    "'accept FILE --reference OTHER' compares",
    "repo": "is 'minitron render' and 'minitron check' now, with the same arguments",
    "latency": "is 'minitron bench' now, with the same flags",
    "load": "is 'minitron bench --profile NAME' now, with the same flags, but --capacity for --find-capacity",
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code (see ``errors``)."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser(argv).parse_args(argv)
    logging.basicConfig(level=logging.DEBUG if args.debug else logging.WARNING, format="%(message)s", stream=sys.stderr)
    if not args.debug:  # of ourselves people want to hear more than of the libraries
        for package in PACKAGES:
            logging.getLogger(package).setLevel(logging.INFO)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("minitron: interrupted", file=sys.stderr)
        return errors.EXIT_INTERRUPTED
    except BrokenPipeError:
        from minitron import console

        console.discard_stdout()
        return 0
    except Exception as error:
        if args.debug:
            raise
        message, code = explain(error)
        print(f"minitron: error: {message}", file=sys.stderr)
        return code


def call(*words: str | Path, effective: Effective | None = None) -> int:
    """Run a subcommand as a part of another one, in this process, and return its exit code; errors are the caller's.

    ``effective``: the recipe, whose layers are applied already; then neither the environment nor the words change it.
    """
    args = parsed(*words)
    args.effective = effective
    return int(args.run(args))


def parsed(*words: str | Path) -> argparse.Namespace:
    """The arguments of a subcommand; where they are none, the process ends as it does for a user who typed them."""
    argv = [str(word) for word in words]
    return _parser(argv).parse_args(argv)


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """Declare all subcommands by name, and the arguments of the one that ``argv`` names."""
    parser = Parser(
        prog="minitron",
        description="Deploy Minitron with TensorRT-LLM and Triton: convert, build, render, serve, measure.",
        epilog="'minitron COMMAND --help' explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"minitron-trtllm {VERSION}")
    parser.add_argument("--debug", action="store_true", help="log details, and show tracebacks")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    wanted = next((word for word in argv if not word.startswith("-")), None)
    if wanted in RENAMED:
        parser.error(f"'minitron {wanted}' {RENAMED[wanted]}")
    for name, about in COMMANDS.items():
        sub = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if name == wanted:
            module = importlib.import_module(f"minitron_cli.commands.{name}")
            module.configure(sub)
            sub.set_defaults(run=module.run)
    return parser


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of one command, for the documentation and for whoever asks which flags it has."""
    commands = next(a for a in _parser([name])._actions if isinstance(a, argparse._SubParsersAction))
    parser: argparse.ArgumentParser = commands.choices[name]
    return parser


def explain(error: Exception) -> tuple[str, int]:
    """One line and an exit code for any exception."""
    if isinstance(error, errors.MinitronError):
        return " ".join(str(error).split()), error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk while writing {error.filename or 'the output'}", errors.NoSpace.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
        kind = errors.InputError if missing else errors.OutputError
        return f"{error.filename}: {error.strerror}", kind.exit_code
    if isinstance(error, ModuleNotFoundError):
        told = f"the Python module {error.name} is not installed; {extras.advice(error.name or '')}"
        return told, errors.MissingDependency.exit_code
    return f"internal error, please report it ({type(error).__name__}: {error}); --debug shows where", errors.EXIT_BUG


def entry() -> NoReturn:
    """What the console script and ``python -m`` call."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow
        import argcomplete

        argcomplete.autocomplete(_parser(os.environ["COMP_LINE"].split()[1:]))
    sys.exit(main())
