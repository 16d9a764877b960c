"""Live Stream in this process: what it makes, keeps and gives, steered by commands as they come."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import socket
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rf_core.state import Snapshot
from rf_core.stream import GUIDE_STRENGTH

from .conftest import PACK
from .files import DEMO, write_changed, write_lora
from .server import PATIENCE
from .video import images_of

BLUE = "a blue square moves up quickly"
RED = "a red circle moves left slowly"
PAUSE, RESUME, STOP = ({"do": name} for name in ("pause", "resume", "stop"))


def prompt(text: str) -> dict[str, Any]:
    return {"do": "prompt", "text": text}


def rewind(chunk: int, **given: Any) -> dict[str, Any]:
    return {"do": "rewind", "chunk": chunk, **given}


class Playing:
    """A run of the node in a thread of its own, with a hand on it."""

    def __init__(self, node: Any, http: Any, given: dict[str, Any]) -> None:
        self.given, self.error, self.done = given, None, None
        self._node, self._http = node, http
        self._before = set(http._rooms)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @torch.inference_mode()  # as ComfyUI runs
    def _run(self) -> None:
        try:
            self.done = self._node.execute(**self.given)
        except BaseException as error:
            self.error = error

    @property
    def room(self) -> Any:
        """Once it is open."""
        while not (new := set(self._http._rooms) - self._before):
            assert self._thread.is_alive(), self.error
            time.sleep(0.01)
        return self._http._rooms[new.pop()]

    def at(self, chunk: int) -> None:
        """Wait until so many chunks are made."""
        room = self.room
        while room.outbox.status.chunk < chunk:
            assert self._thread.is_alive(), self.error
            time.sleep(0.005)

    def ask(self, *commands: dict[str, Any]) -> None:
        """Give commands, and wait until they are answered."""
        room = self.room
        last = [room.inbox.put(self._http.read_command(each)) for each in commands][-1]
        while room.outbox.status.answered < last:
            time.sleep(0.005)

    def end(self, *commands: dict[str, Any]) -> Any:
        """Wait for its end; what it gives."""
        if commands:
            self.ask(*commands)
        self._thread.join(timeout=PATIENCE)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.done


@pytest.fixture
def live(
    pack: Any, demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Playing]:
    """Begins a run of Live Stream with the demo; 30 seconds at most, as fast as possible."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "out"))
    node = importlib.import_module(f"{PACK}.nodes.live").LiveStream
    http = importlib.import_module(f"{PACK}.nodes.live_http")
    streaming = importlib.import_module(f"{PACK}.nodes.streaming")
    monkeypatch.setattr(streaming, "_metadata", lambda hidden: {})

    def begin(**given: Any) -> Playing:
        values = {
            "model": demo.load_model(),
            "clip": demo.load_clip(),
            "vae": demo.load_vae(),
            "text": BLUE,
            "width": 64,
            "height": 64,
            "seed": 5,
            "steps": 4,
            "max_seconds": 30.0,
            "pace": "as fast as possible",
        }
        return Playing(node, http, values | given)

    return begin


def parts(done: Any) -> tuple[Any, Path, Tensor, Any, str]:
    """LATENT, the file, IMAGE, state and the text of a run."""
    latent, video, images, state = done.args
    return latent, Path(video.get_stream_source()), images, state, done.ui["text"][0]


def test_it_runs_until_it_is_stopped_and_gives_what_streaming_sampler_gives(
    live: Callable[..., Playing], pack: Any, demo: Any, host: Any
) -> None:
    run = live()
    run.at(10)
    assert [each.name for each in host.state_folder().iterdir() if each.suffix != ".part"] == [
        "reward_forcing_live_00001_.safetensors"
    ]
    latent, path, images, state, text = parts(run.end(STOP))
    assert not list(host.state_folder().iterdir()), "the node gives the state"
    chunks = latent["samples"].shape[2] // 3
    assert path.name == "reward_forcing_live_00001_.mp4" and chunks >= 10
    assert text.startswith(f"{path.name}: {12 * chunks - 3} images, ")
    assert len(images) == min(81, 12 * chunks - 3)
    shown = images_of(path)[-len(images) :]
    assert np.abs(shown.astype(float) - 255 * images.numpy()).mean() < 3  # H.264's loss
    sampler = importlib.import_module(f"{PACK}.nodes.sampler").StreamingSampler
    clip, encode = demo.load_clip(), importlib.import_module(f"{PACK}.nodes.prompt").encode
    conditioning = [[encode(clip, BLUE), {}]]
    with torch.inference_mode():
        other = sampler.execute(
            demo.load_model(), conditioning, 64, 64, chunks, "chunks", 5, 4, demo.load_vae()
        )
    expected, *_, known = other.args
    assert torch.equal(latent["samples"], expected["samples"][:, :, -latent["samples"].shape[2] :])
    assert np.array_equal(images_of(path), images_of(Path(other.args[1].get_stream_source())))
    assert state.snapshot.facts["num_chunks"] == known.snapshot.facts["num_chunks"] == chunks


def test_it_ends_by_itself_after_so_many_seconds(live: Callable[..., Playing]) -> None:
    _, path, *_ = parts(live(max_seconds=2.0).end())
    assert len(images_of(path)) == 33  # the fewest chunks that make 2 seconds


def test_without_an_end_it_is_stopped_by_a_command_alone(live: Callable[..., Playing]) -> None:
    run = live(max_seconds=0.0)
    run.at(50)
    assert len(images_of(parts(run.end(STOP))[1])) >= 12 * 50 - 3


def test_a_session_steered_back_and_forth_is_made_again_from_its_log(
    live: Callable[..., Playing], tmp_path: Path
) -> None:
    run = live(max_seconds=0.0)
    run.at(2)
    run.ask(prompt(RED))
    run.at(4)
    run.ask(rewind(1, branch="night"), prompt("a green triangle moves down"))
    run.at(5)
    run.ask({"do": "decay", "decay": 0.5}, {"do": "cut"})
    run.at(8)
    latent, path, images, *_ = parts(run.end(STOP))
    folder = path.parent
    assert path.name == "reward_forcing_live_00001_-night.mp4"
    assert json.loads((folder / "reward_forcing_live_00001_.jsonl").read_text().splitlines()[0])
    again = live(
        width=832, height=480, seed=0, max_seconds=1.0, text="x",
        replay="video/reward_forcing_live_00001_.jsonl",
    )  # fmt: skip
    other, there, shown, state, said = parts(again.end())
    assert there.name == "reward_forcing_live_00002_-night.mp4"
    for name in ("", "-night"):
        files = [folder / f"reward_forcing_live_0000{n}_{name}.mp4" for n in (1, 2)]
        assert np.array_equal(*map(images_of, files)), name
    assert torch.equal(other["samples"], latent["samples"]) and torch.equal(shown, images)
    assert state is not None and said.endswith("; replayed, the same latents to the bit")


def test_a_log_that_was_edited_makes_another_video_from_there_and_says_so(
    live: Callable[..., Playing], tmp_path: Path
) -> None:
    run = live(max_seconds=0.0)
    run.at(2)
    run.ask(prompt(RED))
    run.at(5)
    path = parts(run.end(STOP))[1]
    log = path.with_suffix(".jsonl")
    (asked,) = [json.loads(line) for line in log.read_text().splitlines() if RED in line]
    log.write_text(log.read_text().replace(RED, "a green triangle moves down"))
    *_, said = parts(live(replay=f"video/{log.name}").end())
    assert f"other images than the session's from chunk {asked['chunk']} of main on" in said


def test_a_log_that_is_none_and_a_place_outside_are_refused(
    live: Callable[..., Playing], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "no.jsonl").write_text("{}\n")
    (tmp_path / "secret.jsonl").write_text("{}\n")
    for name in ("nothing.jsonl", "../secret.jsonl", str(tmp_path / "secret.jsonl")):
        with pytest.raises(ValueError, match="is no log in the output folder"):
            live(replay=name).end()
    with pytest.raises(ValueError, match=r"line 1 of .*no\.jsonl is none that a live session"):
        live(replay="no.jsonl").end()


def test_a_strength_set_live_is_as_if_it_had_been_loaded(
    live: Callable[..., Playing], demo: Any, host: Any, tmp_path: Path
) -> None:
    write_lora(DEMO / "student.safetensors", tmp_path / "ink.safetensors")
    bare = demo.load_model()

    def with_lora(strength: float) -> Any:
        return host.with_lora(bare, tmp_path / "ink.safetensors", strength)[0]

    steered = live(model=with_lora(0.0))
    assert steered.room.outbox.status.loras == {"ink": 0.0}
    ink = {"do": "lora", "name": "ink", "strength": 0.75}
    steered.ask(PAUSE, ink, rewind(0), ink)
    steered.ask(RESUME)
    steered.at(4)
    latent = parts(steered.end(STOP))[0]["samples"]
    loaded = live(model=with_lora(0.75))
    loaded.at(4)
    expected = parts(loaded.end(STOP))[0]["samples"]
    frames = min(latent.shape[2], expected.shape[2])
    assert torch.equal(latent[:, :, :frames], expected[:, :, :frames])
    plain = live(model=with_lora(0.0))
    plain.at(4)
    before = parts(plain.end(STOP))[0]["samples"]
    untouched = live(model=bare, max_seconds=3.0)
    assert torch.equal(before[:, :, :9], parts(untouched.end())[0]["samples"][:, :, :9])
    assert (before[:, :, :9] - expected[:, :, :9]).abs().max() > 0.05


def test_the_same_lora_twice_has_two_names(demo: Any, host: Any, tmp_path: Path) -> None:
    write_lora(DEMO / "student.safetensors", tmp_path / "ink.safetensors")
    model = demo.load_model()
    for strength in (1.0, 0.0, 0.25):
        model = host.with_lora(model, tmp_path / "ink.safetensors", strength)[0]
    assert host.strengths(model) == {"ink": 1.0, "ink 2": 0.0, "ink 3": 0.25}
    changed = host.with_strengths(model, {"ink 2": 0.5})
    assert host.strengths(changed) == {"ink": 1.0, "ink 2": 0.5, "ink 3": 0.25}
    assert host.strengths(model)["ink 2"] == 0.0


def test_a_timeline_comes_by_itself_and_its_prompts_can_be_moved(
    live: Callable[..., Playing], pack: Any, demo: Any
) -> None:
    node = importlib.import_module(f"{PACK}.nodes.prompt").PromptSchedule
    with torch.inference_mode():
        timeline = node.execute(demo.load_clip(), f"c0: {BLUE}\nc3 [cut]: {RED}\nc90: x").args[0]
    run = live(timeline=timeline, text="not seen")
    run.at(1)
    coming = run.room.outbox.status.coming
    run.at(5)
    run.ask({"do": "move", "change": 2, "chunk": 40})
    done = run.end(STOP)
    assert [each.chunk for each in coming][-1] == 90
    status = run.room.outbox.status
    assert [(each.chunk, each.action.text) for each in status.past] == [(0, BLUE), (3, RED)]
    assert [(each.number, each.chunk) for each in status.coming] == [(2, 40)]
    assert "ignored: text, as a timeline is connected" in parts(done)[4]


def test_equal_parts_need_an_end(live: Callable[..., Playing], pack: Any, demo: Any) -> None:
    node = importlib.import_module(f"{PACK}.nodes.prompt").PromptSchedule
    with torch.inference_mode():
        timeline = node.execute(demo.load_clip(), f"{BLUE} | {RED}").args[0]
    with pytest.raises(ValueError, match="set max_seconds"):
        live(timeline=timeline, max_seconds=0.0).end()
    run = live(timeline=timeline, max_seconds=6.0)
    run.end()
    assert [each.chunk for each in run.room.outbox.status.past] == [0, 5]


def test_it_goes_on_from_a_state_with_another_prompt_and_is_replayed_from_there(
    live: Callable[..., Playing],
) -> None:
    *_, state, _ = parts(live(max_seconds=2.0, keep_state="exact").end())
    run = live(state=state, text=RED)
    run.at(7)
    latent, path, *_ = parts(run.end(STOP))
    assert [each.chunk for each in run.room.outbox.status.past] == [3, 3]
    assert len(images_of(path)) == latent["samples"].shape[2] * 4
    replayed = live(state=state, replay=f"video/{path.stem}.jsonl").end()
    assert torch.equal(parts(replayed)[0]["samples"], latent["samples"])


def test_a_start_image_begins_it_and_its_replay(live: Callable[..., Playing]) -> None:
    picture = parts(live(max_seconds=1.0, text=RED).end())[2][:1]
    run = live(start_image=picture)
    run.at(4)
    latent, path, *_ = parts(run.end(STOP))
    first = images_of(path)[0].astype(float) / 255
    assert np.abs(first - picture[0].numpy()).mean() < 0.02
    again = parts(live(start_image=picture, replay=f"video/{path.stem}.jsonl").end())
    assert torch.equal(again[0]["samples"], latent["samples"])
    with pytest.raises(ValueError, match="the log's stream has clip"):
        live(replay=f"video/{path.stem}.jsonl").end()


@pytest.fixture
def footage(live: Callable[..., Playing]) -> Tensor:
    """An IMAGE of five chunks of another video."""
    return parts(live(max_seconds=3.5, text="a green triangle moves down").end())[2]


def test_a_source_guides_it_at_a_strength_that_is_set_live_and_is_replayed_with_it(
    live: Callable[..., Playing], footage: Tensor
) -> None:
    run = live(source=footage, source_end="hold", max_seconds=0.0)
    assert run.room.outbox.status.strength == GUIDE_STRENGTH
    run.at(2)
    run.ask({"do": "strength", "strength": 0.25})
    assert run.room.outbox.status.strength == 0.25
    run.at(5)
    run.ask(rewind(1, branch="night"), {"do": "cut"})
    assert run.room.outbox.status.strength == GUIDE_STRENGTH
    run.at(6)
    latent, path, *_ = parts(run.end(STOP))
    name = f"video/{path.stem.removesuffix('-night')}.jsonl"
    again = live(source=footage.clone(), replay=name, strength=0.9)
    other, *_, said = parts(again.end())
    assert torch.equal(other["samples"], latent["samples"])
    assert said.endswith("; replayed, the same latents to the bit")
    for given, why in (({}, "had a source; connect"), ({"source": footage / 2}, "another source")):
        with pytest.raises(ValueError, match=why):
            live(replay=name, **given).end()
    plain = parts(live(max_seconds=1.0).end())[1]
    with pytest.raises(ValueError, match="had no source; disconnect"):
        live(source=footage, replay=f"video/{plain.stem}.jsonl").end()
    untouched = live()
    untouched.ask({"do": "strength", "strength": 0.5})
    assert untouched.room.outbox.status.strength is None
    said = parts(untouched.end(STOP))[4]
    assert "ignored" not in said


def test_from_a_state_it_goes_on_in_its_source_as_if_it_had_not_stopped(
    live: Callable[..., Playing], footage: Tensor
) -> None:
    given = {"source": footage, "source_end": "loop", "keep_state": "exact"}
    whole, *_ = parts(live(max_seconds=5.0, **given).end())
    first, _, _, state, _ = parts(live(max_seconds=2.0, **given).end())
    rest, *_, said = parts(live(max_seconds=3.0, state=state, **given).end())
    both = torch.cat([first["samples"], rest["samples"][:, :, -12:]], dim=2)
    assert torch.equal(both, whole["samples"][:, :, : both.shape[2]])
    assert "the source goes on at 2.06 s, where the state left it" in said
    *_, said = parts(live(max_seconds=1.0, state=state, **given | {"source": footage / 2}).end())
    assert "another source than the state's" in said


def test_the_image_socket_has_the_last_images_of_the_line_that_is_followed(
    live: Callable[..., Playing],
) -> None:
    run = live(max_seconds=3.0, keep_images=40)
    run.ask(PAUSE)
    run.ask(rewind(run.room.outbox.status.chunk), RESUME)
    _, path, images, *_ = parts(run.end())
    expected = images_of(path)[-40:]
    assert len(images) == len(expected) == 40
    assert np.abs(expected.astype(float) - 255 * images.numpy()).mean() < 3
    none = live(max_seconds=1.0, keep_images=0, keep_latents=0, keep_state="none").end()
    said = [each.message for each in (none.args[0], none.args[2], none.args[3])]
    assert said == [
        "keep_latents of Live Stream is 0: raise it to get LATENT",
        "keep_images of Live Stream is 0: raise it to get IMAGE",
        "keep_state of Live Stream is none: choose compact or exact to get a state",
    ]


def test_cancel_leaves_whole_files_and_a_log_that_makes_them_again(
    live: Callable[..., Playing], host: Any
) -> None:
    import comfy.model_management

    run = live(max_seconds=0.0)
    run.at(3)
    run.ask(PAUSE)
    comfy.model_management.interrupt_current_processing(True)  # seen in a pause, too
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run.end()
    path = next(Path(run.room.facts()["files"]["main"]) for _ in range(1))
    files = sorted(each.name for each in (run_folder(path)).iterdir())
    assert files == ["reward_forcing_live_00001_.jsonl", "reward_forcing_live_00001_.mp4"]
    whole = images_of(run_folder(path) / files[1])
    state = Snapshot.load(host.state_path("reward_forcing_live_00001_.safetensors"))
    assert len(whole) == 12 * state.facts["num_chunks"] - 3 == state.facts["video"]["images"]
    again = parts(live(replay=f"video/{files[0]}").end())[1]
    assert np.array_equal(images_of(again), whole)


def run_folder(_: Path) -> Path:
    import folder_paths

    return Path(folder_paths.get_output_directory()) / "video"


@pytest.fixture
def queue(host: Any, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A queue of ComfyUI's, as far as a node sees it."""
    from comfy_execution.utils import ExecutionContext

    seen = SimpleNamespace(now="first", others=False, gone={})
    running = lambda: ExecutionContext(seen.now, "live", None)  # noqa: E731
    monkeypatch.setattr(host, "running", running)
    monkeypatch.setattr(host, "other_prompts_wait", lambda besides: seen.others)
    monkeypatch.setattr(host, "requeue", lambda: "second")
    monkeypatch.setattr(host, "on_dequeued", seen.gone.__setitem__)
    return seen


def test_away_it_holds_no_model_and_goes_on_with_one_that_is_loaded_anew(
    live: Callable[..., Playing], queue: SimpleNamespace
) -> None:
    run = live(give_way=True, max_seconds=0.0)
    room = run.room
    run.at(2)
    queue.others = True
    run.end()
    chunk = room.outbox.status.chunk
    assert room.outbox.status.suspended
    gone = [weakref.ref(run.given[name]) for name in ("model", "clip")]
    run.given = None
    gc.collect()
    assert [each() for each in gone] == [None, None]
    queue.others, queue.now = False, "second"
    again = live(give_way=True, max_seconds=0.0, seed=99)  # as it began, whatever is set by now
    while room.outbox.status.chunk < chunk + 2:
        time.sleep(0.01)
    room.inbox.put(again._http.read_command(STOP))
    latent, file, *_ = parts(again.end())
    assert len(images_of(file)) == room.outbox.status.images == 12 * room.outbox.status.chunk - 3
    whole = live(max_seconds=0.0)
    whole.at(room.outbox.status.chunk)
    expected = parts(whole.end(STOP))[0]["samples"]
    assert torch.equal(latent["samples"], expected[:, :, : latent["samples"].shape[2]])


def test_it_gives_way_and_goes_on_in_its_source(
    live: Callable[..., Playing], queue: SimpleNamespace, footage: Tensor
) -> None:
    given = {"source": footage, "source_end": "loop", "max_seconds": 0.0}
    run = live(give_way=True, **given)
    room = run.room
    run.at(2)
    queue.others = True
    run.end()
    chunk = room.outbox.status.chunk
    queue.others, queue.now = False, "second"
    again = live(give_way=True, **given)
    while room.outbox.status.chunk < chunk + 3:
        time.sleep(0.01)
    room.inbox.put(again._http.read_command(STOP))
    latent = parts(again.end())[0]["samples"]
    whole = live(**given)
    whole.at(room.outbox.status.chunk)
    expected = parts(whole.end(STOP))[0]["samples"]
    assert torch.equal(latent, expected[:, :, : latent.shape[2]])


def test_where_it_cannot_go_on_it_ends_and_what_is_made_is_whole(
    live: Callable[..., Playing], queue: SimpleNamespace, host: Any, tmp_path: Path
) -> None:
    run = live(give_way=True, max_seconds=0.0)
    room = run.room
    run.at(2)
    queue.others = True
    run.end()
    write_changed(DEMO / "student.safetensors", tmp_path / "x.safetensors",
                        "blocks.0.modulation", 1.0)  # fmt: skip
    queue.now = "second"
    with pytest.raises(ValueError, match="model weights"):
        live(model=host.load_student(tmp_path / "x.safetensors")).end()
    assert "model weights" in room.end.why and room.ended_at is not None
    (path,) = run_folder(tmp_path).glob("*.mp4")
    assert len(images_of(path)) == 12 * room.end.chunk - 3
    queue.gone["second"]()  # and nothing more happens


def test_a_pause_that_nobody_ends_ends_it_after_max_seconds(live: Callable[..., Playing]) -> None:
    run = live(max_seconds=3.0)
    run.ask(PAUSE)
    begun = time.monotonic()
    run.end()
    assert time.monotonic() - begun >= 2.9 and run.room.outbox.status.paused


def test_osc_steers_it(live: Callable[..., Playing]) -> None:
    pytest.importorskip("pythonosc", reason="python-osc is not there")
    from pythonosc.udp_client import SimpleUDPClient

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = live(osc_port=port, max_seconds=0.0)
    run.at(1)
    desk = SimpleUDPClient("127.0.0.1", port)
    desk.send_message("/prompt", [RED])
    while run.room.outbox.status.answered < 1:
        time.sleep(0.01)
    desk.send_message("/stop", [])
    run.end()
    assert run.room.outbox.status.prompt == RED


def test_osc_without_its_package_says_what_to_install(
    live: Callable[..., Playing], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pythonosc", None)
    monkeypatch.setitem(sys.modules, "pythonosc.osc_message", None)
    with pytest.raises(ValueError, match="pip install python-osc"):
        live(osc_port=9000).end()


def test_a_prompt_that_cannot_be_is_refused_and_the_stream_goes_on(
    live: Callable[..., Playing], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"{PACK}.nodes.live_run")
    run = live(max_seconds=0.0)
    run.at(1)
    encode = module.encode

    def refusing(clip: Any, text: str) -> Any:
        if text == "no":
            raise ValueError("a prompt is empty")
        return encode(clip, text)

    monkeypatch.setattr(module, "encode", refusing)
    run.ask(prompt("no"))
    run.at(4)
    assert run.room.outbox.status.prompt == BLUE
    run.end(STOP)


def test_the_text_encoder_beside_it_does_not_cost_the_student_its_place(
    live: Callable[..., Playing], monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as manage

    module = importlib.import_module(f"{PACK}.nodes.live_run")
    encode, load = module.encode, manage.load_models_gpu
    seen: list[list[str]] = []

    def loading(models: Any, *given: Any, **named: Any) -> Any:
        seen.append([type(each.model).__name__ for each in models])
        return load(models, *given, **named)

    def pushing(clip: Any, text: str) -> Any:
        embeds = encode(clip, text)
        manage.free_memory(1e30, torch.device("cpu"))
        return embeds

    run = live(max_seconds=0.0)
    run.at(1)
    monkeypatch.setattr(manage, "load_models_gpu", loading)
    run.ask(prompt("a red square"), prompt(BLUE))
    assert not [each for each in seen if "StreamingModel" in each], "it was not moved"
    monkeypatch.setattr(module, "encode", pushing)
    run.ask(prompt(RED), prompt(BLUE), prompt(RED))
    run.end(STOP)
    assert len([each for each in seen if "StreamingModel" in each]) == 1  # encoded once


def test_prompts_and_strengths_leave_nothing_of_those_before(
    live: Callable[..., Playing], demo: Any, host: Any, tmp_path: Path
) -> None:
    from comfy.model_management import LoadedModel
    from comfy.model_patcher import ModelPatcher

    def standing() -> Counter[type]:
        gc.collect()
        kinds = (LoadedModel, ModelPatcher)
        found = map(type, gc.get_objects())
        return Counter(each for each in found if issubclass(each, kinds))

    write_lora(DEMO / "student.safetensors", tmp_path / "ink.safetensors")
    model = host.with_lora(demo.load_model(), tmp_path / "ink.safetensors", 0.0)[0]
    run = live(model=model, max_seconds=0.0)
    del model
    counted = []
    for turn in range(3):
        for step in range(8):
            number = 8 * turn + step
            strength = {"do": "lora", "name": "ink", "strength": number / 24}
            run.ask(prompt(f"{BLUE} {number}"), strength)
        run.ask(PAUSE)  # what is being made must not be looked at
        time.sleep(0.5)
        counted.append(standing())
        run.ask(RESUME)
    run.end(STOP)
    assert counted[1] == counted[2], counted


def test_the_last_status_says_that_it_has_ended_although_nothing_else_is_new(pack: Any) -> None:
    http = importlib.import_module(f"{PACK}.nodes.live_http")
    buffers = importlib.import_module(f"{PACK}.rf_core.live.buffers")

    class Room:
        outbox = buffers.Outbox()
        end = property(lambda self: self.outbox.end)

        def status(self) -> dict[str, bool]:
            return {"ended": self.end is not None}

    class Watcher(http._Watcher):
        def __init__(self) -> None:
            transport = SimpleNamespace(is_closing=lambda: False)
            self.request = SimpleNamespace(headers={}, transport=transport)
            self.room, self.sent = Room(), []

        async def begin(self, kind: str, **headers: str) -> None:
            self.room.outbox.status = object()

        async def write(self, data: bytes) -> None:
            self.sent.append(data.decode())

    async def drive() -> list[str]:
        watcher = Watcher()
        watching = asyncio.create_task(http._events(watcher))
        while not watcher.sent:
            await asyncio.sleep(0)
        watcher.room.outbox.publish(buffers.Ended(chunk=3, why=None))  # the status stays
        watcher.room.outbox.close()
        await asyncio.wait_for(watching, PATIENCE)
        return watcher.sent

    first, *_, last, end = asyncio.run(drive())
    assert "status" in first and "false" in first
    assert "status" in last and "true" in last and "ended" in end.splitlines()[0]
