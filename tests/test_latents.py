"""A folder of videos as latents: how they are read, cut, encoded and learnt from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rf_core.decoders.decoder import load_decoder
from rf_core.options import DEMO
from rf_core.video import VideoFormat, VideoWriter, images_at_rate, read_images
from training.__main__ import main
from training.choices import open_clips
from training.data.latents import clip_images, latents_path, list_videos, shards_of_latents
from training.data.prompts import DataConfig
from training.run.journal import read_journal

CPU = torch.device("cpu")
SIZE = 16


def video(path: Path, images: int, fps: int = 16) -> Path:
    """Each image is brighter than the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    form = VideoFormat(width=2 * SIZE, height=SIZE, fps=fps)
    with VideoWriter(path, form, {}) as writer:
        grey = torch.linspace(0, 250, images).to(torch.uint8)
        writer.write(grey[:, None, None, None].expand(-1, SIZE, 2 * SIZE, 3))
    return path


def greys(images: Tensor) -> list[float]:
    return (255 * images.mean((1, 2, 3))).round().tolist()


@pytest.mark.parametrize(("fps", "shown"), [(16, [0, 1, 2, 3, 4]), (8, [0, 2, 4])])
def test_a_video_is_seen_at_the_rate_that_is_asked_for(tmp_path: Path, fps: int, shown) -> None:
    path = video(tmp_path / "a.mp4", 5)
    every = greys(read_images(path, width=SIZE, height=SIZE)[0])
    found = torch.stack(list(images_at_rate(path, width=SIZE, height=SIZE, fps=fps)))
    assert found.shape[1:] == (3, SIZE, SIZE)
    assert greys(found) == [every[number] for number in shown]


def test_a_slow_video_shows_its_images_several_times(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", 3, fps=8)
    every = greys(read_images(path, width=SIZE, height=SIZE)[0])
    found = torch.stack(list(images_at_rate(path, width=SIZE, height=SIZE, fps=16)))
    assert greys(found) == [every[number] for number in (0, 0, 1, 1, 2)]


def test_captions_stand_beside_videos_or_in_a_table(tmp_path: Path) -> None:
    for name in ("b.mp4", "a/c.MOV", "d.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b.txt").write_text("a blue\n square ")
    (tmp_path / "a" / "c.txt").write_text("a circle")
    found = [(each.name, each.prompt) for each in list_videos(tmp_path, None)]
    assert found == [("a/c.MOV", "a circle"), ("b.mp4", "a blue square")]
    table = tmp_path / "captions.csv"
    table.write_text("\ufefffile,prompt\nd.mp4,a star\nnone.mp4,x\n", encoding="utf-8")
    assert [each.name for each in list_videos(tmp_path, table)] == ["d.mp4"]
    table.write_text("name,text\nd.mp4,a star\n")
    with pytest.raises(ValueError, match="no CSV with the columns file and prompt"):
        list_videos(tmp_path, table)
    with pytest.raises(ValueError, match=r"holds 0 videos .* none has a \.txt of its name"):
        list_videos(empty(tmp_path), None)
    with pytest.raises(ValueError, match="which is not a folder"):
        list_videos(tmp_path / "nowhere", None)


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


@pytest.mark.slow
def test_videos_are_encoded_once_and_a_teacher_learns_from_them(tmp_path: Path, capsys) -> None:
    videos, out = tmp_path / "videos", tmp_path / "latents"
    for name, images in (("a.mp4", 2 * clip_images(9) + 1), ("b.mp4", 20), ("c.mp4", 40)):
        video(videos / name, images).with_suffix(".txt").write_text(f"{name[0]} of light")
    (videos / "d.mp4").write_text("no video")
    (videos / "d.txt").write_text("nothing")
    options = [f"videos={videos}", "size=[64, 64]"]
    words = [word for each in options for word in ("--set", each)]
    encode = ["latents", "--out", str(out), "--device", "cpu", *words]
    assert main(encode) == 0
    assert [path.name for path in shards_of_latents(out)] == [
        f"latents-{number:06}.safetensors" for number in range(4)
    ]
    before = {path.name: path.read_bytes() for path in out.glob("latents-*")}
    latents_path(out, 0).unlink()  # as after a kill
    assert main(encode) == 0
    assert {path.name: path.read_bytes() for path in out.glob("latents-*")} == before

    source = open_clips(out, DataConfig(), CPU)
    assert len(source) == 3 and source.shape == (16, 9, 8, 8)
    texts, embeds = source.captions([0, 2, 1], [0, 0, 0])
    assert texts == ["a of light", "c of light", "a of light"]
    assert torch.equal(embeds[0], embeds[2]) and not torch.equal(embeds[0], embeds[1])
    images = read_images(videos / "a.mp4", width=64, height=64, num_images=clip_images(9))
    whole = load_decoder(DEMO / "vae.safetensors").encode(images)
    torch.testing.assert_close(source.latents([0]), whole, atol=2e-2, rtol=1e-2)

    (videos / "c.txt").write_text("another caption")
    capsys.readouterr()
    assert main(encode) == 1
    assert "caption has changed; choose another folder" in capsys.readouterr().err
    (videos / "c.txt").write_text("c of light")
    assert main([*encode, "--set", "fps=8"]) == 1
    assert "was begun with another config" in capsys.readouterr().err

    short = (f"source={out}", "updates=1", "batch=2", "micro_batch=2", "tensorboard=false")
    learn = [word for each in short for word in ("--set", each)]
    run = tmp_path / "run"
    assert main(["consistency", "--out", str(run), "--device", "cpu", *learn]) == 0
    assert read_journal(run / "log.jsonl")[0]["loss"] > 0
