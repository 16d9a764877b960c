"""The workflows of the pack, as data: what `make_workflows.py` has the real frontend draw and save.

A graph is nodes by name, each with its type, place and widget values; links run from an output's
name to an input's. Columns are 420 pixels apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PANDA = "a panda walks through a bamboo forest, sunlight between the leaves, steady camera"
PANDA_SITS = "the panda sits down and eats bamboo, sunlight between the leaves, steady camera"

HUB = "https://huggingface.co"
COMFY_ORG = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
STUDENT = {
    "name": "rewardforcing.pt",
    "url": f"{HUB}/JaydenLu666/Reward-Forcing-T2V-1.3B/resolve/main/rewardforcing.pt",
    "directory": "diffusion_models",
}
TEXT_ENCODER = {
    "name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    "url": f"{COMFY_ORG}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    "directory": "text_encoders",
}
VAE = {
    "name": "wan_2.1_vae.safetensors",
    "url": f"{COMFY_ORG}/vae/wan_2.1_vae.safetensors",
    "directory": "vae",
}
TAEHV = {  # ComfyUI reads files of this name from a folder of their own
    "name": "lighttaew2_1.safetensors",
    "url": f"{HUB}/lightx2v/Autoencoders/resolve/main/lighttaew2_1.safetensors",
    "directory": "vae_approx",
}


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of a graph."""

    type: str
    at: tuple[int, int]
    """Column and pixels from the top."""
    widgets: dict[str, Any] = field(default_factory=dict)
    title: str | None = None
    size: tuple[int, int] | None = None
    models: tuple[dict[str, str], ...] = ()
    """Files that ComfyUI offers to download."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One workflow."""

    note: str
    """What it shows and how to use it, in Markdown."""
    nodes: dict[str, Node]
    links: tuple[tuple[str, str], ...]
    """From `node.OUTPUT` to `node.input`."""
    groups: dict[str, tuple[int, int]]
    """Title to the first and last column it spans."""


def demo(row: int = 0) -> dict[str, Node]:
    """The bundled model."""
    return {"demo": Node(type="RFLoadDemo", at=(0, row), size=(300, 90))}


def official(weight_dtype: str = "default", vae: dict[str, str] = VAE) -> dict[str, Node]:
    """Loaders of the published weights."""
    return {
        "model": Node(
            type="RFLoadModel",
            at=(0, 0),
            widgets={"model_name": STUDENT["name"], "weight_dtype": weight_dtype},
            models=(STUDENT,),
        ),
        "clip": Node(
            type="CLIPLoader",
            at=(0, 200),
            widgets={"clip_name": TEXT_ENCODER["name"], "type": "wan"},
            models=(TEXT_ENCODER,),
        ),
        "vae": Node(
            type="VAELoader", at=(0, 400), widgets={"vae_name": vae["name"]}, models=(vae,)
        ),
    }


def text(prompt: str, row: int, column: int = 1) -> Node:
    """A prompt."""
    return Node(type="CLIPTextEncode", at=(column, row), widgets={"text": prompt}, size=(380, 120))


def sampler(column: int = 2, row: int = 0, title: str | None = None, **widgets: Any) -> Node:
    """A Streaming Sampler at the demo's size."""
    small = {"width": 64, "height": 64, "length": 10.0, "seed": 1}
    small |= {"control_after_generate": "fixed"}
    return Node(
        type="RFStreamingSampler",
        at=(column, row),
        widgets=small | widgets,
        title=title,
        size=(380, 620),
    )


def fed(name: str, prompt: str, source: str = "demo") -> tuple[tuple[str, str], ...]:
    """A sampler's model, prompt and VAE."""
    sources = {"demo": ("demo.MODEL", "demo.VAE"), "official": ("model.MODEL", "vae.VAE")}
    model, vae = sources[source]
    return ((model, f"{name}.model"), (prompt, f"{name}.prompt"), (vae, f"{name}.vae"))


DEMO_PROMPT = "a blue square moves up quickly"
DEMO_NEXT = "a cyan circle moves right slowly"

GRAPHS: dict[str, Graph] = {
    "text_to_video_demo": Graph(
        note="## Text to video, no downloads\n\nThe bundled miniature model: coloured shapes that "
        "move, 64x64. Queue it: the video grows while it is made.\n\nPrompts are of the form "
        "**a red circle moves left slowly**: red, green, blue, yellow, purple, cyan; circle, "
        "square, triangle; left, right, up, down; slowly, quickly or nothing.",
        nodes=demo() | {"prompt": text(DEMO_PROMPT, 0), "stream": sampler()},
        links=(("demo.CLIP", "prompt.clip"), *fed("stream", "prompt.CONDITIONING")),
        groups={"Model": (0, 0), "Prompt": (1, 1), "Stream": (2, 2)},
    ),
    "text_to_video": Graph(
        note="## Text to video with the published weights\n\nComfyUI offers the three downloads "
        "(student 2.8 GB, text encoder 6.7 GB, VAE 0.25 GB). The student was trained at 832x480. "
        "The video is written to **output/video** while it is made; interrupting keeps what is "
        "there.",
        nodes=official()
        | {
            "prompt": text(PANDA, 0),
            "stream": sampler(width=832, height=480),
        },
        links=(("clip.CLIP", "prompt.clip"), *fed("stream", "prompt.CONDITIONING", "official")),
        groups={"Models": (0, 0), "Prompt": (1, 1), "Stream": (2, 2)},
    ),
    "prompt_switch": Graph(
        note="## Change the prompt on the way\n\nEach **Prompt Switch** adds one prompt. The first "
        "is what the video starts with. **recache** takes hold at once and keeps the picture "
        "continuous, **soft** is slow, **blend** mixes the prompts over some chunks, **cut** is a "
        "clean cut.",
        nodes=demo()
        | {
            "first": text(DEMO_PROMPT, 0),
            "second": text(DEMO_NEXT, 290),
            "third": text("a red triangle moves down", 580),
            "start": Node(type="RFPromptSwitch", at=(2, 0)),
            "then": Node(
                type="RFPromptSwitch", at=(2, 290), widgets={"at": 4.0, "mode": "recache"}
            ),
            "last": Node(type="RFPromptSwitch", at=(2, 580), widgets={"at": 8.0, "mode": "cut"}),
            "stream": sampler(column=3, length=12.0),
        },
        links=(
            ("demo.CLIP", "first.clip"),
            ("demo.CLIP", "second.clip"),
            ("demo.CLIP", "third.clip"),
            ("first.CONDITIONING", "start.conditioning"),
            ("second.CONDITIONING", "then.conditioning"),
            ("third.CONDITIONING", "last.conditioning"),
            ("start.timeline", "then.timeline"),
            ("then.timeline", "last.timeline"),
            *fed("stream", "last.timeline"),
        ),
        groups={"Model": (0, 0), "Prompts": (1, 2), "Stream": (3, 3)},
    ),
    "prompt_schedule": Graph(
        note="## A whole script in one text\n\nOne line a prompt: a time, how to go over, the "
        "text. The node shows the chunk each prompt really starts at.",
        nodes=demo()
        | {
            "script": Node(
                type="RFPromptSchedule",
                at=(1, 0),
                widgets={
                    "text": f"0s: {DEMO_PROMPT}\n5s [recache]: {DEMO_NEXT}\n"
                    "+4s [blend 3 slerp]: a yellow square moves left\n"
                    "c18 [cut]: a purple triangle moves down quickly",
                    "length": 16.0,
                },
                size=(400, 420),
            ),
            "stream": sampler(length=16.0),
        },
        links=(("demo.CLIP", "script.clip"), *fed("stream", "script.timeline")),
        groups={"Model": (0, 0), "Script": (1, 1), "Stream": (2, 2)},
    ),
    "sink_presets_compared": Graph(
        note="## What the EMA-Sink does\n\nThe same prompt and seed with four sinks, 30 seconds "
        "each. Compare the last seconds: how steady colours stay, how freely things move.",
        nodes=demo()
        | {"prompt": text("a red circle moves right", 180, column=0)}
        | {
            f"sink{i}": Node(type="RFSinkConfig", at=(1 + i, 0), widgets={"preset": preset})
            for i, preset in enumerate(("Published", "Long", "Static sink", "No sink"))
        }
        | {
            f"stream{i}": sampler(
                column=1 + i,
                row=260,
                title=preset,
                length=30.0,
                filename_prefix=f"video/sink_{preset.lower().replace(' ', '_')}",
            )
            for i, preset in enumerate(("Published", "Long", "Static sink", "No sink"))
        },
        links=(
            ("demo.CLIP", "prompt.clip"),
            *(link for i in range(4) for link in fed(f"stream{i}", "prompt.CONDITIONING")),
            *((f"sink{i}.sink", f"stream{i}.sink") for i in range(4)),
        ),
        groups={"Model and prompt": (0, 0), "Four sinks, four streams": (1, 4)},
    ),
    "start_from_image": Graph(
        note="## Start from an image (experimental)\n\nThe student was trained on text alone: it "
        "takes the picture as the first chunk of its past and goes on from there. Here the picture "
        "is the last image of another stream; replace it by **Load Image**.",
        nodes=demo()
        | {
            "prompt": text("a green square moves left slowly", 0),
            "picture": sampler(title="A picture", length=1.0, keep_images=1, row=0),
            "stream": sampler(column=3, title="From the picture", seed=2),
        },
        links=(
            ("demo.CLIP", "prompt.clip"),
            *fed("picture", "prompt.CONDITIONING"),
            *fed("stream", "prompt.CONDITIONING"),
            ("picture.IMAGE", "stream.start_image"),
        ),
        groups={"Model": (0, 0), "Prompt": (1, 1), "Picture": (2, 2), "Stream": (3, 3)},
    ),
    "continue_from_state": Graph(
        note="## Go on from a state\n\nThe state of a stream is a file of a few MB in "
        "**output/stream_states**. **Load Stream State** reads it tomorrow; here it is passed on "
        "at once. Connect it to several samplers to branch.",
        nodes=demo()
        | {
            "before": text(DEMO_PROMPT, 0),
            "after": text(DEMO_NEXT, 180),
            "first": sampler(title="First part", length=5.0),
            "save": Node(type="RFSaveState", at=(3, 700), widgets={"name": "first_part"}),
            "second": sampler(column=3, title="Second part", length=5.0),
        },
        links=(
            ("demo.CLIP", "before.clip"),
            ("demo.CLIP", "after.clip"),
            *fed("first", "before.CONDITIONING"),
            *fed("second", "after.CONDITIONING"),
            ("first.state", "save.state"),
            ("save.state", "second.state"),
        ),
        groups={"Model": (0, 0), "Prompts": (1, 1), "First": (2, 2), "Second": (3, 3)},
    ),
    "continue_from_latent": Graph(
        note="## Go on from latents\n\nThe last latents of one run are the past of the next; no "
        "decoding and encoding in between. The new video begins with them.",
        nodes=demo()
        | {
            "before": text(DEMO_PROMPT, 0),
            "after": text(DEMO_NEXT, 180),
            "first": sampler(title="First part", length=5.0, keep_latents=6),
            "second": sampler(column=3, title="Second part", length=6.0, seed=2),
        },
        links=(
            ("demo.CLIP", "before.clip"),
            ("demo.CLIP", "after.clip"),
            *fed("first", "before.CONDITIONING"),
            *fed("second", "after.CONDITIONING"),
            ("first.LATENT", "second.start_latent"),
        ),
        groups={"Model": (0, 0), "Prompts": (1, 1), "First": (2, 2), "Second": (3, 3)},
    ),
    "continue_from_video": Graph(
        note="## Go on from the last frames of any video\n\n**Get Video Components** gives the "
        "images of a video; the sampler takes the last of them that its window holds. Replace the "
        "first sampler by **Load Video**. Experimental, as every start from pictures.",
        nodes=demo()
        | {
            "prompt": text(DEMO_PROMPT, 0),
            "first": sampler(title="Any video", length=3.0),
            "parts": Node(type="GetVideoComponents", at=(3, 0)),
            "second": sampler(column=4, title="Goes on", length=6.0, seed=2),
        },
        links=(
            ("demo.CLIP", "prompt.clip"),
            *fed("first", "prompt.CONDITIONING"),
            *fed("second", "prompt.CONDITIONING"),
            ("first.VIDEO", "parts.video"),
            ("parts.images", "second.start_image"),
        ),
        groups={"Model": (0, 0), "Prompt": (1, 1), "Video": (2, 3), "Goes on": (4, 4)},
    ),
    "lora": Graph(
        note="## LoRA\n\nLoRAs for Wan 2.1 T2V 1.3B work as on any model. Strength near 1 suits "
        "those trained on a causal student; those of the base model often want less.",
        nodes=official()
        | {
            "style": Node(
                type="LoraLoaderModelOnly", at=(1, 0), widgets={"lora_name": "style.safetensors"}
            ),
            "prompt": text(PANDA, 180),
            "stream": sampler(width=832, height=480),
        },
        links=(
            ("model.MODEL", "style.model"),
            ("clip.CLIP", "prompt.clip"),
            ("style.MODEL", "stream.model"),
            ("prompt.CONDITIONING", "stream.prompt"),
            ("vae.VAE", "stream.vae"),
        ),
        groups={"Models": (0, 0), "LoRA and prompt": (1, 1), "Stream": (2, 2)},
    ),
    "low_vram_taehv": Graph(
        note="## Small cards\n\nWeights in fp8 and TAEHV in place of the Wan VAE. If it still does "
        "not fit, lower width and height first: the cache follows their product.",
        nodes=official("float8_e4m3fn", TAEHV)
        | {
            "script": Node(
                type="RFPromptSchedule",
                at=(1, 0),
                widgets={"text": f"0s: {PANDA}\n6s: {PANDA_SITS}", "length": 12.0},
                size=(400, 380),
            ),
            "stream": sampler(width=832, height=480, length=12.0),
        },
        links=(("clip.CLIP", "script.clip"), *fed("stream", "script.timeline", "official")),
        groups={"Models": (0, 0), "Script": (1, 1), "Stream": (2, 2)},
    ),
}
