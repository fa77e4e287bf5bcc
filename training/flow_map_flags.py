"""Flags of a training that turns a denoiser into a flow map (``training.flow_map``); needs no torch."""

import argparse
from typing import Any

from errors import UserError
from formats.flow_map import learned_guidance
from runtime.cli import at_least_one, finite_float, flag_of, fraction, non_negative_int

DEFAULTS = {  # the method's, ImageNet 256
    "flow_map_times": [0.4, -1.2],
    "flow_map_cfg_scale": 1.0,
    "flow_map_guidance_low": 0.0,
    "flow_map_guidance_high": 0.7,
    "flow_map_tangent": "path",
}


def add_flow_map_arguments(group: Any) -> None:
    group.add_argument(
        "--flow-map-blocks",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="Decoupled MeanFlow (arXiv 2510.24474): learn to jump, for images in 1 to 4 steps of generate.py --mode "
        "map; the last N blocks are told where a jump ends (the method: 8 of a SiT-XL's 28). Continue a trained run, "
        "with --continue-train-exp-dir, --align none and the method's --weighting lognormal --adam-beta2 0.95; a step "
        "takes 3 times the arithmetic, with guidance 4.4 times; 0: do not",
    )
    group.add_argument(
        "--flow-map-times",
        type=finite_float,
        nargs=2,
        metavar=("T", "R"),
        help="means of two normal numbers, whose logistic functions are the times of a jump: the later one is where it "
        f"begins (default: {' '.join(map(str, DEFAULTS['flow_map_times']))})",
    )
    group.add_argument(
        "--flow-map-tangent",
        choices=("path", "network"),
        help="what a jump's target is differentiated along: the velocity of the image's own path, as the method does, "
        "or the network's (improved MeanFlow, arXiv 2512.02012), which has less noise and takes one more pass unless "
        f"guidance is learned (default: {DEFAULTS['flow_map_tangent']})",
    )
    group.add_argument(
        "--flow-map-cfg-scale",
        type=at_least_one,
        metavar="X",
        help="guidance that is learned: what generate.py --cfg-scale X would do, in one pass; in the paper 2.5 "
        "(default: 1, none)",
    )
    for end, name in ((DEFAULTS["flow_map_guidance_low"], "low"), (DEFAULTS["flow_map_guidance_high"], "high")):
        group.add_argument(
            f"--flow-map-guidance-{name}",
            type=fraction,
            metavar="T",
            help=f"learned guidance acts {'from' if name == 'low' else 'to'} this time (default: {end})",
        )


def settle_flow_map(args: argparse.Namespace) -> None:
    """Defaults of these flags; without ``--flow-map-blocks`` they say nothing, are refused, and stay None."""
    for name in DEFAULTS:
        if getattr(args, name) is not None and not args.flow_map_blocks:
            raise UserError(f"{flag_of(name)} is for --flow-map-blocks: add that, or leave it out")
    if not args.flow_map_blocks:
        return
    if args.align != "none":  # settled before
        raise UserError(
            f"--flow-map-blocks with --align {args.align}: give --align none; alignment belongs to the run that is "
            "continued"
        )
    if args.flow_map_cfg_scale in (None, 1):
        for name in ("flow_map_guidance_low", "flow_map_guidance_high"):
            if getattr(args, name) is not None:
                raise UserError(f"{flag_of(name)}: no guidance is learned; add --flow-map-cfg-scale, or leave it out")
    for name, default in DEFAULTS.items():
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    if args.flow_map_guidance_low > args.flow_map_guidance_high:
        raise UserError(
            f"--flow-map-guidance-low {args.flow_map_guidance_low} lies above --flow-map-guidance-high "
            f"{args.flow_map_guidance_high}"
        )
    if args.flow_map_cfg_scale != 1 and not args.cfg_prob:
        raise UserError("--flow-map-cfg-scale with --cfg-prob 0: guidance needs the null class; leave one of them out")
    if args.token_drop or args.path_drop:
        raise UserError("--flow-map-blocks with --sprint: it sees all tokens; add --token-drop 0 --path-drop 0")
    if args.velocity_cosine_coeff:
        raise UserError("--flow-map-blocks with --velocity-cosine-coeff: its loss is of squared errors; leave one out")


def describe_flow_map(args: argparse.Namespace, depth: int) -> list[str]:
    """Of a denoiser of ``depth`` blocks, for the log."""
    if not args.flow_map_blocks:
        return []
    (begin, end), guidance = args.flow_map_times, learned_guidance(vars(args))
    lines = [
        f"flow map: blocks {depth - args.flow_map_blocks + 1} to {depth} see where a jump ends; times from means "
        f"{begin:g} and {end:g}; guidance learned: {guidance or 'none'}; differentiated along the "
        f"{args.flow_map_tangent}'s velocity"
    ]
    if "continued_from" not in args:
        lines.append("it begins from random weights, where the method continues a trained run")
    return lines
