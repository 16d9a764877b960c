"""The workflows of the pack, as data: what `make_workflows.py` has the real frontend draw and save.

A graph is nodes by name, each with its type, column and widget values; links run from an output's
name to an input's. `layout.py` finds their places.
"""

# ruff: noqa: RUF001  (Chinese punctuation)

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import VIDEO

WORKFLOWS = Path(__file__).parents[2] / "workflows"

PANDA = "a panda walks through a bamboo forest, sunlight between the leaves, steady camera"
PANDA_SITS = "the panda sits down and eats bamboo, sunlight between the leaves, steady camera"
OWN_VIDEO = "choose your own video"
OWN_LORA = "choose your own LoRA"
"""No file: ComfyUI says that it is not in the list, and the artist chooses."""

HUB = "https://huggingface.co"
COMFY_ORG = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
STUDENT = {
    "name": "rewardforcing.pt",
    "url": f"{HUB}/JaydenLu666/Reward-Forcing-T2V-1.3B/resolve/main/rewardforcing.pt",
    "directory": "diffusion_models",
}
OTHER_STUDENT = {
    "name": "self_forcing_dmd.pt",
    "url": f"{HUB}/gdhe17/Self-Forcing/resolve/main/checkpoints/self_forcing_dmd.pt",
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
VACE = {
    "name": "wan2.1_vace_1.3B_fp16.safetensors",
    "url": f"{COMFY_ORG}/diffusion_models/wan2.1_vace_1.3B_fp16.safetensors",
    "directory": "diffusion_models",
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
    """Column, and pixels from the top at least."""
    widgets: dict[str, Any] = field(default_factory=dict)
    title: str | None = None
    size: tuple[int, int] | None = None
    """At least."""
    models: tuple[dict[str, str], ...] = ()
    """Files that ComfyUI offers to download."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One workflow."""

    title: str
    """Its file's name, which is all that the template browser shows of it."""
    note: str
    """What it shows and how to use it, in Markdown."""
    chinese: str
    """The same in Chinese."""
    nodes: dict[str, Node]
    links: tuple[tuple[str, str], ...]
    """From `node.OUTPUT` to `node.input`."""
    groups: dict[str, tuple[int, int]]
    """Title to the first and last column it spans."""
    note_beside: bool = False
    """Whether the note stands left of the nodes, where a tall one wants all of the height."""
    compared: bool = False
    """Whether its videos are shown side by side, and not one after the other."""
    app: tuple[tuple[str, str], ...] = ()
    """Node types and their widgets that App Mode shows."""

    @property
    def path(self) -> Path:
        """Its file."""
        return WORKFLOWS / f"{self.title}.json"


def demo(row: int = 0) -> dict[str, Node]:
    """The bundled model."""
    return {"demo": Node(type="RFLoadDemo", at=(0, row))}


def official(
    weight_dtype: str = "default", vae: dict[str, str] = VAE, student: dict[str, str] = STUDENT
) -> dict[str, Node]:
    """Loaders of the published weights."""
    return {
        "model": Node(
            type="RFLoadModel",
            at=(0, 0),
            widgets={"model_name": student["name"], "weight_dtype": weight_dtype},
            size=(340, 0),
            models=(student,),
        ),
        "vae": Node(
            type="VAELoader",
            at=(0, 1),
            widgets={"vae_name": vae["name"]},
            size=(340, 0),
            models=(vae,),
        ),
        "clip": Node(
            type="CLIPLoader",
            at=(0, 2),
            widgets={"clip_name": TEXT_ENCODER["name"], "type": "wan"},
            size=(340, 0),
            models=(TEXT_ENCODER,),
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
        size=(380, 0),
    )


def live(**widgets: Any) -> Node:
    """A Live Stream, by default at the demo's size; each run is another."""
    small = {"width": 64, "height": 64, "seed": 1, "control_after_generate": "randomize"}
    return Node(type="RFLiveStream", at=(1, 0), widgets=small | widgets, size=(440, 0))


def fed(name: str, prompt: str, source: str = "demo") -> tuple[tuple[str, str], ...]:
    """A sampler's model, prompt and VAE."""
    sources = {"demo": ("demo.MODEL", "demo.VAE"), "official": ("model.MODEL", "vae.VAE")}
    model, vae = sources[source]
    return ((model, f"{name}.model"), (prompt, f"{name}.prompt"), (vae, f"{name}.vae"))


DEMO_PROMPT = "a blue square moves up quickly"
DEMO_NEXT = "a cyan circle moves right slowly"
RESTYLED = "a red circle moves up quickly"
COLOURED = "a red shape moves"
STATUE = "a bronze statue comes to life and walks through a museum, warm light, steady camera"
SHOWN = {
    COLOURED: "a red circle moves right slowly",
    "a blue shape moves": "a blue circle moves up quickly",
}
"""What is seen where a prompt names a colour alone and outlines say the rest."""
SINKS = ("Published", "Long", "Static sink", "No sink")

MODEL, MODELS, STREAM = "Model · 模型", "Models · 模型", "Stream · 视频流"
PROMPT, PROMPTS, SCRIPT = "Prompt · 提示词", "Prompts · 提示词", "Prompt schedule · 提示词调度"
LIVE = "Live · 实时"
CLIP = "Clip · 片段"
FIRST, SECOND = "First part · 第一段", "Second part · 第二段"

GRAPHS: dict[str, Graph] = {
    "text_to_video_demo": Graph(
        title="01 Demo, no downloads",
        note="## Text to video, no downloads\n\nThe bundled miniature model: coloured shapes that "
        "move, 64x64. Queue it: the video grows while it is made.\n\nPrompts are of the form "
        "**a red circle moves left slowly**: red, green, blue, yellow, purple, cyan; circle, "
        "square, triangle; left, right, up, down; slowly, quickly or nothing.",
        chinese="文生视频，无需下载：内置的微型模型，生成 64x64 的移动彩色图形。点击运行，"
        "视频边生成边显示。"
        "提示词的格式为 **a red circle moves left slowly**：颜色 red、green、blue、yellow、"
        "purple、cyan；"
        "形状 circle、square、triangle；方向 left、right、up、down；速度 slowly、"
        "quickly 或不写。",
        nodes=demo() | {"prompt": text(DEMO_PROMPT, 0), "stream": sampler()},
        links=(("demo.CLIP", "prompt.clip"), *fed("stream", "prompt.CONDITIONING")),
        groups={MODEL: (0, 0), PROMPT: (1, 1), STREAM: (2, 2)},
        app=(
            ("CLIPTextEncode", "text"),
            ("RFStreamingSampler", "length"),
            ("RFStreamingSampler", "seed"),
        ),
    ),
    "text_to_video": Graph(
        title="02 Text to video",
        note="## Text to video with the published weights\n\nComfyUI offers the three downloads "
        "(student 2.8 GB, text encoder 6.7 GB, VAE 0.25 GB). The student was trained at 832x480. "
        "The video is written to **output/video** while it is made; interrupting keeps what is "
        "there.",
        chinese="使用官方权重的文生视频：ComfyUI 会提示下载三个文件（学生模型 2.8 GB、"
        "文本编码器 6.7 GB、"
        "VAE 0.25 GB）。模型在 832x480 下训练。视频边生成边写入 **output/video**；"
        "中断时保留已生成的部分。",
        nodes=official()
        | {
            "prompt": text(PANDA, 0),
            "stream": sampler(width=832, height=480),
        },
        links=(("clip.CLIP", "prompt.clip"), *fed("stream", "prompt.CONDITIONING", "official")),
        groups={MODELS: (0, 0), PROMPT: (1, 1), STREAM: (2, 2)},
    ),
    "prompt_switch": Graph(
        title="03 Prompt switch",
        note="## Change the prompt on the way\n\nEach **Prompt Switch** adds one prompt. The first "
        "is what the video starts with. **recache** takes hold at once and keeps the picture "
        "continuous, **soft** is slow, **blend** mixes the prompts over some chunks, **cut** is a "
        "clean cut.",
        chinese="中途更换提示词：每个 **Prompt Switch** 添加一条提示词，第一条是视频的开头。"
        "**recache** 立即生效且画面连续，**soft** 变化缓慢，**blend** 在若干块内混合提示词，"
        "**cut** 为硬切。",
        nodes=demo()
        | {
            "first": text(DEMO_PROMPT, 100),
            "start": Node(type="RFPromptSwitch", at=(2, 100)),
            "second": text(DEMO_NEXT, 380),
            "then": Node(
                type="RFPromptSwitch",
                at=(3, 380),
                widgets={"at": 4.0, "mode": "recache"},
            ),
            "third": text("a red triangle moves down", 660),
            "last": Node(
                type="RFPromptSwitch",
                at=(4, 660),
                widgets={"at": 8.0, "mode": "cut"},
            ),
            "stream": sampler(column=5, length=12.0),
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
        groups={MODEL: (0, 0), PROMPTS: (1, 4), STREAM: (5, 5)},
    ),
    "prompt_schedule": Graph(
        title="04 Prompt schedule",
        note="## A whole script in one text\n\nOne line a prompt: a time, how to go over, the "
        "text. The node shows the chunk each prompt really starts at.",
        chinese="用一段文本写完整脚本：每行一条提示词，依次为时间、过渡方式、内容。"
        "节点会显示每条提示词实际开始的块。",
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
                size=(440, 300),
            ),
            "stream": sampler(length=16.0),
        },
        links=(("demo.CLIP", "script.clip"), *fed("stream", "script.timeline")),
        groups={MODEL: (0, 0), SCRIPT: (1, 1), STREAM: (2, 2)},
    ),
    "sink_presets_compared": Graph(
        title="05 EMA-Sink presets compared",
        note="## What the EMA-Sink does\n\nThe same prompt and seed with four sinks, 30 seconds "
        "each. Compare the last seconds: how steady colours stay, how freely things move.",
        chinese="EMA-Sink 的作用：相同的提示词和种子，四种 sink 设置，各 30 秒。比较最后几秒："
        "颜色是否稳定，运动是否自由。",
        nodes=demo()
        | {"prompt": text("a red circle moves right", 0)}
        | {
            f"sink{i}": Node(
                type="RFSinkConfig",
                at=(2 + 2 * i, 0),
                widgets={"preset": preset},
            )
            for i, preset in enumerate(SINKS)
        }
        | {
            f"stream{i}": sampler(
                column=3 + 2 * i,
                title=preset,
                length=30.0,
                filename_prefix=f"video/sink_{preset.lower().replace(' ', '_')}",
            )
            for i, preset in enumerate(SINKS)
        },
        links=(
            ("demo.CLIP", "prompt.clip"),
            *(link for i in range(4) for link in fed(f"stream{i}", "prompt.CONDITIONING")),
            *((f"sink{i}.sink", f"stream{i}.sink") for i in range(4)),
        ),
        groups={MODEL: (0, 0), PROMPT: (1, 1), "Four sinks · 四种 sink": (2, 9)},
        compared=True,
    ),
    "start_from_image": Graph(
        title="06 Start from an image",
        note="## Start from an image (experimental)\n\nThe student was trained on text alone: it "
        "takes the picture as the first chunk of its past and goes on from there. Here the picture "
        "is the last image of another stream; replace it by **Load Image**.",
        chinese="从图像开始（实验性）：模型只用文本训练，它把图像当作已有的第一块并继续生成。"
        "这里的图像是另一段视频的最后一帧；可换成 **Load Image**（加载图像）。",
        nodes=demo(150)
        | {
            "prompt": text("a green square moves left slowly", 0),
            "picture": sampler(title="A picture", length=1.0, keep_images=1, row=250),
            "stream": sampler(column=3, title="From the picture", seed=2, row=150),
        },
        links=(
            ("demo.CLIP", "prompt.clip"),
            *fed("picture", "prompt.CONDITIONING"),
            *fed("stream", "prompt.CONDITIONING"),
            ("picture.IMAGE", "stream.start_image"),
        ),
        groups={MODEL: (0, 0), PROMPT: (1, 1), "Picture · 图像": (2, 2), STREAM: (3, 3)},
    ),
    "continue_from_state": Graph(
        title="07 Continue from a state",
        note="## Go on from a state\n\nThe state of a stream is a file of a few MB in "
        "**output/stream_states**. **Load Stream State** reads it tomorrow; here it is passed on "
        "at once. Connect it to several samplers to branch.",
        chinese="从状态继续：视频流的状态是 **output/stream_states** 中几 MB 的文件，"
        "之后可用 **Load Stream State** 读取；这里直接传给下一个采样器。连接多个采样器即可分支。",
        nodes=demo(150)
        | {
            "after": text(DEMO_NEXT, 0),
            "before": text(DEMO_PROMPT, 250),
            "first": sampler(title="First part", length=5.0, row=250),
            "save": Node(type="RFSaveState", at=(3, 350), widgets={"name": "first_part"}),
            "second": sampler(column=4, title="Second part", length=5.0, row=150),
        },
        links=(
            ("demo.CLIP", "before.clip"),
            ("demo.CLIP", "after.clip"),
            *fed("first", "before.CONDITIONING"),
            *fed("second", "after.CONDITIONING"),
            ("first.state", "save.state"),
            ("save.state", "second.state"),
        ),
        groups={MODEL: (0, 0), PROMPTS: (1, 1), FIRST: (2, 3), SECOND: (4, 4)},
    ),
    "continue_from_latent": Graph(
        title="08 Continue from latents",
        note="## Go on from latents\n\nThe last latents of one run are the past of the next; no "
        "decoding and encoding in between. The new video begins with them.",
        chinese="从潜空间（latent）继续：前一次运行的最后几帧 latent 作为下一次的历史，"
        "中间无需解码和编码。"
        "新视频从这些帧开始。",
        nodes=demo(150)
        | {
            "after": text(DEMO_NEXT, 0),
            "before": text(DEMO_PROMPT, 250),
            "first": sampler(title="First part", length=5.0, keep_latents=6, row=250),
            "second": sampler(column=3, title="Second part", length=6.0, seed=2, row=150),
        },
        links=(
            ("demo.CLIP", "before.clip"),
            ("demo.CLIP", "after.clip"),
            *fed("first", "before.CONDITIONING"),
            *fed("second", "after.CONDITIONING"),
            ("first.LATENT", "second.start_latent"),
        ),
        groups={MODEL: (0, 0), PROMPTS: (1, 1), FIRST: (2, 2), SECOND: (3, 3)},
    ),
    "continue_from_video": Graph(
        title="09 Continue from a video",
        note="## Go on from the last frames of any video\n\n**Get Video Components** gives the "
        "images of a video; the sampler takes the last of them that its window holds. Replace the "
        "first sampler by **Load Video**. Experimental, as every start from pictures.",
        chinese="从任意视频的最后几帧继续：**Get Video Components**（获取视频组件）"
        "输出视频的图像，"
        "采样器取其窗口能容纳的最后几帧。可把第一个采样器换成 **Load Video**（加载视频）。"
        "与所有从图像开始的方式一样，属实验性功能。",
        nodes=demo(150)
        | {
            "prompt": text(DEMO_PROMPT, 0),
            "first": sampler(title="Any video", length=3.0, row=250),
            "parts": Node(type="GetVideoComponents", at=(3, 300)),
            "second": sampler(column=4, title="Goes on", length=6.0, seed=2, row=150),
        },
        links=(
            ("demo.CLIP", "prompt.clip"),
            *fed("first", "prompt.CONDITIONING"),
            *fed("second", "prompt.CONDITIONING"),
            ("first.VIDEO", "parts.video"),
            ("parts.images", "second.start_image"),
        ),
        groups={MODEL: (0, 0), PROMPT: (1, 1), "Video · 视频": (2, 3), "Goes on · 续写": (4, 4)},
    ),
    "lora": Graph(
        title="10 LoRA",
        note="## LoRA\n\n**Choose your own LoRA** in the loader: any for Wan 2.1 T2V 1.3B works, "
        "whoever trained it. Strength near 1 suits those trained on a causal student; those of the "
        "base model often want less.",
        chinese="LoRA：请在加载器中**选择你自己的 LoRA**，"
        "适用于 Wan 2.1 T2V 1.3B 的 LoRA 均可使用，无论由哪种训练器保存。"
        "在因果学生模型上训练的 LoRA 强度约为 1；基础模型的 LoRA 通常需要更低的强度。",
        nodes=official()
        | {
            "style": Node(
                type="RFLoadLoRA",
                at=(1, 0),
                title="Choose your own LoRA",
                widgets={"lora_name": OWN_LORA},
                size=(380, 0),
            ),
            "prompt": text(PANDA, 1),
            "stream": sampler(width=832, height=480),
        },
        links=(
            ("model.MODEL", "style.model"),
            ("clip.CLIP", "prompt.clip"),
            ("style.MODEL", "stream.model"),
            ("prompt.CONDITIONING", "stream.prompt"),
            ("vae.VAE", "stream.vae"),
        ),
        groups={MODELS: (0, 0), "LoRA and prompt · LoRA 与提示词": (1, 1), STREAM: (2, 2)},
    ),
    "low_vram_taehv": Graph(
        title="11 Low VRAM, TAEHV",
        note="## Small cards\n\nWeights in fp8 and TAEHV in place of the Wan VAE. If it still does "
        "not fit, lower width and height first: the cache follows their product.",
        chinese="小显存：权重使用 fp8，用 TAEHV 代替 Wan VAE。若显存仍不足，先降低宽度和高度："
        "缓存大小与两者的乘积成正比。",
        nodes=official("float8_e4m3fn", TAEHV)
        | {
            "script": Node(
                type="RFPromptSchedule",
                at=(1, 0),
                widgets={"text": f"0s: {PANDA}\n6s: {PANDA_SITS}", "length": 12.0},
                size=(440, 300),
            ),
            "stream": sampler(width=832, height=480, length=12.0),
        },
        links=(("clip.CLIP", "script.clip"), *fed("stream", "script.timeline", "official")),
        groups={MODELS: (0, 0), SCRIPT: (1, 1), STREAM: (2, 2)},
    ),
    "live_demo": Graph(
        title="12 Live demo, no downloads",
        note="## Steer the video while it plays\n\nQueue it, then type another prompt on the node "
        "and press **Ctrl-Enter**: it takes hold with the next chunk, less than a second later. "
        "Pause, cut, or click into the strip of time to go back and try another way; every way is "
        "a file of its own. **Stop** ends it and keeps all.\n\nPrompts are of the form **a red "
        "circle moves left slowly**.",
        chinese="边播放边操控视频：点击运行后，在节点上输入新的提示词并按 **Ctrl-Enter**，"
        "不到一秒后从下一个块开始生效。可以暂停、硬切，或点击时间条回到过去另走一条分支，"
        "每条分支都有自己的文件。**Stop** 结束并保留全部内容。"
        "提示词的格式为 **a red circle moves left slowly**。",
        nodes=demo() | {"stream": live()},
        links=(
            ("demo.CLIP", "stream.clip"),
            ("demo.MODEL", "stream.model"),
            ("demo.VAE", "stream.vae"),
        ),
        groups={MODEL: (0, 0), LIVE: (1, 1)},
        note_beside=True,
        app=(
            ("RFLiveStream", "live"),
            ("RFLiveStream", "text"),
            ("RFLiveStream", "max_seconds"),
        ),
    ),
    "live": Graph(
        title="13 Live",
        note="## Live with the published weights\n\nAs the live demo, at 832x480. TAEHV decodes "
        "many times faster than the Wan VAE and is what live wants. Prompts are encoded while it "
        "streams; the text encoder shares the card with the student where both fit.",
        chinese="使用官方权重的实时视频流，832x480，操作与实时演示相同。TAEHV 的解码速度比 "
        "Wan VAE 快得多，适合实时使用。提示词在播放时编码；"
        "显存足够时文本编码器与学生模型同时驻留。",
        nodes=official(vae=TAEHV) | {"stream": live(text=PANDA, width=832, height=480)},
        links=(
            ("model.MODEL", "stream.model"),
            ("clip.CLIP", "stream.clip"),
            ("vae.VAE", "stream.vae"),
        ),
        groups={MODELS: (0, 0), LIVE: (1, 1)},
        note_beside=True,
    ),
    "any_student": Graph(
        title="14 Any student",
        note="## Students of other projects\n\nSelf-Forcing's as an example (5.7 GB; its "
        "weights are for non-commercial use). **Load RF Model** takes any causal student of "
        "Wan 2.1: Causal-Forcing, LongLive, MemRoPE, Krea Realtime 14B, Rolling Forcing. Leave "
        "**family** at auto: each streams as its authors run it, and the server's log says what "
        "was taken. Where a file does not tell whose it is, choose.\n\nThen what they cannot do: "
        "any length, prompts that change, states to go on from, live. An **EMA-Sink Config** works "
        "on most.",
        chinese="其他项目的学生模型：这里以 Self-Forcing 为例"
        "（5.7 GB；权重仅限非商业用途）。"
        "**Load RF Model** 可加载任何 Wan 2.1 的因果学生模型：Causal-Forcing、LongLive、MemRoPE、"
        "Krea Realtime 14B、Rolling Forcing。**family** 保持 auto 即可："
        "每个模型都按其作者的方式运行，"
        "服务器日志会说明所采用的设置；若文件本身无法判断，请自行选择。"
        "此外还能做到原项目做不到的事：任意时长、中途更换提示词、保存状态并继续、实时操控。"
        "**EMA-Sink Config** 适用于其中大多数模型。",
        nodes=official(student=OTHER_STUDENT)
        | {
            "script": Node(
                type="RFPromptSchedule",
                at=(1, 0),
                widgets={"text": f"0s: {PANDA}\n6s: {PANDA_SITS}", "length": 12.0},
                size=(440, 300),
            ),
            "stream": sampler(width=832, height=480, length=12.0),
        },
        links=(("clip.CLIP", "script.clip"), *fed("stream", "script.timeline", "official")),
        groups={MODELS: (0, 0), SCRIPT: (1, 1), STREAM: (2, 2)},
    ),
    "video_to_video_demo": Graph(
        title="15 Video to video, no downloads",
        note="## One video made into another\n\nThe second sampler follows the first one's video "
        "image by image: motion stays, colour and shape come of its own prompt. **strength** says "
        "how much is made anew: 0 is the source itself, 1 the prompt alone; try 0.2 and 0.7. Put "
        "**Load Video** in place of the first sampler. A video is read as it is needed, however "
        "long it is.\n\nA prompt that speaks of the motion that is there helps.",
        chinese="把一段视频变成另一段：第二个采样器逐图跟随第一个的视频：运动保留，"
        "颜色和形状来自它自己的提示词。**strength** 决定有多少被重新生成："
        "0 为源本身，1 为仅按提示词；可试 0.2 和 0.7。可把第一个采样器换成 "
        "**Load Video**（加载视频）。"
        "视频无论多长都按需读取。提示词若描述已有的运动，效果更好。",
        nodes=demo(150)
        | {
            "after": text(RESTYLED, 0),
            "before": text(DEMO_PROMPT, 250),
            "clip": sampler(title="A clip", length=6.0, row=250),
            "stream": sampler(column=3, title="Follows the clip", length=6.0, seed=2, row=150),
        },
        links=(
            ("demo.CLIP", "before.clip"),
            ("demo.CLIP", "after.clip"),
            *fed("clip", "before.CONDITIONING"),
            *fed("stream", "after.CONDITIONING"),
            ("clip.VIDEO", "stream.source"),
        ),
        groups={MODEL: (0, 0), PROMPTS: (1, 1), CLIP: (2, 2), STREAM: (3, 3)},
    ),
    "video_to_video": Graph(
        title="16 Video to video",
        note="## Restyle a video with the published weights\n\nChoose your own in **Load Video**. "
        "The stream follows it image by image, at its speed, and ends with it: motion and layout "
        "stay, the look comes of the prompt. Lower **strength** to keep more of it. Write what is "
        "to be seen, its motion too. A clip of another shape is cut to the picture, or shown whole "
        "with **source_fit** letterbox.",
        chinese="使用官方权重改变视频的风格：在 **Load Video**（加载视频）中选择你自己的视频。"
        "视频流逐图跟随它，速度不变，并随之结束：运动和布局保留，外观来自提示词。"
        "降低 **strength** 可保留更多原貌。请描述要看到的内容，包括其运动。"
        "形状不同的片段会被裁切；**source_fit** 设为 letterbox 则完整显示。",
        nodes=official()
        | {
            "file": Node(
                type="LoadVideo",
                at=(1, 250),
                title="Choose your own video",
                widgets={"file": OWN_VIDEO},
                size=(340, 0),
            ),
            "prompt": text(PANDA, 0),
            "stream": sampler(width=832, height=480, length=60.0),
        },
        links=(
            ("clip.CLIP", "prompt.clip"),
            *fed("stream", "prompt.CONDITIONING", "official"),
            ("file.VIDEO", "stream.source"),
        ),
        groups={MODELS: (0, 0), "Prompt and video · 提示词与视频": (1, 1), STREAM: (2, 2)},
    ),
    "control_demo": Graph(
        title="17 Control, no downloads",
        note="## Outlines drive, the prompt colours\n\n**Detect Edges (Canny)** draws the outlines "
        "of the first sampler's video. **Load RF Control** puts a small VACE beside the model, "
        "which follows them: shape and motion are theirs, the colour comes of the prompt. Lower "
        "**strength** on **Control Video** to follow them less; a **mask** there keeps what it is "
        "black on. Prompts are of the form **a red shape moves**.",
        chinese="轮廓决定形状和运动，提示词决定颜色："
        "**Detect Edges (Canny)** 画出第一个采样器视频的轮廓，"
        "**加载 RF 控制** 在模型旁加上一个小型 VACE 来跟随它们。"
        "降低 **控制视频** 的强度可减少跟随；那里的 **遮罩** 保留其黑色部分。"
        "提示词的格式为 **a red shape moves**。",
        nodes={
            "source": Node(type="RFLoadDemo", at=(0, 400)),
            "before": text(DEMO_NEXT, 400),
            "clip": sampler(title="A clip", length=6.0, keep_images=-1, row=300),
            "demo": Node(type="RFLoadDemo", at=(4, 0)),
            "edges": Node(
                type="Canny",
                at=(3, 500),
                widgets={"low_threshold": 0.1, "high_threshold": 0.2},
            ),
            "network": Node(
                type="RFLoadControl",
                at=(5, 0),
                widgets={"control_name": "demo (bundled)"},
                size=(380, 0),
            ),
            "after": text(COLOURED, 250, column=5),
            "lines": Node(
                type="Morphology",
                at=(4, 500),
                title="Thicker lines",
                widgets={"operation": "dilate", "kernel_size": 3},
            ),
            "control": Node(type="RFControlVideo", at=(5, 500), size=(380, 0)),
            "stream": sampler(column=6, title="Follows the outlines", length=6.0, seed=2),
        },
        links=(
            ("source.CLIP", "before.clip"),
            ("source.MODEL", "clip.model"),
            ("before.CONDITIONING", "clip.prompt"),
            ("source.VAE", "clip.vae"),
            ("demo.CLIP", "after.clip"),
            ("demo.MODEL", "network.model"),
            ("clip.IMAGE", "edges.image"),
            ("edges.IMAGE", "lines.image"),
            ("lines.IMAGE", "control.control"),
            ("network.MODEL", "stream.model"),
            ("after.CONDITIONING", "stream.prompt"),
            ("demo.VAE", "stream.vae"),
            ("control.control", "stream.control"),
        ),
        groups={CLIP: (0, 2), "Control · 控制": (3, 5), STREAM: (6, 6)},
    ),
    "control": Graph(
        title="18 Control",
        note="## Follow the outlines of a video with the published weights\n\nChoose your own in "
        "**Load Video**. Of **Wan 2.1 VACE 1.3B** (a download of 4.3 GB) its control is read, and "
        "stays beside the student. **Detect Edges (Canny)** draws outlines; depth, pose or "
        "sketches do as well, an image for each of the video's, 16 a second. The images of the "
        "whole clip are in RAM: **Trim Video** shortens a long one. Pictures of what is to appear "
        "go to **reference**.",
        chinese="使用官方权重跟随视频的轮廓："
        "在 **Load Video**（加载视频）中选择你自己的视频。"
        "只读取 **Wan 2.1 VACE 1.3B**（下载 4.3 GB）中的控制部分，"
        "并放在学生模型旁。**Detect Edges (Canny)** 画出轮廓；深度、姿态或草图也可以，"
        "每帧对应视频的一帧，每秒 16 帧。整段视频的图像都在内存中，"
        "可用 **Trim Video** 缩短。要出现的人物或物体的图片接到 **参考**。",
        nodes=official()
        | {
            "file": Node(
                type="LoadVideo",
                at=(0, 600),
                title="Choose your own video",
                widgets={"file": OWN_VIDEO},
                size=(340, 0),
            ),
            "network": Node(
                type="RFLoadControl",
                at=(1, 0),
                widgets={"control_name": VACE["name"]},
                size=(380, 0),
                models=(VACE,),
            ),
            "prompt": text(STATUE, 250),
            "parts": Node(type="GetVideoComponents", at=(1, 600)),
            "edges": Node(
                type="Canny",
                at=(2, 600),
                widgets={"low_threshold": 0.1, "high_threshold": 0.2},
            ),
            "lines": Node(
                type="Morphology",
                at=(3, 600),
                title="Thicker lines",
                widgets={"operation": "dilate", "kernel_size": 3},
            ),
            "control": Node(type="RFControlVideo", at=(4, 600), size=(300, 0)),
            "stream": sampler(column=5, width=832, height=480, length=6.0),
        },
        links=(
            ("clip.CLIP", "prompt.clip"),
            ("model.MODEL", "network.model"),
            ("file.VIDEO", "parts.video"),
            ("parts.images", "edges.image"),
            ("edges.IMAGE", "lines.image"),
            ("lines.IMAGE", "control.control"),
            ("network.MODEL", "stream.model"),
            ("prompt.CONDITIONING", "stream.prompt"),
            ("vae.VAE", "stream.vae"),
            ("control.control", "stream.control"),
        ),
        groups={
            "Models and video · 模型与视频": (0, 0),
            "Prompt and outlines · 提示词与轮廓": (1, 4),
            STREAM: (5, 5),
        },
    ),
}


STANDS_FOR = {PANDA: DEMO_PROMPT, PANDA_SITS: DEMO_NEXT, STATUE: "a blue shape moves"}
"""Prompts that the demo knows in place of those it does not."""
SAMPLERS = {"RFStreamingSampler": "length", "RFLiveStream": "max_seconds"}
"""Nodes that make videos, and how long."""
LONGEST = 16.0
"""Seconds of video made for a test or a thumbnail."""


def runnable(prompt: dict[str, Any], lora: str) -> dict[str, Any]:
    """A prompt with the demo in place of files that would be downloaded, and short videos."""
    loaders = {"RFLoadModel": 0, "CLIPLoader": 1, "VAELoader": 2}
    swapped = {
        node: loaders[each["class_type"]]
        for node, each in prompt.items()
        if each["class_type"] in loaders
    }
    result: dict[str, Any] = {}
    for node, each in prompt.items():
        if node in swapped:
            continue
        inputs = dict(each["inputs"])
        if each["class_type"] == "LoadVideo":
            inputs["file"] = VIDEO
        if each["class_type"] == "RFLoadControl":
            inputs["control_name"] = "demo (bundled)"
        for name, value in inputs.items():
            if isinstance(value, list) and value[0] in swapped:
                inputs[name] = ["demo", swapped[value[0]]]
            if value == OWN_LORA:
                inputs[name] = lora
            if name == "text" and isinstance(value, str):
                for text, ours in STANDS_FOR.items():
                    inputs[name] = inputs[name].replace(text, ours)
        if each["class_type"] in SAMPLERS:
            length = SAMPLERS[each["class_type"]]
            inputs |= {"width": 64, "height": 64, length: min(inputs[length], LONGEST)}
        result[node] = each | {"inputs": inputs}
    if swapped:
        result["demo"] = {"class_type": "RFLoadDemo", "inputs": {}}
    return result
