"""An experiment: stages that run one after the other, each a script and its flags, as a preset in configs/experiments.

  ./run_experiment.sh PRESET [--dry-run] [--STAGE.FLAG VALUE …] [--VARIABLE VALUE …]

Finished stages are skipped, the first failure stops the experiment with the stage's exit code, and the same command
continues from there: every stage resumes by itself. --dry-run prints every command and builds every stage at its real
sizes (two steps each) without training anything. --STAGE.FLAG null leaves out a flag that the preset sets, and true
gives one without a value. A study is a preset that runs other presets, several times each with other variables (seeds),
one after the other.
"""

import argparse
import fnmatch
import itertools
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from errors import UserError
from files import write_atomically
from runtime.cli import EXIT_FAILED, EXIT_OK, ArgumentParser, add_debug_argument, flag_of, run
from runtime.stage_process import ROOT, Expectation, call, said, tail
from schema import MalformedError, check, parse_yaml, read_json

PRESETS = ROOT / "configs" / "experiments"
STAMPS_NAME = "experiment.json"
LOGS_NAME = "logs"
PRESET_NAME = "preset.json"  # which runs it made and what they reproduce
# Variables that say where things lie and which of several equal runs it is, not what is done.
PLACES = {"name", "exps", "seed", "images", "val_images", "data", "reference", "celeba", "deepfashion", "awa"}
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of a stage that somebody stopped
WORDS = {"null": None, "true": True, "false": False}  # of a flag, on the command line as in a preset
REQUIRED = "?"  # a variable that the command line must give

Scalar = str | float | bool | None
Conditional = TypedDict("Conditional", {"if": str | list[str], "value": Any})
Flags = dict[str, Scalar | list[Scalar] | Conditional]
StageSpec = TypedDict(
    "StageSpec",
    {
        "script": str,
        "flags": Flags | None,
        "product": str,
        "if": str | list[str] | None,
        "dry_run": Flags | None,
        "dry_run_needs": str | None,
        "single_process": bool | None,
        "what": str | None,
        "minutes": float | None,
        "show": bool | None,
    },
)


class PresetFile(TypedDict):
    """What a preset changes of its base; null removes."""

    base: str | None
    description: str | None
    published: str | None
    variables: dict[str, Scalar] | None
    stages: dict[str, dict | None] | None
    needs: dict[str, str | None] | None
    closing: str | None


class Member(TypedDict):
    """Presets of a study, run with each of several values of some variables."""

    preset: str | list[str]
    each: dict[str, Scalar] | None
    variables: dict[str, Scalar] | None


class StudyFile(TypedDict):
    description: str | None
    variables: dict[str, Scalar] | None
    experiments: list[Member]
    closing: str | None


class PresetRecord(TypedDict):
    """``preset.json``."""

    preset: str
    published: str | None
    runs: list[str]
    changes: list[str] | None


@dataclass(frozen=True)
class Stage:
    """One command of an experiment.

    Attributes:
        name: e.g. ``ldm``.
        command: what is run from the repository's root.
        product: a path that exists once the stage is done.
        dry_command: what a dry run runs; None where that needs the product of an earlier stage that is not there.
        waits_for: that product.
        what: that it does, in words.
        minutes: that it takes, where somebody measured it.
        show: its output is shown even where that of others goes to a file.
    """

    name: str
    command: list[str]
    product: Path
    dry_command: list[str] | None
    waits_for: str = ""
    what: str = ""
    minutes: float | None = None
    show: bool = False


@dataclass(frozen=True)
class Experiment:
    """A preset with all its variables replaced.

    Attributes:
        preset: its name.
        name: of its runs.
        folder: where its stamps lie.
        stages: in order.
        closing: what to tell the user at the end.
        published: id of the published row that it reproduces, if any.
        runs: names of the runs that are its own: not of those that several experiments share.
        changes: flags that make it another experiment than its preset, e.g. ``--ldm.epochs 10``.
        needs: paths that other presets make, and how to come by them; looked for before hours have passed.
    """

    preset: str
    name: str
    folder: Path
    stages: list[Stage]
    closing: str
    published: str | None = None
    runs: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    needs: Mapping[str, str] = field(default_factory=dict)


def preset_names() -> list[str]:
    """What may be given as PRESET."""
    return sorted(str(path.relative_to(PRESETS).with_suffix("")) for path in PRESETS.rglob("*.yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """Read a preset and what it is based on: stages and flags of the base hold unless they are replaced; null removes.

    Raises:
        UserError: no such preset, one with keys that nobody reads, or one that is its own base.
    """
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"there is no preset {name}; there are {', '.join(preset_names())}")
    try:
        return _read_preset(path, ())
    except MalformedError as error:
        raise UserError(f"{path}: {error}; see {PRESETS / 'sendvae_imagenet256.yaml'}") from error


def _read_preset(path: Path, based_on_it: tuple[Path, ...]) -> dict[str, Any]:
    preset = parse_yaml(path.read_bytes())
    if "experiments" in preset:
        check(preset, StudyFile, exact=True)
        if based_on_it:
            raise MalformedError(f"its base {path} is a study, not a preset")
        return preset
    check(preset, PresetFile, exact=True)
    base = preset.pop("base", None)
    inherited = _read_base(base, (*based_on_it, path)) if base else {}
    inherited.pop("published", None)  # what a base reproduces is not what this preset reproduces
    merged = _merge(inherited, preset)
    check(merged.get("stages"), dict[str, StageSpec], "stages", exact=True)
    return merged


def _read_base(name: str, based_on_it: tuple[Path, ...]) -> dict[str, Any]:
    path = PRESETS / f"{name}.yaml"
    if path in based_on_it:
        raise MalformedError(f"it is its own base, through {name}")
    if not path.is_file():
        raise MalformedError(f"there is no preset {name} to be its base")
    return _read_preset(path, based_on_it)


def resolve_all(name: str, output_dir: str, overrides: Sequence[str]) -> tuple[list[Experiment], str]:
    """The experiments of a preset, one unless it is a study, and what to tell the user after the last.

    Args:
        name, output_dir, overrides: as :func:`resolve` takes them. In a study, a flag goes to every experiment that
            has the stage, a variable to every experiment that has the variable.
    """
    preset = load_preset(name)
    if "experiments" not in preset:
        experiment = resolve(name, preset, output_dir, overrides)
        return [replace(experiment, closing="")], experiment.closing
    pairs, variables = _parse_overrides(overrides), {"exps": output_dir, **preset.get("variables", {})}
    for key, value in pairs:
        if "." not in key:
            _set_variable(variables, key, value, name)
    flags = [(key, value) for key, value in pairs if "." in key]
    members = [
        _resolve_member(member_name, member, each, output_dir, variables, flags)
        for member in preset["experiments"]
        for each in _combinations(member.get("each") or {}, variables)  # every preset with one seed, then the next
        for member_name in ([member["preset"]] if isinstance(member["preset"], str) else member["preset"])
    ]
    for key, _ in flags:
        if not any(key.partition(".")[0] in load_preset(found.preset)["stages"] for found in members):
            raise UserError(f"--{key}: no experiment of {name} has a stage {key.partition('.')[0]}")
    return members, _expand(preset.get("closing", ""), variables)


def _combinations(each: Mapping[str, str], variables: Mapping[str, str]) -> list[dict[str, str]]:
    """``{"seed": "0,1"}`` → ``[{"seed": "0"}, {"seed": "1"}]``; of several, all combinations."""
    choices = [
        [(key, value.strip()) for value in _expand(values, variables).split(",")] for key, values in each.items()
    ]
    return [dict(chosen) for chosen in itertools.product(*choices)]


def _resolve_member(
    name: str,
    member: Mapping[str, Any],
    each: Mapping[str, str],
    output_dir: str,
    variables: Mapping[str, str],
    flags: Sequence[tuple[str, Any]],
) -> Experiment:
    preset = load_preset(name)
    if "experiments" in preset:
        raise UserError(f"{name} is a study itself; a study runs presets")
    own = preset.get("variables", {})
    given = {key: value for key, value in variables.items() if key in own} | (member.get("variables") or {}) | each
    run_name = "-".join([name.replace("/", "-"), *(f"{key}{value}" for key, value in each.items())])
    there = [(key, value) for key, value in flags if key.partition(".")[0] in preset["stages"]]
    pairs = [*given.items(), ("name", run_name), *there]
    return replace(_resolve(name, preset, output_dir, pairs), closing="")


def resolve(name: str, preset: Mapping[str, Any], output_dir: str, overrides: Sequence[str]) -> Experiment:
    """Apply a command line's overrides and replace variables.

    Args:
        name: of the preset.
        preset: of :func:`load_preset`.
        output_dir: folder of all runs.
        overrides: ``--STAGE.FLAG [VALUE]`` and ``--VARIABLE VALUE``; of a stage's flag true is a bare one, null none.
    """
    return _resolve(name, preset, output_dir, _parse_overrides(overrides))


def _resolve(
    preset_name: str, preset: Mapping[str, Any], output_dir: str, overrides: Sequence[tuple[str, Any]]
) -> Experiment:
    name = preset_name.replace("/", "-")
    variables = {"name": name, "exps": output_dir, **preset.get("variables", {})}
    flags = {stage: dict(spec.get("flags") or {}) for stage, spec in preset["stages"].items()}
    for key, value in overrides:
        stage, _, flag = key.partition(".")
        if flag:
            if stage not in flags:
                raise UserError(f"--{key}: {name} has no stage {stage}; it has {', '.join(flags)}")
            flags[stage][flag] = WORDS.get(value, value) if isinstance(value, str) else value
        else:
            _set_variable(variables, key, value, name)
    given = {key for key, _ in overrides}
    if "seed" in given and "name" not in given:  # a run of its own, named as a study names it
        variables["name"] = f"{name}-seed{variables['seed']}"
    for key, value in variables.items():
        if value == REQUIRED:
            raise UserError(f"{flag_of(key)} is needed by {name}")
    changes = _changes(preset, flags, variables)
    variables = {key: _expand(value, variables) for key, value in variables.items()}
    stages = [
        _stage(stage, spec, flags[stage], variables)
        for stage, spec in preset["stages"].items()
        if _holds(spec.get("if"), variables)
    ]
    closing = _expand(preset.get("closing", ""), variables)
    name, runs = variables["name"], _run_names(stages, variables["name"])
    folder = Path(variables["exps"]) / name
    published = preset.get("published")
    needs = {_expand(path, variables): remedy for path, remedy in preset.get("needs", {}).items()}
    return Experiment(preset_name, name, folder, stages, closing, published, runs, changes, needs)


def _changes(preset: Mapping[str, Any], flags: Mapping[str, Mapping], variables: Mapping[str, Any]) -> tuple[str, ...]:
    """What differs from the preset as it stands, places and seeds apart, as it was given."""
    found = []
    for stage, now in flags.items():
        before = preset["stages"][stage].get("flags") or {}
        found += [(f"{stage}.{flag}", before.get(flag), value) for flag, value in now.items() if flag != "seed"]
    defaults = {key: value for key, value in preset.get("variables", {}).items() if key not in PLACES}
    found += [(key, value, variables[key]) for key, value in defaults.items() if value != REQUIRED]
    given = ((_as_flag(key, before), _as_flag(key, now)) for key, before, now in found)
    return tuple(sorted(now for before, now in given if before != now))


def _as_flag(key: str, value: Any) -> str:
    if value is None or value is False:
        return f"no --{key}"
    words = [] if value is True else value if isinstance(value, list) else [value]
    return " ".join([flag_of(key), *map(str, words)])


def _run_names(stages: Sequence[Stage], experiment: str) -> tuple[str, ...]:
    words = [word for stage in stages for word in stage.command]
    names = [name for flag, name in itertools.pairwise(words) if flag == "--exp-name"]
    return tuple(name for name in dict.fromkeys(names) if name == experiment or name.startswith(f"{experiment}-"))


def _set_variable(variables: dict[str, Any], key: str, value: Any, where: str) -> None:
    if key.replace("-", "_") not in variables:
        known = ", ".join(flag_of(variable) for variable in variables if variable != "exps")
        raise UserError(f"--{key} is not known: flags of stages are --STAGE.FLAG, variables of {where} are {known}")
    variables[key.replace("-", "_")] = value


def run_stages(experiment: Experiment, brief: bool = False) -> int:
    """Run what is not finished; returns the exit code of the first stage that fails, or 0.

    Args:
        experiment: all of it.
        brief: one line a stage; what they say goes to ``logs/STAGE.log`` in the experiment's folder.
    """
    if not experiment.stages:
        raise UserError(_nothing_to_do(experiment.preset))
    stamps = _read_stamps(experiment.folder)
    _check_needs(experiment, stamps)
    _write_preset(experiment)
    begin, stages = time.monotonic(), experiment.stages
    expectation = Expectation([stage.minutes for stage in stages])
    for number, stage in enumerate(stages, start=1):
        title = f"[{number}/{len(stages)}] {stage.name}"
        if _is_finished(stage, stamps):
            print(f"{title}: finished already", flush=True)
            continue
        log = experiment.folder / LOGS_NAME / f"{stage.name}.log" if brief else None
        if brief:
            title = f"[{number}/{len(stages)}] {stage.what}{_expected(expectation, number - 1)}"
            print(title, end="", flush=True)
        else:
            print(f"{title}: {shlex.join(stage.command)}", flush=True)
        expectation.begin()
        for later in experiment.stages[number - 1 :]:  # what was made from an earlier result of this stage is stale
            stamps.pop(later.name, None)
        _write_stamps(experiment.folder, stamps)
        code = call(stage.command, log, title)
        if code:
            if brief:
                print(f"\n{tail(log)}", file=sys.stderr)
                title = f"{shlex.join(stage.command)} ({log})"
            print(f"{title}: stopped with exit code {code}; the same command continues from here", file=sys.stderr)
            return code
        if not stage.product.exists():
            raise UserError(f"stage {stage.name} ended well but left no {stage.product}: correct the preset's product")
        stamps[stage.name] = stage.command
        _write_stamps(experiment.folder, stamps)
        took = _minutes(expectation.end(number - 1))
        print(f": {took}" if brief else f"{title}: done in {took}", flush=True)
        if brief and stage.show:
            print(said(log), flush=True)
    print(f"{experiment.name}: all stages are finished ({_minutes(time.monotonic() - begin)})", flush=True)
    return EXIT_OK


def _is_finished(stage: Stage, stamps: Mapping[str, list[str]]) -> bool:
    return stamps.get(stage.name) == stage.command and stage.product.exists()


def _check_needs(experiment: Experiment, stamps: Mapping[str, list[str]]) -> None:
    """What a stage that is still to run reads, and no earlier one makes, must be there."""
    words = {word for stage in experiment.stages if not _is_finished(stage, stamps) for word in stage.command}
    for path, remedy in experiment.needs.items():
        if path in words and not Path(path).exists():
            raise UserError(f"{experiment.preset} needs {path}, which is not there: {remedy}")


def dry_run(experiment: Experiment, built: set[tuple[str, ...]]) -> int:
    """Print every command and build every stage that can be built and is not in ``built`` yet, which grows."""
    if not experiment.stages:
        print(f"    {_nothing_to_do(experiment.preset)}", flush=True)
    for number, stage in enumerate(experiment.stages, start=1):
        print(f"[{number}/{len(experiment.stages)}] {stage.name}: {shlex.join(stage.command)}", flush=True)
        if stage.dry_command is None:
            print(f"    not built: it needs {stage.waits_for}, which is not there yet", flush=True)
            continue
        what = _without_names(stage.dry_command)
        if what in built:
            print("    built before, with the same flags", flush=True)
        elif code := call(stage.dry_command):
            print(f"    failed: {shlex.join(stage.dry_command)}", file=sys.stderr)
            return code
        built.add(what)
    return EXIT_OK


def _nothing_to_do(preset: str) -> str:
    conditions = [stage.get("if") or [] for stage in load_preset(preset)["stages"].values()]
    names = dict.fromkeys(name for each in conditions for name in ([each] if isinstance(each, str) else each))
    flags = ", ".join(flag_of(name) for name in names)
    return f"{preset} has nothing to do: give one of {flags}"


def _without_names(command: Sequence[str]) -> tuple[str, ...]:
    """A dry run's command without the names of what it would write."""
    named = [i for i, word in enumerate(command) if word in ("--exp-name", "--output-dir", "--seed")]
    return tuple(word for i, word in enumerate(command) if i not in named and i - 1 not in named)


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="run_experiment.sh",
        usage="%(prog)s PRESET [--dry-run] [--STAGE.FLAG VALUE ...] [--VARIABLE VALUE ...]",
        description=__doc__,
        epilog=_describe_presets(),
    )
    parser.add_argument(
        "preset", metavar="PRESET", help="a file of configs/experiments, without .yaml; with --dry-run also 'table*'"
    )
    parser.add_argument("--output-dir", default="exps", metavar="DIR", help="folder of all runs")
    parser.add_argument("--stages", metavar="A,B", help="only these, in the preset's order")
    parser.add_argument(
        "--brief", action="store_true", help="one line a stage; what they say goes to logs/STAGE.log in its folder"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, build every stage, train nothing")
    add_debug_argument(parser)
    args, overrides = parser.parse_known_args(argv)
    if "*" in args.preset:
        return _dry_run_of_many(args, overrides)
    experiments, closing = resolve_all(args.preset, args.output_dir, overrides)
    if args.stages:
        experiments, closing = _select(experiments, args.stages.split(","), args.preset), ""
    built: set[tuple[str, ...]] = set()
    for experiment in experiments:
        if len(experiments) > 1:
            print(f"== {experiment.name}", flush=True)
        if code := dry_run(experiment, built) if args.dry_run else run_stages(experiment, args.brief):
            return code
    if closing and not args.dry_run:
        print(f"\n{closing.rstrip()}")
    return EXIT_OK


def _dry_run_of_many(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Every preset that matches, whatever a stage's exit code; stages of equal flags are built once."""
    names = fnmatch.filter(preset_names(), args.preset)
    if not names or not args.dry_run:
        raise UserError(f"{args.preset} is {'a pattern, for --dry-run only' if names else 'matched by no preset'}")
    built: set[tuple[str, ...]] = set()
    failed = []
    for name in names:
        given = [word for key in _required(name) for word in (f"--{key}", key.upper())]
        for experiment in resolve_all(name, args.output_dir, [*given, *overrides])[0]:
            print(f"== {experiment.name}", flush=True)
            code = dry_run(experiment, built)
            if code in STOPPED:
                return code
            if code:
                failed.append(experiment.name)
    print(
        f"{len(names)} presets, {len(built)} different stages built, {len(failed)} failed: {', '.join(failed) or '-'}"
    )
    return EXIT_FAILED if failed else EXIT_OK


def _required(name: str) -> list[str]:
    return [key for key, value in load_preset(name).get("variables", {}).items() if value == REQUIRED]


def _select(experiments: Sequence[Experiment], wanted: Sequence[str], preset: str) -> list[Experiment]:
    """Only the wanted stages, of the experiments that have any of them."""
    there = dict.fromkeys(stage.name for experiment in experiments for stage in experiment.stages)
    if unknown := [name for name in wanted if name not in there]:
        raise UserError(f"--stages {unknown[0]}: {preset} has {', '.join(there)}")
    selected = [
        replace(experiment, stages=[stage for stage in experiment.stages if stage.name in wanted])
        for experiment in experiments
    ]
    return [experiment for experiment in selected if experiment.stages]


def _stage(name: str, spec: Mapping[str, Any], flags: Mapping[str, Any], variables: Mapping[str, str]) -> Stage:
    script = [_expand(word, variables) for word in spec["script"].split()]
    if spec.get("single_process") or script[0] == "-m":
        start = [os.environ.get("PYTHON", sys.executable), *script]
    else:
        start = ["./launch.sh", *script]
    product = Path(_expand(spec["product"], variables))
    dry, waits_for = None, _expand(spec.get("dry_run_needs", ""), variables)
    if not waits_for or (ROOT / waits_for).exists():
        waits_for = ""
        dry = start + _command_line(_merge(flags, spec.get("dry_run") or {}), variables) + ["--dry-run"]
    command, what = start + _command_line(flags, variables), _expand(spec.get("what", name), variables)
    return Stage(name, command, product, dry, waits_for, what, spec.get("minutes"), bool(spec.get("show")))


def _command_line(flags: Mapping[str, Any], variables: Mapping[str, str]) -> list[str]:
    """``{flag: value}`` → words.

    true is a bare flag, false and null none, a list several values, ``{if: VARIABLE, value: …}`` a condition.
    """
    words = []
    for flag, value in flags.items():
        if isinstance(value, Mapping):
            value = value["value"] if _holds(value["if"], variables) else None
        if value is None or value is False:
            continue
        words.append(f"--{flag}")
        if value is not True:
            words += [_expand(part, variables) for part in (value if isinstance(value, list) else [value])]
    return words


def _holds(condition: str | list[str] | None, variables: Mapping[str, str]) -> bool:
    """Whether a variable, or each of several, has a value; so does no condition at all."""
    names = [condition] if isinstance(condition, str) else condition or []
    return all(variables.get(name) for name in names)


def _parse_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            pairs.append((key, value if equals else True))
        elif pairs and pairs[-1][1] is True:
            pairs[-1] = pairs[-1][0], word
        elif pairs:
            before = pairs[-1][1]
            pairs[-1] = pairs[-1][0], [*(before if isinstance(before, list) else [before]), word]
        else:
            raise UserError(f"{word!r} belongs to no flag; give --STAGE.FLAG VALUE")
    return pairs


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` over ``base``, mappings merged in depth, null removing."""
    merged = dict(base)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(key, {}), Mapping):
            merged[key] = _merge(merged.get(key, {}), value)
        else:
            merged[key] = value
    return merged


def _expand(value: Any, variables: Mapping[str, str]) -> str:
    """Replace ``{variable}``, also within variables."""

    def replace_one(match: re.Match) -> str:
        if match[1] not in variables:
            raise UserError(f"{value!r} refers to {match[0]}, which is not a variable of the preset")
        return str(variables[match[1]])

    text = str(value)
    for _ in range(4):
        text = re.sub(r"\{(\w+)\}", replace_one, text)
    return text


def _read_stamps(folder: Path) -> dict[str, list[str]]:
    path = folder / STAMPS_NAME
    try:
        return read_json(path, dict[str, list[str]])
    except FileNotFoundError:
        return {}
    except MalformedError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, finished stages are then looked at again") from error


def _write_stamps(folder: Path, stamps: Mapping[str, list[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / STAMPS_NAME, (json.dumps(stamps, indent=1) + "\n").encode())


def _write_preset(experiment: Experiment) -> None:
    """Note which runs come from which preset, for report.py."""
    experiment.folder.mkdir(parents=True, exist_ok=True)
    names = ("preset", "published", "runs", "changes")
    content = {name: getattr(experiment, name) for name in names}
    write_atomically(experiment.folder / PRESET_NAME, (json.dumps(content, indent=1) + "\n").encode())


def _expected(expectation: Expectation, number: int) -> str:
    """`` (about 2 min, then 5)``: of a stage and of what follows it."""
    first, rest = (expectation.left(numbers) for numbers in ([number], range(number + 1, len(expectation.minutes))))
    if first is None:
        return ""
    then = f"; {rest:.0f} min after it" if rest is not None and rest >= 0.5 else ""
    return f" ({_minutes(60 * first)}{then})"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _describe_presets() -> str:
    lines, names = ["presets:"], preset_names()
    width = max(map(len, names)) + 2
    for name in names:
        description = load_preset(name).get("description", "").strip().splitlines()
        lines.append(f"  {name:{width}}{description[0] if description else ''}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.argv[0] = "run_experiment.sh"  # what the user called
    sys.exit(run(main))
