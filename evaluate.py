"""Stage 5: figures for tables. Each command has its own flags: evaluate.py COMMAND --help."""

import argparse
import sys
from collections.abc import Sequence

from metrics import arguments
from runtime.cli import ArgumentParser, answer_early, run


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="evaluate.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generation = commands.add_parser(
        "generation", help=arguments.GENERATION_HELP, description=arguments.GENERATION_DESCRIPTION
    )
    arguments.add_generation_arguments(generation)
    reconstruction = commands.add_parser(
        "reconstruction", help=arguments.RECONSTRUCTION_HELP, description=arguments.RECONSTRUCTION_DESCRIPTION
    )
    arguments.add_reconstruction_arguments(reconstruction)
    fdr = commands.add_parser("fdr", help=arguments.FDR_HELP, description=arguments.FDR_DESCRIPTION)
    arguments.add_fdr_arguments(fdr)
    reading = commands.add_parser("reading", help=arguments.READING_HELP, description=arguments.READING_DESCRIPTION)
    arguments.add_reading_arguments(reading)
    return parser.parse_args(argv)


if __name__ == "__main__":
    answer_early(parse_arguments)

from metrics import evaluate_fdr, evaluate_generation, evaluate_reading, evaluate_reconstruction

COMMANDS = {
    "generation": evaluate_generation,
    "fdr": evaluate_fdr,
    "reconstruction": evaluate_reconstruction,
    "reading": evaluate_reading,
}


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    return COMMANDS[args.command].run(args)


if __name__ == "__main__":
    sys.exit(run(main))
