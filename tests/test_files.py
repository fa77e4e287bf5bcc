"""files.py: whole or not at all, for whom the umask says, and in words where a disk or a right is missing."""

import errno
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import export_vae
import train_sendvae
from errors import UserError
from files import (
    is_out_of_reach,
    read_safetensors,
    remove_leftovers,
    whole_file,
    whole_folder,
    write_json,
    write_safetensors,
    write_safetensors_file,
    write_torch,
)
from formats.vae import load_tokenizer
from runtime.checkpoint import Checkpoint, CheckpointFolder
from runtime.cli import EXIT_USER_ERROR, run
from tests.latent_caches import save_vae
from tests.photographs import write_class_folders
from tests.sendvae_runs import flags

NOBODY = 65534


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may become larger: every library then sees what it sees on a full disk, but for the number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def somebody_else(*readable: Path) -> Iterator[None]:
    """This process without root's rights, which would read anything; folders on the way are opened for it."""
    if os.geteuid() != 0:
        pytest.skip("rights are tested by root, who can give them up")
    for path in readable:
        for folder in (path, *path.parents):
            folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["/bin/umount", "-l", str(place)], check=True)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_replaces_another_whole_and_leaves_nothing_beside(tmp_path):
    for content in ("old", "new"):
        with whole_folder(tmp_path / "vae") as folder:
            (folder / "inside").mkdir()
            (folder / "inside" / "x").write_text(content)
            if content == "new":
                assert (tmp_path / "vae" / "inside" / "x").read_text() == "old"
    assert (tmp_path / "vae" / "inside" / "x").read_text() == "new"
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "vae") as folder:
        (folder / "x").write_text(str(1 / 0))
    assert (tmp_path / "vae" / "inside" / "x").read_text() == "new"
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "x.json") as file:
        file.write_text("half")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_rights_of_the_umask_whoever_writes_them(tmp_path, mask, expected):
    tokenizer, _ = load_tokenizer("f4d4-tiny", "none")
    with umask(mask):
        with whole_file(tmp_path / "a.safetensors") as temporary:
            write_safetensors_file({"a": torch.zeros(3)}, temporary)
        write_json(tmp_path / "a.json", {})
        tokenizer.save(tmp_path / "vae")  # diffusers writes its weights
        checkpoint = CheckpointFolder(tmp_path).save(5, {"m": tokenizer}, {"optimizer": {"a": torch.ones(2)}}, {})
        CheckpointFolder(tmp_path).keep_milestone(checkpoint, ["m"], {})
        assert run(export_vae.main, [str(tmp_path / "vae"), str(tmp_path / "x.safetensors"), "--format", "ldm"]) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 11
    assert {path.relative_to(tmp_path): mode(path) for path in files} == dict.fromkeys(
        (path.relative_to(tmp_path) for path in files), expected
    )


@pytest.mark.parametrize("write", [write_safetensors, write_safetensors_file, write_torch])
def test_no_space_is_an_os_error_with_a_name(tmp_path, write):
    tensors = {"a": torch.zeros(100_000)}
    with files_up_to(50_000), pytest.raises(OSError) as caught, whole_folder(tmp_path / "vae") as folder:
        write(tensors, folder / "a")
    assert caught.value.errno == errno.EFBIG
    assert str(caught.value.filename).endswith(".vae.tmp/a")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_in_a_checkpoint_is_one_line_and_the_run_goes_on_when_there_is_room(tiny_disk, tmp_path, capsys):
    data = write_class_folders(tmp_path / "images", per_class=4)
    changes = {"align_coeff": 0, "loss_cfg_path": "configs/l1_kl.yaml", "val_steps": 9}
    argv = flags(data, tiny_disk / "exps", max_train_steps=2, checkpointing_steps=1, **changes)
    assert run(train_sendvae.main, argv) == EXIT_USER_ERROR  # a checkpoint has 8 MB
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no space left on the device while writing" in error
    folder = tiny_disk / "exps" / "run"
    assert not list((folder / "checkpoints").iterdir())  # what was written of it is gone
    assert '"failed"' in (folder / "status.json").read_text()
    subprocess.run(["/bin/mount", "-o", "remount,size=64m", str(tiny_disk)], check=True)
    assert run(train_sendvae.main, argv) == 0
    assert (folder / "vae" / "config.json").is_file()


def test_a_full_disk_in_an_export_leaves_no_half_of_it(tmp_path, capsys):
    vae = save_vae(tmp_path)
    out = tmp_path / "out"
    for form, path in (("ldm", out / "x.pt"), ("diffusers", out / "x")):
        with files_up_to(1_000_000):
            assert run(export_vae.main, [str(vae), str(path), "--format", form]) == EXIT_USER_ERROR
        error = capsys.readouterr().err.strip()
        assert error.count("\n") == 0
        assert "may not become that large" in error
        assert not list(out.iterdir())


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, capsys):
    """Nor is an older one taken in its place."""
    module = torch.nn.Linear(2, 2)
    checkpoints = CheckpointFolder(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"model": module}, {"optimizer": {}}, {})
    newest = tmp_path / "checkpoints" / "0000002"
    for name in ("model.safetensors", "optimizer.pt", "manifest.json"):
        (newest / name).chmod(0o600)
        with somebody_else(tmp_path / "checkpoints"):
            with pytest.raises(PermissionError) as caught:
                checkpoints.newest_good()
            assert caught.value.filename == str(newest / name)
            read = {
                "model.safetensors": lambda: Checkpoint(newest).load_module("model", module),
                "optimizer.pt": lambda: Checkpoint(newest).load_state("optimizer"),
                "manifest.json": lambda: Checkpoint(newest).manifest(),
            }[name]
            with pytest.raises(PermissionError):
                read()
            assert run(lambda argv: checkpoints.newest_good(), []) == EXIT_USER_ERROR
        assert f"no permission for {newest / name}" in capsys.readouterr().err
        (newest / name).chmod(0o644)
    with somebody_else(tmp_path / "checkpoints"):
        assert checkpoints.newest_good().step == 2


def test_a_vae_that_may_not_be_read_says_so(tmp_path, capsys):
    vae = save_vae(tmp_path)
    for path in sorted(vae.iterdir()):
        path.chmod(0o600)
        with somebody_else(vae):
            assert run(lambda argv: load_tokenizer(str(vae)), []) == EXIT_USER_ERROR
        assert f"no permission for {path}" in capsys.readouterr().err, path
        path.chmod(0o644)


def test_a_stale_handle_says_nothing_of_the_file(tmp_path, monkeypatch, capsys):
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.save(1, {"model": torch.nn.Linear(2, 2)}, {}, {})

    def stale(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr("runtime.checkpoint.checksum", stale)
    assert run(lambda argv: checkpoints.newest_good(), []) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "Stale file handle" in error
    assert "damaged" not in error
    assert not is_out_of_reach(FileNotFoundError(errno.ENOENT, "no"))
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path / "none.safetensors")


def test_an_error_of_the_content_stays_what_it_is(tmp_path):
    """Also one that a missing file of the source caused."""
    for write in (whole_file, whole_folder):
        with pytest.raises(UserError, match="run the same command again"), write(tmp_path / "x"):
            try:
                (tmp_path / "source").read_text()
            except FileNotFoundError:
                raise UserError("run the same command again") from None


def test_the_good_copy_survives_a_kill_between_the_two_renames(tmp_path):
    """And a retry that fails too."""
    for retry in (lambda: remove_leftovers(tmp_path, "vae"), lambda: fail_inside(tmp_path / "vae")):
        (tmp_path / ".vae.old").mkdir()
        (tmp_path / ".vae.old" / "x").write_text("good")
        (tmp_path / ".vae.tmp").mkdir()
        retry()
        assert (tmp_path / "vae" / "x").read_text() == "good"
        shutil.rmtree(tmp_path / "vae")
        assert not list(tmp_path.iterdir())


def fail_inside(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_folder(folder):
        raise ZeroDivisionError


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path):
    for name in (".vae.tmp/a/b", ".vae.old/c", "status.json.0a1b2c3d.tmp", "vae/x", "other.tmp", "status.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path, "vae", "status.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.tmp", "status.json", "vae"]
    remove_leftovers(tmp_path / "absent", "vae")


def test_what_somebody_is_writing_is_no_leftover(tmp_path):
    with whole_file(tmp_path / "vae.pt") as temporary:
        (tmp_path / "vae.pt.0a1b2c3d.tmp").touch()
        remove_leftovers(tmp_path, "vae.pt")
        assert list(tmp_path.iterdir()) == [temporary]
        temporary.write_text("whole")
    assert (tmp_path / "vae.pt").read_text() == "whole"


def test_a_folder_has_one_writer_and_the_other_is_told(tmp_path, capsys):
    with whole_folder(tmp_path / "vae") as temporary:
        (temporary / "x").write_text("whole")
        with pytest.raises(OSError) as caught, whole_folder(tmp_path / "vae"):
            pass
        assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, str(tmp_path / "vae"))
        assert run(lambda argv: (_ for _ in ()).throw(caught.value), []) == EXIT_USER_ERROR
        assert "vae: it is in use: another process is writing it" in capsys.readouterr().err
        remove_leftovers(tmp_path, "vae")
    assert (tmp_path / "vae" / "x").read_text() == "whole"


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "x").write_text("good")
    rename = Path.rename

    def full(path: Path, target: Path) -> None:
        if path.name == ".vae.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError), whole_folder(tmp_path / "vae") as temporary:
        (temporary / "x").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    assert (tmp_path / "vae" / "x").read_text() == "good"


@pytest.mark.slow
def test_a_process_killed_inside_a_folder_leaves_the_old_one(tmp_path):
    """Really killed: the new one has been written in part."""
    with whole_folder(tmp_path / "vae") as folder:
        np.save(folder / "a.npy", np.arange(3))
    code = (
        "import os, signal, sys; from pathlib import Path; from files import whole_folder\n"
        "with whole_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'a.npy').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[1]
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "vae")], cwd=root)
    assert killed.returncode == -signal.SIGKILL
    assert np.array_equal(np.load(tmp_path / "vae" / "a.npy", allow_pickle=False), np.arange(3))
    assert (tmp_path / ".vae.tmp").is_dir()
    with whole_folder(tmp_path / "vae") as folder:
        np.save(folder / "a.npy", np.arange(4))
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
