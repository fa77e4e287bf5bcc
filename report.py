"""Runs → one table of what was measured, next to the published numbers, and report.html, a page with everything.

  python report.py exps/sendvae exps/ldm                         a table, and report.html
  python report.py 'exps/table2-*' --format markdown --no-html   for a README
  python report.py exps/mine --published mine=table1/sendvae-80  compare with a published row; presets know theirs

RUN is the folder of a training, an experiment (all its runs), a VAE, a folder of generated images, or any folder with
measurements (metrics/). Figures come from the metrics/*.json that evaluate.py and probe.py write; report.py measures
nothing itself and needs no GPU. Where a VAE was probed and a SiT was trained on its latents, the probe's F1 is plotted
against the SiT's FID, with Pearson's correlation over the VAEs (the paper's Figure 1), beside it those of the measures
of probe.py diffusability on the same data, with intervals and given the VAE's rFID. The page is a single file that
loads nothing, so you can keep it or send it.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from errors import UserError
from reporting import correlation
from reporting.gather import Report, gather
from reporting.tables import as_csv, as_json, as_markdown, as_text
from runtime.cli import ArgumentParser, add_debug_argument, positive_float, run

FORMATS = ("text", "markdown", "csv", "json")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="report.py", usage="%(prog)s RUN [RUN …] [flags]", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders of runs, or patterns such as 'exps/table2-*'")
    add(
        "--format", choices=FORMATS, default="text", help="layout of the table; csv and json give one record per figure"
    )
    add(
        "--published",
        action="append",
        default=[],
        metavar="RUN=ROW",
        help="compare a run with this published row, e.g. mine=table1/sendvae-80; repeat it for other runs "
        "(default: the row that the run's preset names; all rows: configs/published.yaml)",
    )
    add(
        "--baseline",
        metavar="PRESET",
        help="also list how the other presets differ from this one, seed by seed: mean and 95 %% interval, e.g. "
        "miniature/none",
    )
    add(
        "--ep-fid",
        type=_distances,
        metavar="K[,K,…]",
        help="also list after how many epochs images made without guidance were at FID (or FD) K at most (EP_FID@K), "
        "from the steps that were evaluated",
    )
    add("--html", type=Path, default=Path("report.html"), metavar="FILE", help="where to write the page")
    add("--no-html", action="store_true", help="write no page")
    add("--title", default="Send-VAE report", help="title of the page")
    add(
        "--figure1",
        type=Path,
        metavar="FILE",
        help="also draw probe F1 against FID as FILE.png, .svg or .pdf; needs 3 VAEs with both",
    )
    add("--dry-run", action="store_true", help="read everything and print the table, but write nothing")
    add_debug_argument(parser)
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def _distances(text: str) -> tuple[float, ...]:
    return tuple(positive_float(part) for part in text.split(","))


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse outputs that cannot be written, before anything is read."""
    if args.figure1 and args.figure1.suffix not in correlation.PICTURE_SUFFIXES:
        raise UserError(f"--figure1 {args.figure1}: give a file that ends in {', '.join(correlation.PICTURE_SUFFIXES)}")
    for flag, path in (("--html", None if args.no_html else args.html), ("--figure1", args.figure1)):
        if path is None:
            continue
        if path.is_dir():
            raise UserError(f"{flag} {path} is a folder; give a file, e.g. {path / 'report.html'}")
        if not path.resolve().parent.is_dir():
            raise UserError(f"{flag} {path}: there is no folder {path.parent}; make it, or give another")


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    report = gather(args.runs, args.published, args.baseline, args.ep_fid or ())
    drawn = [view for view in report.views if view.is_drawn]
    if args.figure1 and not drawn:
        most = max((view.vaes for view in report.views if view.has_f1), default=0)
        raise UserError(
            f"--figure1 needs {correlation.ENOUGH} VAEs with probe F1 (probe.py attributes) and a SiT's FID "
            f"(evaluate.py generation); there are {most}"
        )
    if not args.dry_run:
        write_files(report, args, drawn)
    try:
        print(formatted(report, args.format), flush=True)
    except BrokenPipeError:  # report.py … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def write_files(report: Report, args: argparse.Namespace, drawn: Sequence[correlation.View]) -> None:
    """The page and the figure, each if it is wanted."""
    if args.figure1:
        from reporting.drawing import write_scatter  # matplotlib takes a second to import

        write_scatter(drawn[0], report.published, args.figure1)
        print(f"{args.figure1}: {drawn[0].title}", file=sys.stderr)
    if not args.no_html:
        from reporting.page import write_page

        size = write_page(report, args.html, args.title)
        print(f"{args.html}: {size / 1e6:.1f} MB, for any browser", file=sys.stderr)


def formatted(report: Report, form: str) -> str:
    """The report in one of ``FORMATS``."""
    if form == "csv":
        return as_csv(report.rows)
    if form == "json":
        return as_json(report.rows, correlation.records(report.views), report.notes)
    if not report.tables:
        names = ", ".join(found.name for found in report.runs)
        return f"nothing has been measured yet of {names}; run evaluate.py or probe.py first"
    shown = [view for view in report.views if view.vaes >= correlation.ENOUGH]
    if form == "markdown":
        parts = [as_markdown(report.tables + report.differences)]
        parts += [correlation.as_markdown(view, report.published) for view in shown]
        parts += ["\n".join(f"- {note}" for note in report.notes)] if report.notes else []
    else:
        parts = [
            as_text(report.tables + report.differences),
            *(correlation.as_text(view, report.published) for view in shown),
        ]
        parts += ["\n".join(report.notes)] if report.notes else []
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(run(main))
