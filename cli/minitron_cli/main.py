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
from typing import NoReturn

from minitron import errors
from minitron.arguments import Parser
from minitron.version import VERSION

#: Those of all rooms.
PACKAGES = ("minitron", "minitron_build", "minitron_triton", "minitron_client", "minitron_gateway", "minitron_cli")

COMMANDS: dict[str, str] = {
    "doctor": "check what this machine can do for a recipe",
    "plan": "compute memory, limits and the roofline before anything is built",
    "convert": "turn a model into a TensorRT-LLM checkpoint",
    "inspect": "list the tensors of a checkpoint or a GGUF file",
    "build": "build an engine from a checkpoint",
    "eval": "compare precisions with the unquantised model on a text: perplexity, KL divergence, agreement",
    "render": "render a Triton model repository from an engine",
    "check": "say what is wrong with a checkpoint, an engine or a model repository",
    "serve": "run Triton on a model repository, until told to stop",
    "status": "list the servers that 'serve' started",
    "stop": "end a server and whatever a killed one left",
    "gateway": "offer OpenAI's HTTP API over running servers",
    "generate": "send a prompt and print the text as it streams",
    "bench": "measure TTFT, ITL, TPOT, E2E and tokens/s: over a grid, under a load, or the capacity",
    "report": "turn load tests into a table, JSON, CSV and an HTML page, and compare them",
    "probe": "ask TensorRT-LLM about the toolkit's data, a checkpoint or an engine",
    "audit": "hold a running server against what its repository and plan meant",
    "conformance": "hold a running server against the documented behaviour of TensorRT-LLM's backend",
    "tokens": "store greedy tokens of a set of prompts, or compare two such files",
    "accept": "judge a recipe line by line: tool, checkpoint, engine, server, tokens, behaviour, speed",
    "make": "bring checkpoint, engine and repository of a recipe up to date",
    "demo": "go the whole way on this machine: model, checkpoint, engine, repository, server, tokens, figures",
}

#: What commands of version 0.2 are called now; each ends with this line.
RENAMED: dict[str, str] = {
    "recipe": "is 'minitron plan --show-recipe' and 'minitron plan --list-recipes' now",
    "quality": "is 'minitron eval' now, with the same arguments",
    "verify": "is 'minitron check' now, which hashes a model repository with --hash",
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
        # The reader of our stdout (head, less) left; what Python would print at exit is noise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            raise
        message, code = _explain(error)
        print(f"minitron: error: {message}", file=sys.stderr)
        return code


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


def parser_of(words: list[str]) -> argparse.ArgumentParser:
    """The parser of one (sub)command, for the documentation: ``parser_of(["repo", "render"])``."""
    parser = _parser(words)
    for word in words:
        nested = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = nested.choices[word]
    return parser


def _explain(error: Exception) -> tuple[str, int]:
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
        return (
            f"the Python module {error.name!r} is not installed; 'pip install minitron-trtllm[cpu]' brings it",
            errors.MissingDependency.exit_code,
        )
    return f"internal error, please report it ({type(error).__name__}: {error}); --debug shows where", errors.EXIT_BUG


def entry() -> NoReturn:
    """What the console script and ``python -m`` call."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow
        import argcomplete

        argcomplete.autocomplete(_parser(os.environ["COMP_LINE"].split()[1:]))
    sys.exit(main())
