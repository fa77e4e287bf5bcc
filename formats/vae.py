"""VAEs as users have them, in whatever layout and from whichever training code, with their latent statistics.

One entry for every script: what ``--vae``, ``--vae-ckpt`` and ``--vae-latents-stats`` accept is told apart by content
(``formats.checkpoints`` lists the layouts, ``formats.statistics`` those of statistics).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from errors import UserError, one_line
from files import is_out_of_reach
from formats.architecture import (
    check_config,
    describe_difference,
    first_misfit,
    fitting_names,
    infer_config,
    infer_shape,
    named_config,
    nearly_fits,
)
from formats.checkpoints import FoundVAE, find_vae
from formats.hub import hub_folder, is_hub_name
from formats.own_kinds import KL, OwnKind, find_own_kind
from formats.run_folders import MANIFEST
from formats.runs import DIFFUSERS_WEIGHTS, locate_vae, read_checkpoint
from formats.statistics import (
    CONFIG_STATISTICS,
    REPA,
    FoundStatistics,
    config_statistics,
    find_beside,
    read_statistics,
    repa_statistics,
)
from models.tokenizers import STATISTICS_FILE, TOKENIZERS, Tokenizer, architecture_names, tokenizer_kind
from models.tokenizers.kl import KLTokenizer
from models.weight_files import NotWeightsError, check_values, read_contents
from schema import MalformedError, read_json

RANDOM = "none"  # --vae-ckpt none: from scratch
_SUFFIXES = (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin")
_WEIGHTS = tuple(f"{DIFFUSERS_WEIGHTS}{suffix}" for suffix in _SUFFIXES)


@dataclass(frozen=True)
class VAESource:
    """A VAE as it was found, before it is built.

    Attributes:
        path: its file or folder.
        given: the flag and what it was given, for messages.
        found: its tensors; statistics among them where the file has them.
        config: its diffusers configuration, read or inferred.
    """

    path: Path
    given: str
    found: FoundVAE
    config: dict


@dataclass(frozen=True)
class LoadedVAE:
    """A VAE with its weights.

    Attributes:
        tokenizer: in eval mode, float32.
        layout: what it came from, in words.
        statistics_source: where its latent statistics come from; None where it has none.
        path: its file or folder; None for random weights.
    """

    tokenizer: Tokenizer
    layout: str
    statistics_source: str | None
    path: Path | None


def load_tokenizer(
    vae: str | None, checkpoint: str | None = None, statistics: str | None = None
) -> tuple[Tokenizer, str | None]:
    """Build a VAE and load its weights and latent statistics; see :func:`load_vae`.

    Returns:
        the tokenizer in eval mode, and where its latent statistics come from: None where it has none.
    """
    loaded = load_vae(vae, checkpoint, statistics)
    return loaded.tokenizer, loaded.statistics_source


def load_vae(
    vae: str | None,
    checkpoint: str | None = None,
    statistics: str | None = None,
    *,
    step: int | None = None,
    flag: str = "--vae-ckpt",
) -> LoadedVAE:
    """Build a VAE and load its weights and latent statistics.

    Args:
        vae: an architecture's name (``architecture_names``); or a VAE in any form, whose architecture is taken, and
            whose weights too where no ``checkpoint`` is given; None: what the checkpoint says.
        checkpoint: a file, folder, run or hub name with weights; ``"none"`` for random ones.
        statistics: a file with latent statistics, or ``"repa"`` for REPA's; by default those in the checkpoint,
            next to it, or in its configuration.
        step: of the checkpoint, where that is one of our own runs.
        flag: what the user calls ``checkpoint``, for messages.

    Raises:
        UserError: no such name, file or folder, no VAE in it, or one of another architecture.
    """
    if vae is None and checkpoint == RANDOM:
        raise UserError(f"{flag} {RANDOM}: random weights need an architecture; give --vae".strip())
    named, given = find_own_kind(vae), None if checkpoint == RANDOM else find_own_kind(checkpoint)
    if given is not None and vae is not None and (named is None or named.name != given.name):
        raise UserError(f"{flag} {checkpoint} is of the kind {given.name}, not --vae {vae}: give --vae {checkpoint}")
    if named is not None and named.named and given is not None and given.config() != named.named:
        raise UserError(f"{flag} {checkpoint} is of another architecture than --vae {vae}: give --vae {checkpoint}")
    if named is not None and checkpoint not in (None, RANDOM) and not tokenizer_kind(named.name).needs_weights:
        raise UserError(f"{flag} {checkpoint}: --vae {vae} has no weights; leave {flag} out")
    if named is not None and given is None and checkpoint not in (None, RANDOM):
        raise UserError(
            f"{flag} {checkpoint} is not a folder of the kind {named.name}, which --vae {vae} means: give one"
        )
    if (named is not None or given is not None) and step is not None:
        raise UserError(f"--train-steps {step}: of an {(given or named).name} only the finished vae/ is read")
    if named is not None or given is not None:
        return _load_own_kind(given or named, checkpoint, statistics)
    wanted = None if vae is None else architecture(vae)
    if checkpoint == RANDOM:
        tokenizer = KLTokenizer(_from_config(wanted, f"--vae {vae}"))
        return LoadedVAE(tokenizer.eval(), "random", _load_statistics(tokenizer, None, statistics), None)
    if checkpoint is None and vae in architecture_names():
        raise UserError(
            f"--vae {vae} names an architecture without weights: add --vae-ckpt with a VAE's file or folder, "
            "or --vae-ckpt none to train from scratch"
        )
    source = open_vae(vae, "--vae") if checkpoint is None else open_vae(checkpoint, flag, step, wanted, vae)
    tokenizer = KLTokenizer(_load_network(source, None if checkpoint is None else vae))
    known = _load_statistics(tokenizer, source, statistics)
    return LoadedVAE(tokenizer.eval(), source.found.layout, known, source.path)


def _load_own_kind(own: OwnKind, checkpoint: str | None, statistics: str | None) -> LoadedVAE:
    """A tokenizer that is not an ``AutoencoderKL``."""
    if checkpoint == RANDOM:
        tokenizer, source, layout = own.build(), None, "random"
    else:
        (tokenizer, source), layout = own.load(), f"folder of the kind {own.name}"
    if statistics is not None:
        source = _load_statistics(tokenizer, None, statistics)
    return LoadedVAE(tokenizer, layout, source, own.folder)


def architecture(vae: str) -> dict:
    """The diffusers configuration that ``--vae`` means.

    Raises:
        UserError: it is neither a known name nor a VAE.
    """
    if vae in architecture_names():
        config = named_config(vae)
        if (kind := config.get("_class_name", KL)) != KL:
            raise UserError(
                f"--vae {vae}: configs/vae/{vae}.json says _class_name {kind}; there are {', '.join(TOKENIZERS)}"
            )
        return config
    path = Path(vae)
    if not path.exists() and not is_hub_name(vae):
        names = ", ".join(architecture_names())
        raise UserError(f"--vae {vae}: neither a known architecture ({names}) nor a VAE's file, folder or hub name")
    given = f"--vae {vae}"
    if (path / "config.json").is_file():  # weights need not be next to it
        return _read_config(path, given)
    return open_vae(vae, "--vae").config


def open_vae(
    name: str, flag: str, step: int | None = None, wanted: dict | None = None, wanted_name: str | None = None
) -> VAESource:
    """Find a VAE and read its tensors and its configuration.

    Args:
        name: a file, folder, run or hub name.
        flag: that it was given with, for messages.
        step: of a run.
        wanted: the configuration it must have, as far as tensors tell; None: whatever it has.
        wanted_name: what the user calls that.

    Raises:
        UserError: there is no VAE, or another one.
    """
    given = f"{flag} {name}".strip()
    with _reasons(given):
        path = hub_folder(name) if is_hub_name(name) else Path(name)
        if not path.exists():
            raise NotWeightsError("no such file or folder (a VAE's file, diffusers folder, run or hub name)")
        path = locate_vae(path, step)
    config = None
    if path.is_dir() and (path / MANIFEST).is_file():
        with _reasons(given):
            found, config = read_checkpoint(path)
    elif path.is_dir():
        config = _read_config(path, given)
        if wanted is not None:
            _compare(config, wanted, given, wanted_name)  # before large files are read
        found = _read_folder(path, given)
    else:
        with _reasons(given):
            found = find_vae(read_contents(path), str(path))
    if config is None:
        config = _infer(found, given, wanted, wanted_name)
    return VAESource(path, given, found, config)


def _infer(found: FoundVAE, given: str, wanted: dict | None, wanted_name: str | None) -> dict:
    """The configuration of bare tensors: what is wanted, if they can be that."""
    if wanted is None:
        with _reasons(given):
            return infer_config(found.state)
    network = _on_meta(wanted, f"--vae {wanted_name}")
    if nearly_fits(found.state, network):
        return wanted  # what is missing is named where it is loaded
    with _reasons(given):
        shape = infer_shape(found.state)
    _compare(shape, wanted, given, wanted_name)
    return wanted


def _compare(config: dict, wanted: dict, given: str, wanted_name: str | None) -> None:
    difference = describe_difference(config, wanted)
    if difference is None:
        return
    names = fitting_names(config)
    remedy = f"give --vae {names[0]}" if names else "give the architecture that these weights belong to (--vae DIR)"
    raise UserError(f"{given} is of another architecture than --vae {wanted_name}: {difference}; {remedy}")


def _load_network(source: VAESource, wanted_name: str | None) -> AutoencoderKL:
    """The network in float32, whatever precision is stored."""
    name = f"--vae {wanted_name}" if wanted_name else source.given
    misfit = first_misfit(source.found.state, _on_meta(source.config, name), source.found.is_ldm)
    if misfit:
        raise UserError(f"{source.given} ({source.found.layout}) does not fit its architecture: {misfit}")
    network = _on_meta(source.config, name)
    with _reasons(source.given):
        check_values(source.found.state, network.state_dict())
    state = {key: tensor.detach().float().clone().contiguous() for key, tensor in source.found.state.items()}
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(True)


def _load_statistics(tokenizer: Tokenizer, source: VAESource | None, file: str | None) -> str | None:
    """Load what there is, the nearest first; answers where it comes from."""
    if file is not None:
        given = f"--vae-latents-stats {file}"
        with _reasons(given):
            if file == REPA:
                found = repa_statistics()
            elif Path(file).exists():
                found = _statistics_at(Path(file))
            else:
                raise NotWeightsError("no such file")
            found.load_into(tokenizer.statistics)
        return found.source
    if source is None:
        return None
    with _reasons(source.given):
        found = source.found.statistics
        beside = find_beside(source.path)
        if found is None and beside is not None:
            try:
                found = read_statistics(beside)
            except NotWeightsError as error:
                raise NotWeightsError(f"latent statistics do not load from {beside.name} ({error})") from error
        if found is None:
            found = config_statistics(tokenizer.network.config, f"{CONFIG_STATISTICS} config.json")
        if found is None:
            return None
        try:
            found.load_into(tokenizer.statistics)
        except NotWeightsError as error:
            raise NotWeightsError(f"{Path(found.source).name}: {error}") from error
    return found.source


def _statistics_at(path: Path) -> FoundStatistics:
    """Those in a file; of a folder, a run or its checkpoint, those that its VAE would be loaded with.

    Raises:
        NotWeightsError: there are none.
    """
    if (path / STATISTICS_FILE).is_file():  # also of a latent cache, whose VAE is elsewhere
        path = path / STATISTICS_FILE
    elif path.is_dir():
        path = locate_vae(path)
    if (path / MANIFEST).is_file():
        found = read_checkpoint(path)[0].statistics
    elif (beside := find_beside(path) if path.is_dir() else None) is not None:
        found = read_statistics(beside)
    elif path.is_dir():
        found = config_statistics(_read_config(path, str(path)), f"{CONFIG_STATISTICS} {path}/config.json")
    else:
        found = _of_file(path)
    if found is None:
        raise NotWeightsError("neither a file of latent statistics nor latents_mean and latents_std are in it")
    return found


def _of_file(path: Path) -> FoundStatistics:
    """Those in a file, or next to a VAE's file."""
    try:
        return read_statistics(path)
    except NotWeightsError:
        beside = find_beside(path)
        if beside is None or beside == path:
            raise
        return read_statistics(beside)


def _read_config(folder: Path, given: str) -> dict:
    path = folder / "config.json"
    try:
        config = read_json(path)
    except (OSError, MalformedError) as error:
        if is_out_of_reach(error):
            raise
        raise UserError(f"{given}: config.json is not readable as JSON ({error})") from error
    if config.get("_class_name") != "AutoencoderKL":
        raise UserError(f"{given}: config.json describes {config.get('_class_name')}, not an AutoencoderKL")
    with _reasons(f"{given}: config.json"):
        check_config(config)
    return config


def _read_folder(folder: Path, given: str) -> FoundVAE:
    """The weights of a diffusers folder."""
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{given}: weights do not load (there is no {_WEIGHTS[0]} in the folder)")
    try:
        found = find_vae(read_contents(file), str(file))
    except NotWeightsError as error:
        raise UserError(f"{given}: weights do not load ({file.name}: {error})") from error
    return FoundVAE(found.state, "diffusers folder", found.is_ldm)


def _from_config(config: dict, given: str) -> AutoencoderKL:
    try:
        return AutoencoderKL.from_config(config)
    except Exception as error:  # what diffusers makes of values that it does not look at
        raise UserError(f"{given}: its configuration does not build ({one_line(error)})") from error


def _on_meta(config: dict, given: str) -> AutoencoderKL:
    with torch.device("meta"):
        return _from_config(config, given)


@contextmanager
def _reasons(given: str) -> Iterator[None]:
    """Say of which flag a reason is."""
    try:
        yield
    except NotWeightsError as error:
        raise UserError(f"{given}: {error}") from error
