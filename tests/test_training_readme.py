"""Every command of every fenced block of training/README.md, run as it stands in little time.

Budgets are shrunk by what `SETTINGS` and `OPTIONS` append. Commands of `torchrun` run in one
process, and Wan's files are the miniature's under Wan's names.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

import training.world.__main__ as world
import training.world.follow as follow
from rf_core.__main__ import main as rf_core
from rf_core.options import DEMO
from rf_core.video import VideoFormat, VideoWriter, count_images
from training.__main__ import main as training
from training.world.evaluate import EvaluateConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
README = ROOT / "training" / "README.md"
PROGRAMS: Mapping[str, Callable[[list[str]], int]] = {
    "training": training,
    "training.world": world.main,
    "rf_core": rf_core,
}
SMALL = ["updates=2", "batch=2", "micro_batch=2", "checkpoint_every=2", "tensorboard=false"]
SMALL += ["validation_prompts=1"]
SETTINGS = {
    "teacher": [*SMALL, "opening_batch=2", "validation_steps=2"],
    "ode_pairs": ["clips=4", "shard=2", "batch=2", "steps=2"],
    "ode_init": [*SMALL, "validation_chunks=1"],
    "consistency": [*SMALL, "validation_chunks=1"],
    "control": [*SMALL, "validation_steps=2"],
    "re_dmd": [
        "run.updates=2",
        "run.critic_ratio=1",
        "run.redmd.batch=2",
        "run.micro_batch=2",
        "run.latents=[16, 6, 8, 8]",
        "data.limit=3",
        "output.validation_chunks=1",
        "output.validation_prompts=1",
        "output.tensorboard=false",
    ],
}
"""What shrinks each recipe."""
WAN_SETTINGS = {
    "ode_pairs": ["latents=[16, 9, 8, 8]", "placement.dtype=float32"],
    "ode_init": ["placement.dtype=float32"],
    "latents": ["size=[64, 64]", "frames=3", "dtype=float32"],
    "control": ["placement.dtype=float32", "layers=[0, 2, 4]"],
    "re_dmd": ["placement.dtype=float32", "reward.kind=none"],
    "estimate": [],
}
"""What Wan's take besides, as VideoAlign has no miniature."""
OPTIONS = {
    "generate": ["--seconds", "0.5", "--device", "cpu"],
    "evaluate": ["--seeds", "1", "--seconds", "1", "--window-images", "8", "--device", "cpu"],
    "clips": ["--count", "16"],
    "release": ["--demo", "demo"],
    "follow": ["--count", "1"],
    "claims": ["--size", "tiny", "--arm", "EMA 0.999"],
}
COPIED = {
    ("training.world", "vae"): "vae.safetensors",
    ("training.world", "text"): "text_encoder.safetensors",
}
"""Files of the demo in place of what makes them, as the README says."""
WAN_FILES = {
    "models/wan2.1_t2v_1.3B.safetensors": "teacher.safetensors",
    "models/self_forcing_dmd.safetensors": "student.safetensors",
    "models/mine.safetensors": "student.safetensors",
    "models/Wan2.1_VAE.pth": "vae.safetensors",
    "models/umt5-xxl": "text_encoder.safetensors",
}


@dataclass
class Block:
    """A fenced block: its section, its text, and the variables it has set."""

    section: str
    text: str
    variables: dict[str, str] = field(default_factory=dict)

    def commands(self) -> list[list[str]]:
        """The words of its commands, as a shell gives them; continued lines are one."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        return [words for words in map(self._words, lines) if words]

    def _words(self, line: str) -> list[str]:
        words: list[str] = []
        for word in shlex.split(line, comments=True):
            name, equals, value = word.partition("=")
            if not words and equals and name.isidentifier():
                self.variables[name] = self._expanded(value)
                return []
            whole = word.removeprefix("$")
            if word.startswith("$") and whole in self.variables:  # split, its quotes kept
                words += self.variables[whole].split()
            else:
                words.append(self._expanded(word))
        return words

    def _expanded(self, word: str) -> str:
        return re.sub(r"\$(\w+)", lambda found: self.variables.get(found[1], found[0]), word)


def blocks() -> list[Block]:
    text = README.read_text("utf-8")
    fences = re.finditer(r"^```\n(.*?)^```", text, re.M | re.S)
    return [
        Block(re.findall(r"^##? ([A-Z].*)", text[: each.start()], re.M)[-1], each[1])
        for each in fences
    ]


def program_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The module and its arguments; None for `pip`, and for what only a shell can do."""
    if "-m" not in words:
        return None
    at = words.index("-m")
    return words[at + 1], words[at + 2 :]


def shrunk(module: str, arguments: list[str]) -> list[str]:
    command = arguments[0]
    settings = SETTINGS.get(command, []) if module == "training" else []
    if "wan" in arguments:
        settings = settings + WAN_SETTINGS.get(command, [])
    options = OPTIONS.get(command, []) if "--study-results" not in arguments else []
    if module == "training.world" and command == "evaluate":
        options = ["--euler-steps", "2"]
    found = [part for each in settings for part in ("--set", each)]
    return [name for word in arguments for name in globbed(word)] + options + found


def globbed(word: str) -> list[str]:
    return sorted(map(str, Path().glob(word))) if word.endswith("*.csv") else [word]


def answer(key: Path, path: Path) -> None:
    """A rater's CSV, who prefers what is on the left."""
    study = json.loads(key.read_text())
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["study", "rater", "pair", "question", "answer"])
        rows.writerows([study["study"], "r1", pair, "dynamics", "left"] for pair in study["pairs"])


def prepare(folder: Path) -> None:
    """What somebody with the README in hand has, and no command of a section makes."""
    for name in ("models", "runs/world"):
        (folder / name).mkdir(parents=True)
    (folder / "tests").symlink_to(ROOT / "tests")
    for name, own in WAN_FILES.items():
        shutil.copy(DEMO / own, folder / name)
    for name in ("ours", "theirs"):
        shutil.copy(DEMO / "student.safetensors", folder / f"{name}.safetensors")
    prompts = ["a red circle moves left", "a blue square moves up"]
    (folder / "prompts.csv").write_text("\n".join(["prompt", *prompts]))
    (folder / "prompts.txt").write_text(prompts[0])
    (folder / "pictures").mkdir()
    for number, prompt in enumerate(prompts):
        Image.new("RGB", (80, 64), (200, 40 * number, 0)).save(folder / f"pictures/{number}.png")
        (folder / f"pictures/{number}.txt").write_text(prompt)
    for name in ("videos", "depth"):
        (folder / name).mkdir()
        form = VideoFormat(width=64, height=64, fps=16)
        with VideoWriter(folder / name / "0.mp4", form, {}) as writer:
            writer.write(torch.zeros(18, 64, 64, 3, dtype=torch.uint8))
    (folder / "videos/0.txt").write_text(prompts[0])


def as_above(arguments: list[str], earlier: list[list[str]]) -> list[str]:
    """With `...` replaced by what the last command of its kind says, and this one does not."""
    if arguments[-1] != "...":
        return arguments
    above = next(each[2:] for each in reversed(earlier) if each[1] == arguments[0])
    return arguments[:-1] + [
        part
        for flag, setting in pairwise(above)
        if flag == "--set" and setting not in arguments
        for part in (flag, setting)
    ]


def run_block(block: Block, earlier: list[list[str]]) -> None:
    """Run a block's commands, and add them to those that ran before."""
    for words in block.commands():
        found = program_of(words)
        if found is None:
            continue
        module, arguments = found
        if (module, arguments[0]) in COPIED:
            shutil.copy(DEMO / COPIED[module, arguments[0]], "runs/world")
            continue
        arguments = as_above(arguments, earlier)
        if "--study-results" in arguments:
            answer(Path("runs/eval/study.key.json"), Path("answers1.csv"))
        code = PROGRAMS[module](shrunk(module, arguments))
        assert code == 0, f"{' '.join(words)} left with {code}"
        earlier.append([module, *arguments])


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """Runs everything in order, a folder a section: the folders', and the commands."""
    root, commands = tmp_path_factory.mktemp("readme"), []
    counts = dict.fromkeys(("single", "double", "drift_videos", "switches", "batch"), 1)
    lengths = {"frames": 3, "chunks": 2, "drift_chunks": 4, "drift_window": 8}
    small = EvaluateConfig(**counts, **lengths, switch_after=1, switch_chunks=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "EvaluateConfig", lambda: small)
        patch.setattr(follow, "rows", lambda: [follow.Row(name="controlled")])
        for block in blocks():
            folder = root / block.section
            if not folder.exists():
                prepare(folder)
            patch.chdir(folder)
            run_block(block, commands)
    return root, commands


def test_every_command_runs(ran):
    _, commands = ran
    said = {(module, command) for module, command, *_ in commands}
    recipes = ("verify", "teacher", "ode_pairs", "ode_init", "re_dmd", "export", "evaluate")
    recipes += ("latents", "contexts", "control", "claims")
    assert {("training", name) for name in recipes} < said
    assert {("training.world", name) for name in ("clips", "evaluate", "release")} < said
    assert ("rf_core", "generate") in said and ("training", "estimate") in said


def test_the_first_example_ends_in_a_video(ran):
    root, _ = ran
    assert count_images(root / "Training students" / "first.mp4", 10) > 0


def test_the_study_is_written_into_the_folder_of_results(ran):
    root, _ = ran
    assert (root / "Measuring and comparing" / "runs/eval/study.html").stat().st_size > 1000


def test_a_teacher_without_its_inputs_says_which_commands_make_them(ran, tmp_path, capsys):
    root, _ = ran
    clips = root / "The miniature, from nothing to the demo" / "runs/world/clips"
    text = "data.text_encoder=runs/world/text_encoder.safetensors"
    command = ["teacher", "--out", str(tmp_path / "teacher"), "--set", text]

    def said(*more: str) -> str:
        assert training([*command, *more]) == 1
        *_, last = capsys.readouterr().err.strip().splitlines()
        return last

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for part in ("training.world clips", "training.world vae", "`text`"):
            assert part in said()
        assert "`python -m training.world text`" in said("--set", f"source={clips}")
