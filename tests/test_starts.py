"""Re-DMD from start images: pictures with captions, and the first frames of encoded clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_recipes import SETTINGS

from rf_core.__main__ import main as generate
from rf_core.config import CacheConfig
from rf_core.decoders.decoder import load_decoder
from rf_core.options import DEMO
from rf_core.stream import Stream
from rf_core.text import load_text_encoder
from rf_core.video import read_images
from rf_core.weights.checkpoint import load_student
from training.__main__ import main
from training.choices import open_starts
from training.data.latents import Video, latents_path, write_latents
from training.data.prompts import DataConfig
from training.data.starts import StartedTexts, StartsConfig
from training.run.config import apply_overrides
from training.run.journal import read_journal
from training.stages.re_dmd import check_files
from training.stages.recipes import miniature
from training.world.scenes import render, scene_of_caption

CPU = torch.device("cpu")
CAPTIONS = ("a red circle moves left", "a blue square moves up", "a green triangle moves right")
CACHE = CacheConfig()
CHUNK = CACHE.chunk_frames


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """The first images of scenes of the miniature world, one larger, each with its caption."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    scenes = render([scene_of_caption(text, rng) for text in CAPTIONS], 1)
    for number, (image, text) in enumerate(zip(scenes[:, 0], CAPTIONS, strict=True)):
        pixels = (255 * image.permute(1, 2, 0)).round().byte().numpy()
        picture = Image.fromarray(pixels)
        picture = picture.resize((160, 128)) if number == 2 else picture
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(text)
    (folder / "no caption.png").write_bytes((folder / "0.png").read_bytes())
    return folder


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Two clips of one video, as `latents` writes them."""
    video = Video(name="a.mp4", prompt=CAPTIONS[0])
    latents = torch.randn(2, 16, 9, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    write_latents(latents_path(tmp_path / "clips", 0), list(latents), video, "")
    return tmp_path / "clips"


def opened(source: Path, folder: Path, share: float = 0.5):
    decoder, config = (
        load_decoder(DEMO / "vae.safetensors"),
        StartsConfig(source=source, share=share),
    )
    return open_starts(config, DataConfig(), decoder, CACHE, folder, CPU, torch.float32)


def test_a_picture_is_taken_in_as_a_stream_takes_it(pictures, tmp_path):
    source = opened(pictures, tmp_path)
    assert list(source.rows((8, 8))) == [0, 1, 2]  # the one without a caption is left out
    model, _ = load_student(DEMO / "student.safetensors", device="cpu", dtype=torch.float32)
    encoder = load_text_encoder(DEMO / "text_encoder.safetensors", device=CPU, dtype=torch.float32)
    for number, text in enumerate(CAPTIONS):
        embeds = encoder.encode([text])
        stream = Stream(
            model, embeds, height=64, width=64, decoder=load_decoder(DEMO / "vae.safetensors")
        )
        picture = read_images(pictures / f"{number}.png", width=64, height=64)
        (chunk,) = stream.start_from_images(picture)
        assert torch.equal(source.latents([number], (8, 8)), chunk.latents)
        assert source.prompt(number) == text
        found = source.embeds(number)
        torch.testing.assert_close(found, embeds[0, : len(found)])
    assert source.latents([1], (16, 12)).shape == (1, 16, CHUNK, 16, 12)


def test_a_clip_gives_its_first_chunk_and_its_prompt(clips, tmp_path):
    source = opened(clips, tmp_path)
    assert list(source.rows((8, 8))) == [0, 1] and not source.rows((8, 4))
    whole = source.clips.latents([1])
    assert torch.equal(source.latents([1], (8, 8)), whole[:, :, :CHUNK])
    texts = StartedTexts(["own"], source)
    assert [texts[0], texts[1], texts[2]] == ["own", CAPTIONS[0], CAPTIONS[0]]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_student_is_distilled_from_pictures_with_a_reward_and_streams_from_one(
    pictures, tmp_path, share
):
    more = (*SETTINGS, f"starts.source={pictures}", f"starts.share={share}")
    words = [word for each in more for word in ("--set", each)]
    run = tmp_path / "run"
    assert main(["re_dmd", "--out", str(run), *words]) == 0
    lines = read_journal(run / "log.jsonl")
    assert len(lines) == 2 and all(0 < line["generator_norm"] < 100 for line in lines)
    assert main(["re_dmd", "--out", str(run), "--resume"]) == 0  # with the same starts
    video, image = tmp_path / "a.mp4", pictures / "0.png"
    words = ["--model", str(run / "student.safetensors"), "--prompt", CAPTIONS[0]]
    made = ["--chunks", "3", "--device", "cpu", "--start", str(image), "--output", str(video)]
    assert generate(["generate", *words, *made]) == 0
    first = read_images(video, width=64, height=64, num_images=1)
    assert (first - read_images(image, width=64, height=64)).abs().mean() < 0.05


@pytest.mark.slow
def test_a_student_is_distilled_from_the_first_frames_of_clips(clips, tmp_path):
    more = (*SETTINGS, f"starts.source={clips}", "starts.share=0.5", "reward.kind=none")
    words = [word for each in more for word in ("--set", each)]
    assert main(["re_dmd", "--out", str(tmp_path / "run"), *words]) == 0
    assert len(read_journal(tmp_path / "run" / "log.jsonl")) == 2


def test_start_images_that_do_not_fit_are_refused_by_name(pictures, clips, tmp_path):
    def refuse(said: str, *settings: str) -> None:
        with pytest.raises(ValueError, match=said):
            check_files(apply_overrides(miniature(), settings))

    refuse(r"config\.starts: share is 0\.5; give source", "starts.share=0.5")
    refuse(r"config\.starts: source is .* and share 0", f"starts.source={pictures}")
    share = "starts.share=0.5"
    refuse(r"starts\.source is nowhere, which is not a folder", share, "starts.source=nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(r"starts: .*holds 0 pictures .* none has a \.txt", share, f"starts.source={empty}")
    of_clips = (share, f"starts.source={clips}")
    refuse(r"starts\.captions is x\.csv, but .* prompts of", *of_clips, "starts.captions=x.csv")
    refuse(
        r"starts\.source is .* clips are \[\[16, 9, 8, 8\]\].* of 8x12 latents too",
        *of_clips,
        "run.buckets=[[8, 12]]",
    )
    chunk = "run.redmd.cache={'window_frames': 36, 'chunk_frames': 12, 'sink_frames': 12}"
    refuse("12 frames or more", *of_clips, chunk.replace("'", '"'), "run.latents=[16, 24, 8, 8]")
    refuse("all that is supervised at once", *of_clips, "run.latents=[16, 3, 8, 8]")
    one = "run.redmd.window_chunks=1"
    refuse("all that is supervised at once", *of_clips, one, "run.latents=[16, 6, 8, 8]")
