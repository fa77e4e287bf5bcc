"""run_experiment.sh: presets, overrides, stages that are skipped, stop and resume; and quickstart.sh's own flags."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import cache_latents
import evaluate
import generate
import preprocessing
import probe
import report
import train_ldm
import train_repae
import train_sendvae
from dataset import toy
from errors import UserError
from runtime import experiment
from runtime.cli import run
from runtime.experiment import load_preset, preset_names, resolve, resolve_all

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "preprocessing.py": preprocessing,
    "train_sendvae.py": train_sendvae,
    "cache_latents.py": cache_latents,
    "train_ldm.py": train_ldm,
    "train_repae.py": train_repae,
    "generate.py": generate,
    "evaluate.py": evaluate,
    "probe.py": probe,
    "report.py": report,
    "dataset.toy": toy,
}


def commands(name: str, *overrides: str) -> dict[str, list[str]]:
    found = resolve(name, load_preset(name), "exps", overrides)
    return {stage.name: stage.command for stage in found.stages}


def value(command: list[str], flag: str) -> str:
    return command[command.index(f"--{flag}") + 1]


@pytest.fixture
def presets(tmp_path, monkeypatch):
    """A folder of presets of our own."""
    folder = tmp_path / "presets"
    folder.mkdir()
    monkeypatch.setattr(experiment, "PRESETS", folder)

    def write(name: str, **content) -> None:
        path = folder / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content, sort_keys=False))

    return write


def writing_stage(path: Path, code: str = "") -> dict:
    """A stage that appends a line to a file."""
    script = path.with_suffix(".py")
    script.write_text(f"open({str(path)!r}, 'a').write('once\\n')\n{code}\n")
    return {"script": str(script), "single_process": True, "product": str(path)}


@pytest.mark.parametrize("name", preset_names())
def test_every_flag_of_every_preset_is_one_of_its_script(name, capsys):
    """And every dry run's: nothing in a preset may be misspelt."""
    preset = load_preset(name)
    wanted = ("images", "val_images", "vae", "reference", "celeba", "deepfashion", "awa")
    given = [word for key in wanted if preset.get("variables", {}).get(key) in ("?", "") for word in (f"--{key}", "x")]
    experiments, _ = resolve_all(name, "exps", given)
    for stage in [stage for found in experiments for stage in found.stages]:
        script = next(word for word in stage.command if word in SCRIPTS)
        commands = [stage.command[stage.command.index(script) + 1]] if script == "evaluate.py" else []
        with pytest.raises(SystemExit):
            SCRIPTS[script].main([*commands, "--help"])
        known = capsys.readouterr().out
        for command in (stage.command, stage.dry_command or []):
            for word in command[command.index(script) + 1 :] if command else []:
                assert not word.startswith("--") or re.search(rf"{word}[ ,\n]", known), (stage.name, word)


@pytest.mark.parametrize("name", [name for name in preset_names() if "stages" in load_preset(name)])
def test_images_with_and_without_guidance_are_made_alike(name):
    """All samples of a preset differ in guidance alone, or their figures could not stand side by side."""
    variables = load_preset(name).get("variables", {})
    given = [word for key, value in variables.items() if value in ("?", "") for word in (f"--{key}", "x")]
    guidance = {"cfg_scale", "guidance_low", "guidance_high", "guidance_channels", "points"}
    guidance |= {"guide", "guide_scale", "guide_low", "guide_high"}
    made = []
    for command in commands(name, *given).values():
        if "generate.py" in command:
            flags = vars(generate.parse_arguments(command[command.index("generate.py") + 1 :]))
            others = guidance | {"sample_dir", "weights", "preview", "preview_beside"}
            made.append({key: flags[key] for key in flags.keys() - others})
    for flags in made:
        assert flags == made[0]


def test_the_paper_s_default_is_what_method_says():
    found = commands("sendvae_imagenet256")
    assert list(found) == ["preprocess", "sendvae", "cache", "ldm", "samples"]
    assert value(commands("table7/sendvae")["reconstruction"], "vae") == value(
        commands("table6/vavae-256-align", "--val-images", "photographs")["reconstruction"], "vae"
    )
    assert value(found["sendvae"], "batch-size") == "1024"
    assert value(found["sendvae"], "vae") == "f16d32"
    assert value(found["ldm"], "model") == "SiT-XL/1"
    assert value(found["cache"], "vae") == "exps/sendvae_imagenet256-vae/vae"
    assert value(found["samples"], "exp-path") == "exps/sendvae_imagenet256-ldm"
    assert value(found["samples"], "guidance-high") == "0.75"


def test_a_preset_changes_only_what_it_names():
    base, sdvae = commands("sendvae_imagenet256"), commands("sendvae_sdvae")
    assert (value(sdvae["sendvae"], "vae"), value(sdvae["ldm"], "model")) == ("f8d4", "SiT-XL/2")
    assert value(sdvae["sendvae"], "epochs") == value(base["sendvae"], "epochs")


def test_public_vaes_without_a_discriminator_get_one_later():
    sd35, flux = commands("sendvae_sd35vae"), commands("sendvae_fluxvae")
    assert sd35.keys() == flux.keys() == commands("sendvae_imagenet256").keys()
    assert "--disc-pretrained-ckpt" not in flux["sendvae"]
    assert value(flux["sendvae"], "loss-override") == "discriminator_start=5000"
    assert (value(flux["sendvae"], "vae"), value(flux["ldm"], "model")) == ("f8d16", "SiT-XL/2")
    assert value(flux["sendvae"], "vae-ckpt") == "black-forest-labs/FLUX.1-dev:vae"


@pytest.mark.parametrize(
    ("name", "kind", "model", "align"),
    [
        ("frozen_qwenimage", "AutoencoderKLQwenImage", "SiT-XL/2", True),
        ("frozen_flux2", "AutoencoderKLFlux2", "SiT-XL/1", True),
        ("frozen_rae", "AutoencoderRAE", "LightningDiT-XL/1", False),
        ("rae_imagenet256", "AutoencoderRAE", "DiTDH-XL/1", False),
    ],
)
def test_frozen_public_tokenizers(name, kind, model, align):
    """The tokenizer by its name on the hub; in a dry run by its class, with random weights."""
    (found,), _ = resolve_all(name, "exps", [])
    stages = {stage.name: stage for stage in found.stages}
    assert list(stages) == ["preprocess", "cache", "ldm", "samples"]
    assert "/" in value(stages["cache"].command, "vae")
    assert {value(stages[stage].dry_command, "vae") for stage in ("cache", "ldm", "samples")} == {kind}
    ldm = stages["ldm"].command
    assert (value(ldm, "model"), value(ldm, "time-shift"), "--enc-type" in ldm) == (model, "auto", align)


def test_a_wide_heads_recipes():
    """One cache and one guide for RAE's rows; a rate that is held for 40 epochs of 1,251 steps."""
    guide, long = commands("rae/guide"), commands("rae/ditdh-xl-800")
    assert list(guide) == ["preprocess", "cache", "ldm"]
    assert (value(guide["ldm"], "model"), value(guide["ldm"], "epochs")) == ("DiTDH-S/1", "14")
    assert value(long["samples"], "guide") == "exps/" + value(guide["ldm"], "exp-name")
    assert value(long["cache"], "vae-latents-name") == value(guide["cache"], "vae-latents-name")
    assert "--cfg-scale" not in long["samples-unguided"]
    ddt = commands("ddt_imagenet256", "--tokenizer", "exps/sendvae/vae")
    assert value(ddt["cache"], "vae") == "exps/sendvae/vae"
    steps = [int(value(ddt["ldm"], f"lr-{name}")) for name in ("hold-steps", "decay-until")]
    assert steps == [40 * 1251, 800 * 1251]
    assert "--qk-norm" in ddt["ldm"] and "--qk-norm" not in long["ldm"]
    assert "--hflip" in long["ldm"] and "--hflip" not in ddt["ldm"]  # diffusion-bench's ImageNet is not mirrored
    short = commands("rae/ditdh-xl-80")
    assert value(short["cache"], "vae-latents-name") == value(long["cache"], "vae-latents-name")
    assert {value(found["samples"], "label-sampling") for found in (ddt, long)} == {"equal"}


def test_stages_of_held_out_data_come_with_their_variable():
    assert "--val-data-dir" not in commands("sendvae_imagenet256")["ldm"]
    found = commands("sendvae_imagenet256", "--val-images", "photographs")
    assert value(found["preprocess-val"], "imagenet-path") == "photographs"
    assert value(found["ldm"], "val-data-dir") == "data/imagenet256-val"


def test_overrides_reach_flags_and_variables():
    found = commands(
        "sendvae_imagenet256", "--ldm.batch-size", "64", "--data=elsewhere", "--ldm.compile",
        "--sendvae.loss-override", "a=1", "b=2",
    )  # fmt: skip
    assert value(found["ldm"], "batch-size") == "64"
    assert "--compile" in found["ldm"]
    assert value(commands("quickstart", "--data", "a{b")["toy"], "output") == "a{b/toy"
    assert value(found["preprocess"], "output-path") == "elsewhere"
    assert "--enc-type" not in commands("quickstart", "--sendvae.enc-type", "null")["sendvae"]
    assert "--no-noise-injection" not in commands("quickstart", "--sendvae.no-noise-injection", "false")["sendvae"]
    for given in (["true"], []):  # as in a preset, or as a script takes it
        command = commands("quickstart", "--samples.heun", *given, "--samples.mode", "ode")["samples"]
        assert command[command.index("--heun") :] == ["--heun", "--mode", "ode"]
    start = found["sendvae"].index("--loss-override")
    assert found["sendvae"][start + 1 : start + 3] == ["a=1", "b=2"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["nothing"], ("no preset nothing", "quickstart")),
        (["quickstart", "--ldn.epochs", "1"], ("--ldn.epochs", "no stage ldn", "sendvae")),
        (["quickstart", "--epochs", "1"], ("--epochs is not known", "--data")),
        (["quickstart_photographs"], ("--images is needed",)),
        (["quickstart", "stray"], ("'stray' belongs to no flag",)),
        (["quickstart", "--stages", "ldn"], ("--stages ldn", "samples")),
        (["quickstart", "--data", "a{0}"], ("a{0}", "not a variable")),
        (["table8/vavae"], ("table8/vavae has nothing to do", "--celeba, --deepfashion, --awa")),
        ([], ("PRESET",)),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(argv, parts, capsys):
    try:
        code = run(experiment.main, argv)
    except SystemExit as exit_:
        code = exit_.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1
    assert all(part in lines[0] for part in parts)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"stages": {"a": {"script": "x.py", "product": "x", "flag": {}}}}, "flag is not known"),
        ({"stages": {}, "stage": {}}, "stage is not known"),
        ({"stages": {"a": {"script": "x.py", "product": "{nowhere}"}}}, "{nowhere}"),
    ],
)
def test_a_misspelt_preset_is_named(presets, content, part):
    presets("mine", **content)
    with pytest.raises(UserError, match=part):
        resolve("mine", load_preset("mine"), "exps", [])


def test_what_another_preset_makes_is_looked_for_first(presets, tmp_path, capsys):
    """Not after the hours of the stages before; not for a stage that is done, nor if something else is given."""
    first, second, guide = tmp_path / "first", tmp_path / "second", tmp_path / "exps" / "guide"
    script = writing_stage(second) | {"script": f"{second.with_suffix('.py')} {{guide}}"}
    presets(
        "mine",
        variables={"guide": "{exps}/guide"},
        needs={"{exps}/guide": "run the preset other first"},
        stages={"first": writing_stage(first), "second": script},
    )
    argv = ["mine", "--output-dir", str(tmp_path / "exps")]
    assert run(experiment.main, argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"mine needs {guide}, which is not there: run the preset other first")
    assert not first.exists()
    assert run(experiment.main, [*argv, "--stages", "first"]) == 0
    guide.mkdir(parents=True)
    assert run(experiment.main, argv) == 0
    guide.rmdir()
    assert run(experiment.main, argv) == 0
    assert run(experiment.main, [*argv, "--guide", str(tmp_path)]) == 0


def test_finished_stages_are_skipped_and_changed_ones_run_again(presets, tmp_path, capfd):
    first, second = tmp_path / "first", tmp_path / "second"
    stages = {"first": writing_stage(first), "second": writing_stage(second, "import sys; sys.exit(3)")}
    presets("mine", stages=stages, closing="look at {exps}")
    argv = ["mine", "--output-dir", str(tmp_path / "exps")]
    assert experiment.main(argv) == 3
    assert "second: stopped with exit code 3" in capfd.readouterr().err
    stages["second"] = writing_stage(second)
    presets("mine", stages=stages, closing="look at {exps}")
    assert experiment.main(argv) == 0
    out = capfd.readouterr().out
    assert "first: finished already" in out
    assert f"look at {tmp_path / 'exps'}" in out
    assert (first.read_text(), second.read_text()) == ("once\n", "once\nonce\n")
    assert experiment.main([*argv, "--first.x", "1"]) == 0
    assert (first.read_text(), second.read_text()) == ("once\nonce\n", "once\nonce\nonce\n")
    second.unlink()
    assert experiment.main([*argv, "--first.x", "1"]) == 0
    assert (first.read_text(), second.read_text()) == ("once\nonce\n", "once\n")


def test_what_was_made_from_an_earlier_result_is_made_again(presets, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    presets("mine", stages={"first": writing_stage(first), "second": writing_stage(second)})
    argv = ["mine", "--output-dir", str(tmp_path / "exps")]
    assert experiment.main(argv) == 0
    assert experiment.main([*argv, "--first.steps", "2"]) == 0
    assert second.read_text() == "once\nonce\n"


def test_a_study_runs_presets_once_for_each_seed(presets, tmp_path, capfd):
    for name in ("base", "group/one", "group/two"):
        made = str(tmp_path / "{name}.{size}")
        script = tmp_path / "touch.py"
        script.write_text("import sys\nopen(sys.argv[2], 'a').write(' '.join(sys.argv[3:]))\n")
        stage = {"script": str(script), "single_process": True, "product": made, "flags": {"to": made}}
        presets(name, stages={name[-3:]: stage}, variables={"size": 3, "seed": 0})
    members = [{"preset": "base"}, {"preset": ["group/one", "group/two"], "each": {"seed": "{seeds}"}}]
    presets("study", variables={"seeds": "0,1", "size": 5}, experiments=members, closing="{seeds} are done")
    argv = ["study", "--output-dir", str(tmp_path / "exps"), "--seeds", "4, 7", "--two.lr", "1"]
    assert experiment.main(argv) == 0
    made = {path.name: path.read_text() for path in tmp_path.glob("*.5")}
    names = ("base", "group-one-seed4", "group-one-seed7", "group-two-seed4", "group-two-seed7")
    assert made == {f"{name}.5": "--lr 1" if "two" in name else "" for name in names}
    assert "4, 7 are done" in capfd.readouterr().out
    assert experiment.main(argv) == 0
    assert capfd.readouterr().out.count("finished already") == 5
    for wrong, part in ((["--sead", "1"], "--sead is not known"), (["--three.lr", "1"], "has a stage three")):
        with pytest.raises(UserError, match=part):
            experiment.main(["study", *wrong])


def test_a_seed_given_to_one_preset_names_its_runs_as_a_study_does(presets, tmp_path):
    stage = writing_stage(tmp_path / "made") | {"flags": {"exp-name": "{name}-vae", "seed": "{seed}"}}
    spec = {"stages": {"train": stage}, "variables": {"seed": 0}}
    presets("group/one", **spec)
    for given, name in (
        ([], "group-one"),
        (["--seed", "0"], "group-one-seed0"),
        (["--seed", "2"], "group-one-seed2"),
        (["--seed", "2", "--name", "mine"], "mine"),
    ):
        resolved = experiment.resolve("group/one", experiment.load_preset("group/one"), str(tmp_path / "exps"), given)
        assert resolved.name == name and resolved.runs == (f"{name}-vae",)


def test_a_dry_run_of_many_builds_equal_stages_once(presets, tmp_path, capfd):
    stage = writing_stage(tmp_path / "built") | {"flags": {"exp-name": "{name}", "depth": 1}}
    presets("table/one", stages={"a": stage}, variables={"images": "?"})
    presets("table/two", stages={"a": stage, "b": stage | {"flags": {"depth": 2}}})
    assert experiment.main(["table*", "--dry-run"]) == 0
    assert (tmp_path / "built").read_text() == "once\n" * 2
    assert "2 presets, 2 different stages built, 0 failed" in capfd.readouterr().out
    presets("table/two", stages={"a": writing_stage(tmp_path / "b", "raise SystemExit(2)")})
    assert experiment.main(["table*", "--dry-run"]) == 1
    assert "1 failed: table-two" in capfd.readouterr().out
    for wrong, part in ((["table*"], "for --dry-run only"), (["tible*", "--dry-run"], "matched by no preset")):
        with pytest.raises(UserError, match=part):
            experiment.main(wrong)


def test_a_stopped_dry_run_of_many_goes_no_further(presets, tmp_path, capfd):
    stop = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    presets("table/one", stages={"a": writing_stage(tmp_path / "a", stop)})
    presets("table/two", stages={"b": writing_stage(tmp_path / "b")})
    assert experiment.main(["table*", "--dry-run"]) == 143
    assert not (tmp_path / "b").exists()


def test_an_experiment_notes_its_runs_and_what_it_reproduces(presets, tmp_path):
    stage = writing_stage(tmp_path / "made")
    names = ("mine-vae", "shared", "mine", "mine-ldm")
    stages = {f"s{i}": stage | {"flags": {"exp-name": name}} for i, name in enumerate(names)}
    presets("mine", stages=stages, published="table2/depth1")
    argv = ["mine", "--output-dir", str(tmp_path / "exps")]
    for few in ([], ["--stages", "s0"]):
        assert experiment.main([*argv, *few]) == 0
        noted = json.loads((tmp_path / "exps" / "mine" / "preset.json").read_text())
        runs = ["mine-vae", "mine", "mine-ldm"]
        assert noted == {"preset": "mine", "published": "table2/depth1", "runs": runs, "changes": []}


def test_an_experiment_notes_what_makes_it_another_one(presets):
    """Places, names and seeds do not, nor a flag that is given as it is."""
    stage = {
        "script": "x.py",
        "product": "x",
        "flags": {"epochs": 80, "seed": 0, "loss": ["a=1", "b=2"], "hflip": None},
    }
    variables = {"images": "?", "data": "d", "seed": 0, "sit": "XL", "vae": "?"}
    presets("mine", stages={"ldm": stage}, variables=variables)
    same = ["--images", "i", "--data", "e", "--seed", "3", "--name", "n", "--vae", "v", "--sit", "XL"]
    same += ["--ldm.epochs", "80", "--ldm.seed", "5", "--ldm.loss", "a=1", "b=2"]
    assert resolve("mine", load_preset("mine"), "exps", same).changes == ()
    other = [*same, "--sit=B", "--ldm.epochs", "10", "--ldm.hflip", "--ldm.loss", "a=1"]
    changes = ("--ldm.epochs 10", "--ldm.hflip", "--ldm.loss a=1", "--sit B")
    assert resolve("mine", load_preset("mine"), "exps", other).changes == changes


def test_words_after_a_script_s_name_take_variables(presets):
    presets("mine", stages={"a": {"script": "x.py {exps}/{name}", "product": "x"}}, variables={"name": "a b"})
    assert resolve("mine", load_preset("mine"), "exps", []).stages[0].command[-2:] == ["x.py", "exps/a b"]


def test_a_condition_on_two_variables_needs_both(presets):
    stage = {"script": "x.py", "product": "x", "if": ["a", "b"]}
    presets("mine", stages={"both": stage}, variables={"a": "", "b": "1"})
    assert resolve("mine", load_preset("mine"), "exps", []).stages == []
    assert len(resolve("mine", load_preset("mine"), "exps", ["--a", "1"]).stages) == 1


def test_a_stage_without_its_product_is_an_error(presets, tmp_path):
    presets("mine", stages={"a": writing_stage(tmp_path / "a") | {"product": str(tmp_path / "b")}})
    with pytest.raises(UserError, match="left no"):
        experiment.main(["mine", "--output-dir", str(tmp_path / "exps")])


def test_a_signal_reaches_the_stage_and_ends_the_experiment(tmp_path):
    mark = tmp_path / "started"
    script = tmp_path / "wait.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *a: sys.exit(143))\n"
        f"pathlib.Path({str(mark)!r}).touch()\ntime.sleep(60)\n"
    )
    code = f"import sys; from runtime.stage_process import call; sys.exit(call([sys.executable, {str(script)!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not mark.exists():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=20) == 143


@pytest.mark.parametrize("argv", [["--data", "/no/such/folder"], ["--data"]])
def test_quickstart_names_a_missing_folder(argv):
    answer = subprocess.run(["./quickstart.sh", *argv], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 2
    assert len(answer.stderr.strip().splitlines()) == 1
    assert "--data" in answer.stderr


@pytest.mark.slow
def test_the_quickstart_s_stages_run_from_images_to_samples(tmp_path):
    """All of them, with a few steps each, in real processes; a second call does nothing."""
    few = ["--toy.num-images", "96", "--toy-val.num-images", "16", "--sendvae.max-train-steps", "4"]
    few += ["--sendvae.warmup-steps", "0", "--ldm.warmup-steps", "0", "--ldm.max-train-steps", "2"]
    few += ["--samples.num-fid-samples", "6", "--samples.num-steps", "2", "--ldm.grid-steps", "2"]
    command = ["./run_experiment.sh", "quickstart", "--brief", "--output-dir", str(tmp_path / "exps")]
    command += ["--data", str(tmp_path / "data"), *few]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]
    generated = tmp_path / "exps" / "quickstart-ldm" / "generated"
    assert (generated / "samples.npz").is_file()
    assert (generated / "preview.png").is_file()
    assert "quickstart-ldm" in (tmp_path / "exps" / "quickstart" / "report.html").read_text()
    args = json.loads((tmp_path / "exps" / "quickstart-ldm" / "args.json").read_text())["args"]
    assert args["repa_source"] == "features"
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.stdout.count("finished already") == 12
