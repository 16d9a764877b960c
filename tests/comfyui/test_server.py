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
    "RFSinkConfig",
    "RFPromptSwitch",
    "RFPromptSchedule",
    "RFStreamingSampler",
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


def test_it_imports_in_less_than_half_a_second(server: Server) -> None:
    (line,) = [line for line in server.log.splitlines() if "seconds: " in line and "Reward" in line]
    assert float(line.split("seconds:")[0].split()[-1]) < 0.5


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


def test_an_interrupt_acts_within_a_step_and_leaves_a_playable_file(server: Server) -> None:
    run = server.run(
        demo_prompt(seed=12, length=200, filename_prefix="video/cut_off"), interrupt_after=14
    )
    assert run.events[-1]["type"] == "execution_interrupted"
    steps = [e["data"]["value"] for e in run.events if e["type"] == "progress"]
    assert steps[-1] <= run.interrupted_after + 20  # the request itself takes some of the demo's
    (path,) = (server.output / "video").glob("cut_off*.mp4")
    assert len(images_of(path)) >= 9 + 2 * 12


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
    assert "WAN21" in error and "Load RF Model" in error


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
