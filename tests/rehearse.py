"""The official weights' rehearsal: `make rehearse`, before a release.

Files of the official names, layouts, sizes and types, their values random, go through the real
command line at 64x64 for two chunks. What is shown is that such files are read, converted and
streamed, in what time and memory: not what they would make. UMT5-XXL is not among them, as it
weighs 11 GB: one layer of its width that reads bytes stands in for it.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from rf_core.config import WAN_1_3B
from rf_core.decoders.taehv import TAEHV, TAEHVConfig
from rf_core.decoders.vae import VAEConfig, WanVAE
from rf_core.model import WanModel
from rf_core.text import BYTE_VOCAB_SIZE, UMT5Encoder, byte_ids, save_text_encoder
from rf_core.video import read_images

STUDENT, VAE, TAEHV_FILE = "rewardforcing.pt", "Wan2.1_VAE.pth", "taew2_1.pth"
CONVERTED, TEXT = "rf.safetensors", "text_encoder_stand_in.safetensors"
SIZE = ("--width", "64", "--height", "64", "--chunks", "2")
NUM_IMAGES = 21  # of two chunks of 3 latent frames, the first of which is one image


def write_files(folder: Path) -> None:
    """As published: the student in bfloat16 under `model.`, TAEHV in float16, VAE in float32."""
    torch.manual_seed(0)
    student = WanModel(WAN_1_3B, dtype=torch.bfloat16)
    student.initialise()
    nn.init.normal_(student.head.head.weight, std=0.02)
    torch.save({f"model.{key}": value for key, value in weights(student).items()}, folder / STUDENT)
    torch.save(weights(WanVAE(VAEConfig())), folder / VAE)
    torch.save(weights(TAEHV(TAEHVConfig(), dtype=torch.float16)), folder / TAEHV_FILE)
    write_text_encoder(folder / TEXT)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in module.state_dict().items()}


def write_text_encoder(path: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=BYTE_VOCAB_SIZE,
        d_model=WAN_1_3B.text_dim,
        num_layers=1,
        num_heads=1,
        d_ff=64,
    )
    encoder = UMT5Encoder(UMT5EncoderModel(config), byte_ids, text_len=WAN_1_3B.text_len)
    save_text_encoder(path, encoder)


def run(folder: Path, *arguments: str) -> str:
    """What a command printed; ends this process where it fails."""
    print(f"\n$ python -m rf_core {' '.join(arguments)}", flush=True)
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as printed:
        command = [sys.executable, "-m", "rf_core", *arguments]
        root = {"PYTHONPATH": str(Path(__file__).parents[1])}
        child = subprocess.Popen(
            command, cwd=folder, env=os.environ | root, stdout=printed, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        text = printed.read()
    print(text.rstrip())
    seconds, gigabytes = time.monotonic() - begun, used.ru_maxrss / 1e6  # it is in kB
    print(f"-> {seconds:.1f} s, at most {gigabytes:.2f} GB", flush=True)
    if child.returncode:
        sys.exit(f"the command ended with {child.returncode}")
    return text


def generate(folder: Path, model: str, vae: str, output: str) -> None:
    files = "--model", model, "--vae", vae, "--text-encoder", TEXT
    run(folder, "generate", *files, "--prompt", "a panda walks", *SIZE, "--output", output)
    made = read_images(folder / output, width=64, height=64)[0]
    expect(len(made) == NUM_IMAGES, f"{output} holds {len(made)} images, not {NUM_IMAGES}")


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(otherwise)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: a command's peak would begin with its parent's.
        maker = multiprocessing.get_context("spawn").Process(target=write_files, args=(folder,))
        maker.start()
        maker.join()
        expect(maker.exitcode == 0, "the files could not be made")
        for file in sorted(folder.iterdir()):
            print(f"{file.stat().st_size / 1e6:8.1f} MB  {file.name}")
        for model in (STUDENT, CONVERTED):
            if model == CONVERTED:
                run(folder, "convert", STUDENT, CONVERTED, "--dtype", "bfloat16")
            said = run(folder, "inspect", model)
            expect("1.3B" in said, f"{model} is not recognised as the 1.3B")
        generate(folder, STUDENT, VAE, "official.mp4")
        generate(folder, CONVERTED, TAEHV_FILE, "taehv.mp4")
    print("\nThe rehearsal went well.")


if __name__ == "__main__":
    main()
