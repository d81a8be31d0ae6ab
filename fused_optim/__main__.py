"""The command line: ``python -m fused_optim info|list|plan|pretrain``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from io import TextIOWrapper

USAGE = """\
usage: python -m fused_optim COMMAND [options]

  info      versions, libraries, CPU path, GPUs, backends, and what is missing and how to get it
  list      rules and codecs with their bytes per parameter
  plan      where the memory of training goes, and what fits (python -m fused_optim plan --help)
  pretrain  train a small Llama on real text (python -m fused_optim pretrain --help)

  --version shows the version"""


def _fail(message: str) -> int:
    print(f"{message}\n\n{USAGE}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit status: 0, 1 if it failed, 2 if it was called wrongly."""
    command, *options = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        from . import __version__

        print(f"fused_optim {__version__}")
        return 0
    if command == "pretrain":
        from .training import pretrain

        return pretrain.main(options)
    if command == "plan":
        from .training import plan_command

        return plan_command.main(options)
    if command not in ("info", "list"):
        return _fail(f"unknown command {command!r}: the commands are info, list, plan and pretrain")
    if options in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if options:
        return _fail(f"{command} takes no options, got {' '.join(options)}")
    from . import info

    print(info.info() if command == "info" else info.catalogue())
    return 0


def _run() -> int:
    """The command of this process, whatever its terminal can show and however soon its reader leaves."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return main(sys.argv[1:])
        finally:
            # Here and not when Python ends, which would show a traceback. There is none after `>&-`.
            if sys.stdout is not None:  # pyright: ignore[reportUnnecessaryComparison]
                sys.stdout.flush()
    except BrokenPipeError:
        # What is still in the buffers goes nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(_run())
