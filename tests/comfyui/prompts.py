"""Small prompts in ComfyUI's API format."""

from __future__ import annotations

from typing import Any

Prompt = dict[str, Any]


def demo_prompt(**sampler: Any) -> Prompt:
    """The demo, one prompt, to a video of about a second."""
    values: dict[str, Any] = {
        "model": ["demo", 0],
        "prompt": ["text", 0],
        "vae": ["demo", 2],
        "width": 64,
        "height": 64,
        "length": 2,
        "unit": "chunks",
        "seed": 7,
        "steps": 4,
    }
    values |= sampler
    return {
        "demo": {"class_type": "RFLoadDemo", "inputs": {}},
        "text": {
            "class_type": "CLIPTextEncode",
            "inputs": {"clip": ["demo", 1], "text": "a blue square moves up quickly"},
        },
        "stream": {
            "class_type": "RFStreamingSampler",
            "inputs": {key: value for key, value in values.items() if value is not None},
        },
    }


def with_node(prompt: Prompt, node: str, kind: str, /, **inputs: Any) -> Prompt:
    """The prompt with one more node."""
    return prompt | {node: {"class_type": kind, "inputs": inputs}}
