"""A source on the nodes: what a video makes of it, where it goes on, and what is said of it."""

from __future__ import annotations

import importlib
import io
import json
import re
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rf_core.memory.live_bytes import fake_tensors, peak_bytes
from rf_core.stream import GUIDE_STRENGTH
from rf_core.video import VideoFormat, VideoWriter, to_uint8

from .conftest import PACK
from .files import VIDEO
from .graphs import GRAPHS
from .prompts import Prompt, demo_prompt, with_node
from .server import Server
from .test_model import (
    again,
    fake_decoder,
    produced,
    random_taehv,
    request_of,
    same,
    sampled,
    stopped_run,
)
from .video import images_of

RED = "a red circle moves right"
GREEN = "a green square moves down"
NEW_WIDGETS = ("strength", "source_end", "source_fit")
CHUNKS = 6


@pytest.fixture(scope="module")
def footage(pack: Any) -> Tensor:
    """An IMAGE of what the demo makes of another prompt, as long as the videos here."""
    demo, decoders = (importlib.import_module(f"{PACK}.nodes.{n}") for n in ("demo", "decoders"))
    model = demo.load_model()
    decoder = decoders.decoder_of(demo.load_vae(), model.model.latent_format)
    made = sampled(
        pack, request_of(pack, model, GREEN, decoder=decoder, keep_images=-1, length=CHUNKS)
    )
    images = importlib.import_module(f"{PACK}.nodes.run").images_of(made, -1)
    assert images is not None
    return images


def written(path: Path, images: Tensor, fps: int = 16) -> Path:
    """A clip of images [T, H, W, 3]."""
    height, width = images.shape[1:3]
    with VideoWriter(path, VideoFormat(width=width, height=height, fps=fps), {}) as writer:
        writer.write(to_uint8(images.movedim(-1, 1)))
    return path


def clip(given: Any, **how: Any) -> Any:
    """What is connected, at its default settings."""
    module = importlib.import_module(f"{PACK}.nodes.source")
    values = {"strength": GUIDE_STRENGTH, "source_end": "stop", "source_fit": "crop"}
    return module.clip_of(given, *(values | how).values())


@pytest.fixture
def video(pack: Any, demo: Any, tmp_path: Path) -> Callable[..., Any]:
    """Requests of one model for a video that follows a source."""
    decoders = importlib.import_module(f"{PACK}.nodes.decoders")
    model, vae = demo.load_model(), demo.load_vae()

    def request(source: Any, name: str = "video", text: str = RED, **changes: Any) -> Any:
        decoder = decoders.decoder_of(changes.pop("vae", vae), model.model.latent_format)
        values = {"decoder": decoder, "path": tmp_path / f"{name}.mp4", "keep_images": -1}
        values |= {"length": CHUNKS, "source": source}
        return request_of(pack, model, text, **values | changes)

    return request


def latents(made: Any) -> Tensor:
    """All latents of a run."""
    return torch.cat(list(made.latents), dim=2)


def test_a_source_is_followed_as_far_as_its_strength_says(
    pack: Any, video: Callable[..., Any], footage: Tensor
) -> None:
    alone = sampled(pack, video(None))
    made = {each: sampled(pack, video(clip(footage, strength=each))) for each in (0.0, 0.6, 1.0)}
    assert torch.equal(latents(made[1.0]), latents(alone))
    shown = {each: torch.cat(list(run.images)).movedim(1, -1) for each, run in made.items()}
    away = {each: float((images - footage).abs().mean()) for each, images in shown.items()}
    assert away[0.0] < 0.02 < away[0.6] < away[1.0]


def test_a_clip_is_followed_as_its_images_are_whatever_brings_them(
    pack: Any, video: Callable[..., Any], footage: Tensor, tmp_path: Path
) -> None:
    from comfy_api.latest import InputImpl, Types

    path = written(tmp_path / "clip.mp4", footage)
    read = torch.from_numpy(images_of(path)).float() / 255
    parts = Types.VideoComponents(images=read, frame_rate=Fraction(16))
    expected = latents(sampled(pack, video(clip(read))))
    given = [
        InputImpl.VideoFromFile(str(path)),
        InputImpl.VideoFromFile(io.BytesIO(path.read_bytes())),
    ]
    for each in (*given, InputImpl.VideoFromComponents(parts)):
        assert torch.equal(latents(sampled(pack, video(clip(each)))), expected)


@pytest.mark.parametrize("rate", [8, 12, 24, 30])
def test_a_video_of_another_rate_keeps_its_speed_whatever_brings_it(
    pack: Any, tmp_path: Path, rate: int
) -> None:
    from comfy_api.latest import InputImpl, Types

    grey = torch.linspace(0.1, 0.9, 2 * rate)[:, None, None, None].expand(-1, 64, 64, 3)
    path = written(tmp_path / "clip.mp4", grey, fps=rate)
    read = torch.from_numpy(images_of(path)).float() / 255
    parts = Types.VideoComponents(images=read, frame_rate=Fraction(rate))
    shown = []
    for each in (InputImpl.VideoFromFile(str(path)), InputImpl.VideoFromComponents(parts)):
        reader = clip(each).footage.reader(64, 64, 16, "hold", "crop")
        shown.append(reader.take(40)[:, 0, 0, 0])
        assert reader.length == pytest.approx(2 * 16, abs=1)
    assert torch.equal(*shown)
    whole = [round(n * rate / 16) for n in range(0, 32, 16)]
    assert torch.equal(shown[0][:32:16], read[whole, 0, 0, 0])


def test_a_video_that_is_cut_is_followed_from_its_cut_to_its_end(
    pack: Any, tmp_path: Path, footage: Tensor
) -> None:
    from comfy_api.latest import InputImpl

    path = written(tmp_path / "clip.mp4", footage)
    for start, duration in ((0.5, 0), (0.5, 2.0), (-1.0, 0), (0, 1.0), (0.53, 1.11)):
        cut = InputImpl.VideoFromFile(str(path), start_time=start, duration=duration)
        expected = cut.get_components().images
        reader = clip(cut).footage.reader(64, 64, 16, "loop", "crop")
        seen = reader.take(len(expected) + 5).movedim(1, -1)
        assert reader.length == len(expected)
        assert (seen[: len(expected)] - expected).abs().mean() < 0.01
        assert torch.equal(seen[len(expected) :], seen[:5])
        reader.seek(7)
        assert torch.equal(reader.take(3).movedim(1, -1), seen[7:10])
    late = clip(InputImpl.VideoFromFile(str(path), start_time=60.0))
    with pytest.raises(ValueError, match="begin after its last image"):
        late.footage.reader(64, 64, 16, "stop", "crop").take(1)


CUT = f"0s: {RED}\nc2 [cut]: a yellow triangle moves left"


def test_a_student_of_24_images_a_second_reads_its_source_at_24(
    pack: Any, video: Callable[..., Any], tmp_path: Path, footage: Tensor
) -> None:
    from comfy_api.latest import InputImpl

    file = InputImpl.VideoFromFile(str(written(tmp_path / "clip.mp4", footage[:32])))
    made = sampled(pack, request := video(clip(file), fps=24))
    assert (made.num_images, made.source_ended) == (45, True)  # of 48
    shown = torch.from_numpy(images_of(request.path)).float() / 255
    away = [float((shown - footage[at].float()).abs().mean()) for at in (
        [n * 2 // 3 for n in range(45)], [min(n, 31) for n in range(45)]
    )]  # fmt: skip
    assert away[0] < away[1]


@pytest.mark.parametrize("vae", ["wan", "taehv"])
@pytest.mark.parametrize("text", [RED, CUT])
@pytest.mark.parametrize("kind", ["images", "file"])
def test_a_state_goes_on_in_its_source_to_the_bits_of_one_long_run(
    pack: Any, demo: Any, video: Callable[..., Any], footage: Tensor, tmp_path: Path,
    kind: str, text: str, vae: str,
) -> None:  # fmt: skip
    from comfy_api.latest import InputImpl

    file = InputImpl.VideoFromFile(str(written(tmp_path / "clip.mp4", footage)))
    source = clip(footage if kind == "images" else file)
    same_vae = {"vae": demo.load_vae() if vae == "wan" else random_taehv()}
    whole = sampled(pack, video(source, "whole", text, **same_vae))
    half = video(source, "half", text, length=CHUNKS // 2, **same_vae)
    importlib.import_module(f"{PACK}.nodes.reuse").clear()
    first = importlib.import_module(f"{PACK}.nodes.run").RunResult()
    snapshot = source.noted(produced(half, "exact", first), first.place)
    goes_on = text.splitlines()[-1].rpartition(": ")[2]
    rest = video(
        source.placed(snapshot), "rest", goes_on, length=CHUNKS // 2, snapshot=snapshot, **same_vae
    )
    second = again(rest)
    assert first.place.images == first.num_images > 0
    assert torch.equal(latents(whole), torch.cat([latents(first), latents(second)], dim=2))
    images = [np.concatenate([images_of(each.path) for each in (half, rest)])]
    assert np.array_equal(images_of(tmp_path / "whole.mp4"), images[0])
    other = clip(footage.flip(0)).placed(snapshot)
    assert other.place.images == 0


def test_what_is_kept_is_of_the_same_clip_taken_in_the_same_way(
    pack: Any, video: Callable[..., Any], footage: Tensor
) -> None:
    reuse = importlib.import_module(f"{PACK}.nodes.reuse")
    whole = sampled(pack, expected := video(clip(footage), "whole"))
    reuse.clear()
    again(video(clip(footage), "short", length=4))
    longer = again(rest := video(clip(footage.clone()), "longer"))
    assert longer.reused == 4 and same(whole, longer, expected, rest)
    middle = footage.clone()
    middle[len(middle) // 2, 0, 0, 0] += 0.5
    for other in (
        None,
        clip(middle),
        clip(footage[:-1]),
        clip(footage, strength=0.45),
        clip(footage, source_end="loop"),
        clip(footage, source_fit="letterbox"),
    ):
        assert again(video(other, "other")).reused == 0


@pytest.mark.parametrize("place", [1, 4, "layer 5", "encode 0", "encode 7"])
def test_a_run_that_was_stopped_goes_on_in_its_source(
    pack: Any, host: Any, video: Callable[..., Any], footage: Tensor, place: int | str
) -> None:
    whole = sampled(pack, expected := video(clip(footage), "whole"))
    importlib.import_module(f"{PACK}.nodes.reuse").clear()
    stopped = stopped_run(pack, host, part := video(clip(footage), "part"), place)
    assert (len(images_of(part.path)) if stopped.chunks else 0) == stopped.num_images
    second = again(rest := video(clip(footage), "rest"))
    assert second.reused == stopped.chunks < CHUNKS
    assert same(whole, second, expected, rest)


@pytest.mark.parametrize("keep", [-1, 10])
def test_a_source_that_stops_ends_the_video_with_its_last_whole_chunk_also_where_it_is_taken_over(
    pack: Any, video: Callable[..., Any], footage: Tensor, keep: int
) -> None:
    made = sampled(pack, request := video(clip(footage[:40]), "first", keep_images=keep))
    assert (made.chunks, made.num_images, made.source_ended) == (3, 33, True)
    assert len(images_of(request.path)) == 33
    longer = again(rest := video(clip(footage[:40]), "rest", keep_images=keep, length=9))
    assert longer.reused == 3 and longer.source_ended and same(made, longer, request, rest)
    images = importlib.import_module(f"{PACK}.nodes.run").images_of
    assert torch.equal(images(made, keep), images(longer, keep))


def test_a_source_that_is_held_or_looped_goes_on(
    pack: Any, video: Callable[..., Any], footage: Tensor
) -> None:
    held = torch.cat([footage[:20], footage[19:20].expand(60, -1, -1, -1)])
    looped = torch.cat([footage[:20]] * 4)
    for end, longer in (("hold", held), ("loop", looped)):
        made = sampled(pack, video(clip(footage[:20], source_end=end)))
        assert made.chunks == CHUNKS and not made.source_ended
        assert torch.equal(latents(made), latents(sampled(pack, video(clip(longer)))))
    single = sampled(pack, video(clip(footage[:1])))
    assert single.chunks == CHUNKS


def test_a_start_clip_covers_what_the_source_shows_beside_it(
    pack: Any, video: Callable[..., Any], footage: Tensor
) -> None:
    begun = latents(sampled(pack, video(clip(footage), length=2)))
    made = sampled(pack, video(clip(footage), start_latents=begun))
    assert torch.equal(latents(made)[:, :, :6], begun) and made.place.images == made.num_images
    other = footage.clone()
    other[:3] = torch.rand_like(other[:3])  # of which an encoder remembers next to nothing there
    again = sampled(pack, video(clip(other), start_latents=begun))
    torch.testing.assert_close(latents(again), latents(made), atol=1e-2, rtol=0)
    other[21:] = other[21:].flip(0)
    again = sampled(pack, video(clip(other), start_latents=begun))
    assert (latents(again) - latents(made)).abs().max() > 0.5


@pytest.mark.parametrize("strength", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("channels", [3, 4])
def test_a_portrait_at_the_ends_of_every_widget_streams_to_pictures_of_the_videos_size(
    pack: Any, video: Callable[..., Any], strength: float, channels: int
) -> None:
    portrait = torch.rand(12, 70, 30, channels)
    for end, fit in product(("stop", "hold", "loop"), ("crop", "letterbox")):
        source = clip(portrait, strength=strength, source_end=end, source_fit=fit)
        made = sampled(pack, request := video(source, length=2))
        assert made.chunks == (1 if end == "stop" else 2) and latents(made).isfinite().all()
        shown = images_of(request.path)
        assert shown.shape == (9 if end == "stop" else 21, 64, 64, 3)
        if strength == 0 and fit == "letterbox":
            assert shown[:, :, :8].mean() < 60 < shown[:, :, 28:36].mean()


def test_what_is_no_picture_is_refused_by_its_shape(pack: Any) -> None:
    for shape in ((5, 64, 64, 1), (0, 64, 64, 3), (5, 0, 64, 3)):
        with pytest.raises(ValueError, match=re.escape(str(list(shape)))):
            clip(torch.zeros(shape)).footage.reader(64, 64, 16, "stop", "crop")


@pytest.mark.parametrize("name", ["StockWanDecoder", "StockTAEHVDecoder"])
@pytest.mark.parametrize("size", [(480, 832), (256, 256)])
def test_what_encoding_is_said_to_take_is_what_its_tensors_take(
    pack: Any, monkeypatch: pytest.MonkeyPatch, name: str, size: tuple[int, int]
) -> None:
    with fake_tensors("cuda") as place:
        decoder = fake_decoder(monkeypatch, name, place)

        def three_chunks() -> None:
            state = None
            for _ in range(3):
                images = decoder.source_images_of(3, state is None)
                _, state = decoder.encode_chunk(torch.empty(1, images, 3, *size), state)

        counted = peak_bytes(three_chunks, place)
    assert decoder.encode_bytes(*size) == pytest.approx(counted, rel=0.1)


def followed(**sampler: Any) -> Prompt:
    """The demo's video of a clip that Load Video reads."""
    prompt = demo_prompt(**{"source": ["clip", 0], "length": 3.0, "unit": "seconds"} | sampler)
    return with_node(prompt, "clip", "LoadVideo", file=VIDEO)


def told(server: Server, prompt: Prompt) -> list[str]:
    """What the sampler says."""
    (text,) = server.run(prompt).output("stream")["text"]
    return str(text).splitlines()


def refused(server: Server, prompt: Prompt) -> str:
    """Why a run fails, in a sentence."""
    error = server.run(prompt).error
    assert error is not None and error["exception_type"] == "ValueError", error
    message = str(error["exception_message"]).strip()
    assert "\n" not in message and str(server.base) not in message, message
    return message


def test_the_node_says_what_becomes_of_a_source_and_what_was_set_without_one(
    server: Server,
) -> None:
    assert len(told(server, followed(seed=60))) == 1
    ended = "the source ends at 5.81 s, and the video with it; source_end hold or loop goes on"
    assert ended in told(server, followed(seed=60, length=60.0))
    assert not any("ends" in each for each in told(server, followed(seed=61, source_end="hold")))
    alone = "ignored: what the source shows, as strength 1 is the prompt alone"
    assert alone in told(server, followed(seed=62, strength=1.0))
    lines = told(server, demo_prompt(seed=63, strength=0.5, source_end="loop", source_fit="crop"))
    assert lines[1:] == [
        "ignored: strength, as no source is connected",
        "ignored: source_end, as no source is connected",
    ]
    assert len(told(server, demo_prompt(seed=64, strength=GUIDE_STRENGTH))) == 1


def test_a_source_that_cannot_be_followed_is_refused_in_a_sentence(server: Server) -> None:
    assert "connect one to the vae input" in refused(server, followed(seed=65, vae=None))
    short = with_node(followed(seed=65), "short", "ImageFromBatch", image=["parts", 0],
                      batch_index=0, length=5)  # fmt: skip
    short = with_node(short, "parts", "GetVideoComponents", video=["clip", 0])
    short["stream"]["inputs"]["source"] = ["short", 0]
    assert "the source has 5 images" in refused(server, short)
    (server.base / "input" / "broken.mp4").write_bytes(b"no video")
    broken = with_node(followed(seed=65), "clip", "LoadVideo", file="broken.mp4")
    assert "the source" in refused(server, broken)
    state = with_node(followed(seed=66, length=60.0), "save", "RFSaveState",
                      state=["stream", 3], name="over")  # fmt: skip
    server.run(state)
    on = with_node(followed(seed=66, state=["load", 0]), "load", "RFLoadState",
                   name="over.safetensors")  # fmt: skip
    assert "the source ends before 5.81 s, where the state goes on" in refused(server, on)


def asked_of(prompt: Prompt) -> dict[str, dict[str, Any]]:
    """What a prompt asks of each node, but for sources."""
    return {
        number: {name: value for name, value in each["inputs"].items() if name not in NEW_WIDGETS}
        for number, each in prompt.items()
    }


def test_a_workflow_that_was_saved_before_there_were_sources_keeps_its_values(
    server: Server,
) -> None:
    from comfy_cli.workflow_to_api import convert_ui_to_api

    info = server.get("/object_info")
    for name, kind in (("text_to_video_demo", "RFStreamingSampler"), ("live_demo", "RFLiveStream")):
        saved = json.loads(GRAPHS[name].path.read_text())
        now = asked_of(convert_ui_to_api(saved, info))
        (node,) = [each for each in saved["nodes"] if each["type"] == kind]
        node["widgets_values"] = node["widgets_values"][:-3]
        node["inputs"] = [
            each for each in node["inputs"] if each["name"] not in ("source", *NEW_WIDGETS)
        ]
        assert asked_of(convert_ui_to_api(saved, info)) == now
