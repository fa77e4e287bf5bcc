"""PatchGAN discriminators as users have them: bare, REPA-E's and Lightning's checkpoints, our own runs."""

from pathlib import Path

from errors import UserError
from formats.checkpoints import find_discriminator, what_instead
from formats.hub import hub_folder, is_hub_name
from formats.layers import State
from formats.runs import locate_discriminator
from formats.statistics import DISCRIMINATOR_SUFFIX, discriminator_beside
from models.discriminator import PatchDiscriminator
from models.weight_files import NotWeightsError, check_values, read_contents


def load_discriminator(discriminator: PatchDiscriminator, path: str | Path) -> None:
    """Load what ``--disc-pretrained-ckpt`` names.

    Raises:
        UserError: no such file, no PatchGAN in it, or another one.
    """
    given = f"--disc-pretrained-ckpt {path}"
    try:
        state = named_discriminator(path)
    except NotWeightsError as error:
        raise UserError(f"{given}: {error}") from error
    try:
        _check(state, discriminator)
    except NotWeightsError as error:
        raise UserError(f"{given} holds no weights of this PatchGAN: {error}") from error
    discriminator.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})


def named_discriminator(name: str | Path) -> State:
    """The tensors of the PatchGAN that ``--disc-pretrained-ckpt`` names: a file, folder, run or hub name.

    Raises:
        NotWeightsError: there is none.
    """
    path = hub_folder(str(name), discriminator_beside) if is_hub_name(str(name)) else Path(name)
    if not path.exists():
        raise NotWeightsError("no such file")
    state = read_discriminator(path)
    if state is None:
        raise NotWeightsError(
            f"the folder has no discriminator.safetensors, and not one *{DISCRIMINATOR_SUFFIX} file; give a run, its "
            "checkpoint or a file"
        )
    return state


def read_discriminator(path: Path, step: int | None = None) -> State | None:
    """The tensors of a PatchGAN, by names ``main.N.…``; None where a folder has none.

    Args:
        path: a file, a checkpoint of ours, or a run.
        step: of a run; None: the newest that has one.

    Raises:
        NotWeightsError: the file is not readable, or holds something else.
    """
    file = locate_discriminator(path, step)
    if file is None:
        return None
    contents = read_contents(file)
    state = find_discriminator(contents)
    if state is None:
        instead = what_instead(contents) or "no main.0.weight among its tensors"
        raise NotWeightsError(f"it holds {instead}")
    return state


def _check(state: State, discriminator: PatchDiscriminator) -> None:
    wanted = discriminator.state_dict()
    if any(name.endswith((".loc", ".initialized")) for name in state):
        raise NotWeightsError("it normalises with ActNorm; this one uses BatchNorm, as LDM and REPA-E do")
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unknown:
        raise NotWeightsError(f"{missing[0]} is missing" if missing else f"{unknown[0]} is unknown: it has more layers")
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise NotWeightsError(f"{name} is {tuple(state[name].shape)} instead of {tuple(tensor.shape)}")
    check_values(state, wanted)
