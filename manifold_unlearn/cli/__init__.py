"""The command line: one sub-command a public verb, each in a file of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from manifold_unlearn import __version__
from manifold_unlearn.cli import attack, capture, demo, evaluate, steer, train_dictionary, unlearn

VERBS = (demo, capture, unlearn, evaluate, attack, steer, train_dictionary)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; answers the exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        Default: those of the process.

    Returns
    -------
    int
        0; 2 after an error that the user can mend, which is printed in one line; 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(
            f"manifold-unlearn {options.command}: {' '.join(str(error).split())}", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print(f"manifold-unlearn {options.command}: stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="manifold-unlearn", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for verb in VERBS:
        verb.register(commands)
    return parser
