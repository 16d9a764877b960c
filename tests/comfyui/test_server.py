"""The nodes in a running ComfyUI: what they make, what they refuse, how they stop."""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from .locales import english, paths
from .prompts import Prompt, demo_prompt, with_node
from .server import ROOT, Server
from .video import images_of

NODES = {
    "RFLoadModel",
    "RFLoadDemo",
    "RFLoadLoRA",
    "RFLoadControl",
    "RFControlVideo",
    "RFSinkConfig",
    "RFPromptSwitch",
    "RFPromptSchedule",
    "RFStreamingSampler",
    "RFLiveStream",
    "RFSaveState",
    "RFLoadState",
    "RFModelInfo",
}


def video_of(server: Server, shown: dict[str, list[dict[str, str]]]) -> Path:
    """The file a node shows."""
    (image,) = shown["images"]
    return server.output / image["subfolder"] / image["filename"]


def test_every_node_is_there_and_says_what_its_widgets_do(server: Server) -> None:
    info = server.get("/object_info")
    ours = {name: node for name, node in info.items() if name.startswith("RF")}
    assert set(ours) == NODES
    for name, node in ours.items():
        assert node["description"], name
        assert node["category"] == "Reward Forcing"
        for kind in ("required", "optional"):
            for key, (_, *options) in node["input"].get(kind, {}).items():
                assert options and options[0].get("tooltip"), f"{name}.{key}"
    assert "IMPORT FAILED" not in server.log


def test_both_locales_hold_every_text(server: Server) -> None:
    texts = {
        name: json.loads((ROOT / "locales" / name / "nodeDefs.json").read_text(encoding="utf-8"))
        for name in ("en", "zh")
    }
    assert texts["en"] == english(server.get("/object_info"))  # else: make_workflows.py
    assert paths(texts["zh"]) == paths(texts["en"])
    served = server.get("/i18n")
    assert served["zh"]["nodeDefs"]["RFStreamingSampler"] == texts["zh"]["RFStreamingSampler"]


def test_every_node_has_a_help_page(server: Server) -> None:
    for name in NODES:
        address = f"{server.address}/extensions/ComfyUI-RewardForcing/docs/{name}.md"
        with urllib.request.urlopen(address) as answer:
            assert answer.read().startswith(b"# ")


def test_the_stock_decoder_gives_the_very_images_of_the_stream(server: Server) -> None:
    prompt = demo_prompt(length=4, keep_images=-1)
    prompt = with_node(prompt, "decoded", "VAEDecode", samples=["stream", 0], vae=["demo", 2])
    for name, source in (("streamed", "stream"), ("whole", "decoded")):
        output = 2 if source == "stream" else 0
        prompt = with_node(prompt, name, "SaveImage", images=[source, output], filename_prefix=name)
    run = server.run(prompt)
    names = [[i["filename"] for i in run.output(n)["images"]] for n in ("streamed", "whole")]
    assert len(names[0]) == len(names[1]) == 9 + 3 * 12
    pairs = [
        [np.asarray(Image.open(server.output / name)).astype(int) for name in pair]
        for pair in zip(*names, strict=True)
    ]
    assert max(np.abs(a - b).max() for a, b in pairs) <= 1


def test_the_video_is_written_with_its_workflow_and_can_be_saved_again(server: Server) -> None:
    prompt = with_node(
        demo_prompt(),
        "saved",
        "SaveVideo",
        video=["stream", 1],
        filename_prefix="video/again",
        format="auto",
        codec="auto",
    )
    run = server.run(prompt)
    first, again = (video_of(server, run.output(name)) for name in ("stream", "saved"))
    assert images_of(first).shape == (21, 64, 64, 3)
    assert np.array_equal(images_of(first), images_of(again))
    with av.open(str(first)) as container:
        assert "RFStreamingSampler" in container.metadata["prompt"]


def test_a_longer_video_begins_with_the_shorter_one(server: Server) -> None:
    short, long = (
        server.run(
            with_node(
                demo_prompt(length=length, keep_images=-1),
                "save",
                "SaveImage",
                images=["stream", 2],
                filename_prefix=f"l{length}",
            )
        )
        for length in (2, 3)
    )
    for a, b in zip(short.output("save")["images"], long.output("save")["images"], strict=False):
        pictures = [Image.open(server.output / each["filename"]) for each in (a, b)]
        assert np.array_equal(*(np.asarray(picture) for picture in pictures))


def test_progress_counts_steps_to_the_last(server: Server) -> None:
    run = server.run(demo_prompt(seed=11, length=3))
    progress = [e["data"] for e in run.events if e["type"] == "progress"]
    values = [each["value"] for each in progress if each["node"] == "stream"]
    assert values == sorted(set(values)) and values[-1] == 12  # ComfyUI leaves out fast ones
    assert {each["max"] for each in progress} == {12}


def test_the_images_of_every_chunk_are_shown_as_they_are_made(server: Server) -> None:
    run = server.run(demo_prompt(seed=21, length=3), preview_method="auto")
    assert run.previews == []  # with a VAE latents are not shown, whatever ComfyUI is told to
    assert [len(sent["pictures"]) for sent in run.pictures] == [4, 6, 6]
    assert {(sent["node"], sent["rate"]) for sent in run.pictures} == {("stream", 8)}
    shown = [base64.b64decode(one) for sent in run.pictures for one in sent["pictures"]]
    pictures = [Image.open(io.BytesIO(one)) for one in shown]
    assert {(one.format, one.size) for one in pictures} == {("JPEG", (64, 64))}
    made = images_of(video_of(server, run.output("stream")))
    for number, one in zip((1, 3, 5, 7, 10), pictures, strict=False):
        assert np.abs(np.asarray(one).astype(int) - made[number]).mean() < 8
    assert "33 images" in run.output("stream")["text"][0]  # and its result, on the node


def test_without_a_vae_latents_are_shown_as_comfyui_is_told_to(server: Server) -> None:
    prompt = demo_prompt(seed=22, length=2)
    del prompt["stream"]["inputs"]["vae"]
    run = server.run(prompt, preview_method="latent2rgb")
    assert not run.pictures and len(run.previews) == 8
    picture = Image.open(io.BytesIO(run.previews[-1][8:]))
    assert picture.format == "PNG" and picture.n_frames == 3


def test_a_cancelled_run_is_shown_and_the_next_one_goes_on_from_it(server: Server) -> None:
    def prompt(name: str) -> Prompt:
        return demo_prompt(seed=12, length=40, filename_prefix=f"video/{name}")

    run = server.run(prompt("cut_off"), interrupt_after=14)
    assert run.events[-1]["type"] == "execution_interrupted"
    steps = [e["data"]["value"] for e in run.events if e["type"] == "progress"]
    assert steps[-1] <= run.interrupted_after + 20  # the request itself takes some of the demo's
    (shown,) = [e["data"] for e in run.events if e["type"] == "executed"]
    assert (shown["node"], shown["display_node"]) == ("stream", "stream")
    path = video_of(server, shown["output"])
    made = images_of(path)
    chunks = (len(made) + 3) // 12
    assert chunks >= 3 and len(made) == 12 * chunks - 3
    text = (
        f"stopped: {path.name} keeps {len(made)} images, {len(made) / 16:.2f} s; run again with "
        "seed 12 to go on"
    )
    assert shown["output"]["text"] == [text]
    rest = server.run(prompt("rest"))
    (told,) = rest.output("stream")["text"]
    assert f"first {chunks} chunks" in told
    progress = [e["data"] for e in rest.events if e["type"] == "progress"]
    assert {each["max"] for each in progress if each["node"] == "stream"} == {(40 - chunks) * 4}
    whole = images_of(video_of(server, rest.output("stream")))
    assert len(whole) == 40 * 12 - 3 and np.array_equal(whole[: len(made)], made)


def test_a_run_cancelled_without_a_vae_says_what_it_made(server: Server) -> None:
    run = server.run(demo_prompt(seed=13, length=40, vae=None), interrupt_after=9)
    (shown,) = [e["data"]["output"] for e in run.events if e["type"] == "executed"]
    assert set(shown) == {"text"} and "latent frames" in shown["text"][0]
    (told,) = server.run(demo_prompt(seed=13, length=40, vae=None)).output("stream")["text"]
    assert "re-used" in told


def test_a_state_goes_on_as_if_the_stream_had_never_stopped(server: Server) -> None:
    whole = demo_prompt(length=5, keep_state="exact", keep_images=24)
    whole = with_node(whole, "a", "SaveImage", images=["stream", 2], filename_prefix="whole")
    first = demo_prompt(length=3, keep_state="exact")
    rest = first | {"second": demo_prompt(length=2, keep_images=24)["stream"]}
    rest["second"]["inputs"]["state"] = ["stream", 3]
    rest = with_node(rest, "a", "SaveImage", images=["second", 2], filename_prefix="rest")
    names = [[i["filename"] for i in server.run(p).output("a")["images"]] for p in (whole, rest)]
    assert len(names[0]) == 24
    for a, b in zip(*names, strict=True):
        pictures = [np.asarray(Image.open(server.output / name)) for name in (a, b)]
        assert np.array_equal(*pictures)


def test_a_saved_state_is_listed_and_loaded(server: Server) -> None:
    prompt = with_node(demo_prompt(), "save", "RFSaveState", state=["stream", 3], name="kept")
    (told,) = server.run(prompt).output("save")["text"]
    assert "compact" in told and "64x64" in told
    listed = server.get("/object_info/RFLoadState")["RFLoadState"]["input"]["required"]["name"]
    assert "kept.safetensors" in str(listed)
    going_on = demo_prompt(state=["load", 0], length=2)
    going_on = with_node(going_on, "load", "RFLoadState", name="kept.safetensors")
    shown = server.run(going_on).output("stream")
    assert len(images_of(video_of(server, shown))) == 24


def joined_from(name: str, **changes: object) -> Prompt:
    """A run that goes on from a saved state, in one file."""
    values: dict[str, object] = {"length": 2, "state": ["load", 0], "join": True}
    return with_node(demo_prompt(**values | changes), "load", "RFLoadState", name=name)


def test_a_video_that_goes_on_is_one_file_where_that_is_asked_for(server: Server) -> None:
    first = with_node(
        demo_prompt(seed=31, filename_prefix="video/first", keep_state="exact"),
        "save",
        "RFSaveState",
        state=["stream", 3],
        name="to_join",
    )
    head = images_of(video_of(server, server.run(first).output("stream")))
    alone = server.run(joined_from("to_join.safetensors", seed=31, join=False)).output("stream")
    assert "the new part alone; turn on join" in alone["text"][0]
    rest = images_of(video_of(server, alone))
    prompt = joined_from("to_join.safetensors", seed=31, filename_prefix="video/joined")
    prompt = with_node(
        prompt, "saved", "SaveVideo", video=["stream", 1], filename_prefix="video/copy",
        format="auto", codec="auto",
    )  # fmt: skip
    prompt = with_node(prompt, "keep", "RFSaveState", state=["stream", 3], name="to_join_again")
    run = server.run(prompt)
    (told,) = run.output("stream")["text"]
    assert "45 images, 2.81 s, the first 1.31 s of first_00001_.mp4" in told and "alone" not in told
    for node in ("stream", "saved"):
        whole = images_of(video_of(server, run.output(node)))
        assert np.array_equal(whole, np.concatenate([head, rest]))
    third = server.run(joined_from("to_join_again.safetensors", seed=31)).output("stream")
    more = images_of(video_of(server, third))
    assert len(more) == 45 + 24 and np.array_equal(more[:45], whole)


def test_a_joined_video_that_is_cancelled_is_gone_on_from(server: Server) -> None:
    first = with_node(
        demo_prompt(seed=32), "save", "RFSaveState", state=["stream", 3], name="to_cancel"
    )
    server.run(first)
    prompt = joined_from("to_cancel.safetensors", seed=32, length=40)
    run = server.run(prompt, interrupt_after=9)
    (shown,) = [e["data"]["output"] for e in run.events if e["type"] == "executed"][-1:]
    part = images_of(video_of(server, shown))
    told = server.run(prompt).output("stream")
    assert "re-used" in told["text"][0]
    whole = images_of(video_of(server, told))
    assert len(whole) == 21 + 40 * 12 and np.array_equal(whole[: len(part)], part)


@pytest.mark.parametrize(
    ("change", "said"),
    [("gone", "is not in the output folder"), ("other", "is another video")],
)
def test_a_video_that_is_no_longer_the_states_is_not_joined(
    server: Server, change: str, said: str
) -> None:
    prefix = f"video/once_{change}"
    first = with_node(
        demo_prompt(seed=33, filename_prefix=prefix), "save", "RFSaveState", state=["stream", 3],
        name=change,
    )  # fmt: skip
    path = video_of(server, server.run(first).output("stream"))
    path.unlink()
    if change == "other":
        again = server.run(demo_prompt(seed=34, filename_prefix=prefix)).output("stream")
        assert video_of(server, again) == path
    error = error_of(server, joined_from(f"{change}.safetensors", seed=33))
    assert error.startswith("join is on") and path.name in error and said in error


def test_a_state_without_a_video_is_not_joined_and_join_without_a_state_is_ignored(
    server: Server,
) -> None:
    first = demo_prompt(seed=35, vae=None)
    first = with_node(first, "save", "RFSaveState", state=["stream", 3], name="unseen")
    server.run(first)
    assert "does not say which video" in error_of(server, joined_from("unseen.safetensors"))
    (told,) = server.run(demo_prompt(seed=36, join=True)).output("stream")["text"]
    assert "ignored: join" in told


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 72}, "multiple of"),
        ({"prompt": ["demo", 0]}, "mismatch"),
        ({"steps": 0}, "smaller than min"),
    ],
)
def test_wrong_values_are_refused_before_the_run(
    server: Server, changes: dict[str, object], said: str
) -> None:
    assert said in server.refusal(demo_prompt(**changes))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0s: a\n9s: b\n8s: c", "'8s: c'"),
        ("5s: a", "0s"),
        ("", "prompt"),
    ],
)
def test_a_wrong_schedule_names_line_and_remedy(server: Server, text: str, said: str) -> None:
    prompt = demo_prompt(prompt=["script", 0], length=3, unit="seconds")
    prompt = with_node(prompt, "script", "RFPromptSchedule", clip=["demo", 1], text=text)
    answer = server.post("/prompt", {"prompt": prompt})
    if "prompt_id" in answer:
        error = server.run(prompt).error
        assert error is not None
        assert said in error["exception_message"]
    else:
        assert said in str(answer["node_errors"])


def test_load_rf_lora_is_listed_says_what_fits_and_changes_the_video(server: Server) -> None:
    known = server.get("/object_info/RFLoadLoRA")["RFLoadLoRA"]["input"]["required"]
    assert "style.safetensors" in str(known["lora_name"])
    plain = images_of(video_of(server, server.run(demo_prompt(length=2)).output("stream")))
    prompt = demo_prompt(length=2, model=["styled", 0])
    given = {"model": ["demo", 0], "lora_name": "style.safetensors", "strength_model": 1.0}
    run = server.run(with_node(prompt, "styled", "RFLoadLoRA", **given))
    (said,) = run.output("styled")["text"]
    layers = said.split()[0]
    assert said == f"{layers} of {layers} layers"
    styled = images_of(video_of(server, run.output("stream")))
    assert np.abs(styled.astype(int) - plain).mean() > 1
    again = server.run(with_node(prompt, "styled", "RFLoadLoRA", **given))
    made = [each["data"]["node"] for each in again.events if each["type"] == "executing"]
    assert "stream" not in made  # as with the stock loader, nothing has changed


def test_what_has_no_effect_is_said_on_the_node(server: Server) -> None:
    prompt = demo_prompt(prompt=["script", 0], model=["patched", 0])
    text = "0s: a blue square moves up\n99s: a red circle moves left"
    prompt = with_node(prompt, "script", "RFPromptSchedule", clip=["demo", 1], text=text)
    prompt = with_node(prompt, "patched", "RescaleCFG", model=["demo", 0], multiplier=0.7)
    (said,) = server.run(prompt).output("stream")["text"]
    _, late, patch = said.splitlines()
    assert late.startswith("ignored: 'a red circle") and "99 s" in late
    assert patch.startswith("ignored: ") and "RescaleCFG" in patch


def test_other_samplers_and_models_are_refused_with_a_remedy(server: Server) -> None:
    prompt = with_node(
        demo_prompt(),
        "latent",
        "EmptyHunyuanLatentVideo",
        width=64,
        height=64,
        length=9,
        batch_size=1,
    )
    prompt = with_node(
        prompt,
        "k",
        "KSampler",
        model=["demo", 0],
        positive=["text", 0],
        negative=["text", 0],
        latent_image=["latent", 0],
        seed=0,
        steps=1,
        cfg=4.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    prompt = with_node(prompt, "d", "VAEDecode", samples=["k", 0], vae=["demo", 2])
    prompt = with_node(prompt, "s", "SaveImage", images=["d", 0], filename_prefix="never")
    del prompt["stream"]
    error = server.run(prompt).error
    assert error is not None
    assert "Streaming Sampler" in error["exception_message"]
    assert "CFG 1" in error["exception_message"]


def test_a_stream_without_a_vae_gives_latents_and_a_reason(server: Server) -> None:
    prompt = with_node(
        demo_prompt(vae=None), "d", "VAEDecode", samples=["stream", 0], vae=["demo", 2]
    )
    prompt = with_node(prompt, "s", "SaveImage", images=["d", 0], filename_prefix="latents")
    assert len(server.run(prompt).output("s")["images"]) == 21


def test_a_second_run_says_what_it_took_over(server: Server) -> None:
    def script(ending: str) -> Prompt:
        prompt = demo_prompt(prompt=["script", 0], length=4, seed=21)
        text = f"0s: a red circle moves left\nc2: {ending}"
        return with_node(prompt, "script", "RFPromptSchedule", clip=["demo", 1], text=text)

    server.run(script("a blue square moves up"))
    run = server.run(script("a green triangle moves right"))
    (told,) = run.output("stream")["text"]
    assert "first 2 chunks (1.31 s) are re-used" in told
    progress = [e["data"] for e in run.events if e["type"] == "progress"]
    assert {each["max"] for each in progress if each["node"] == "stream"} == {2 * 4}


def test_a_prompt_within_a_start_clip_begins_after_it_and_the_node_says_so(server: Server) -> None:
    prompt = demo_prompt(length=3, seed=41, keep_images=-1)
    text = "0s: a red circle moves left\nc1 [cut]: a blue square moves up"
    prompt["next"] = demo_prompt(prompt=["script", 0], length=5, start_image=["stream", 2])[
        "stream"
    ]
    prompt = with_node(prompt, "script", "RFPromptSchedule", clip=["demo", 1], text=text)
    shown = server.run(prompt).output("next")
    said = "note: 'a blue square moves up', asked for at 0.5625 s, begins at 2.0625 s, after the"
    assert said in shown["text"][0]
    assert len(images_of(video_of(server, shown))) == 9 + 12 + 12 + 9 + 12
    prompt["next"]["inputs"]["length"] = 2
    assert "length of 2 chunks, and the start clip alone lasts 3" in error_of(server, prompt)


def error_of(server: Server, prompt: Prompt) -> str:
    """What a run that must fail says."""
    error = server.run(prompt).error
    assert error is not None
    return str(error["exception_message"])


def test_an_empty_prompt_is_refused(server: Server) -> None:
    prompt = demo_prompt()
    prompt["text"]["inputs"]["text"] = "  "
    assert "empty" in error_of(server, prompt)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken.safetensors", "head.head.bias"),
        ("teacher.safetensors", "bidirectional"),
    ],
)
def test_files_that_cannot_stream_are_refused_by_name(server: Server, name: str, said: str) -> None:
    prompt = demo_prompt(model=["load", 0])
    prompt = with_node(prompt, "load", "RFLoadModel", model_name=name, weight_dtype="default")
    error = error_of(server, prompt)
    assert name in error and said in error


def test_a_model_of_another_loader_is_refused_by_name(server: Server) -> None:
    prompt = demo_prompt(model=["load", 0])
    prompt = with_node(
        prompt, "load", "UNETLoader", unet_name="wan.safetensors", weight_dtype="default"
    )
    error = error_of(server, prompt)
    assert "another kind of model" in error and "Load RF Model" in error


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 128}, "64x64"),
        ({"sink": ["sink", 0]}, "EMA-Sink Config"),
        ({"model": ["other", 0]}, "model weights"),
        ({"start_latent": ["stream", 0]}, "one way only"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    server: Server, changes: dict[str, object], said: str
) -> None:
    prompt = demo_prompt()
    prompt["second"] = demo_prompt(state=["stream", 3], **changes)["stream"]
    sink = {"window_frames": 9, "sink_frames": 3, "decay": 0.5, "accumulator": "reference"}
    prompt = with_node(prompt, "sink", "RFSinkConfig", preset="No sink", **sink)
    other = {"model_name": "other.safetensors", "weight_dtype": "default"}
    prompt = with_node(prompt, "other", "RFLoadModel", **other)
    assert said in error_of(server, prompt)


def test_facts_about_a_model_are_shown(server: Server) -> None:
    prompt = {"info": {"class_type": "RFModelInfo", "inputs": {"model_name": "demo.safetensors"}}}
    (text,) = server.run(prompt).output("info")["text"]
    assert "5 layers, width 160 = 4 heads x 40" in text and "window 9 frames, sink 3" in text
