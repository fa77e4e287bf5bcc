"""Stage 5: figures for tables. Each command has its own flags: evaluate.py COMMAND --help."""

import sys
from collections.abc import Sequence

from metrics import evaluate_generation, evaluate_reconstruction
from runtime.cli import ArgumentParser, run

# modules with HELP, DESCRIPTION, add_arguments(parser), run(args)
COMMANDS = {"generation": evaluate_generation, "reconstruction": evaluate_reconstruction}


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="evaluate.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION))
    args = parser.parse_args(argv)
    return COMMANDS[args.command].run(args)


if __name__ == "__main__":
    sys.exit(run(main))
