"""The pack's English texts, as ComfyUI's locale files hold them, read off its nodes."""

from __future__ import annotations

from typing import Any


def english(object_info: dict[str, Any]) -> dict[str, Any]:
    """locales/en/nodeDefs.json for the server's answer to /object_info."""
    return {
        name: _node(node) for name, node in sorted(object_info.items()) if name.startswith("RF")
    }


def _node(node: dict[str, Any]) -> dict[str, Any]:
    inputs = {}
    for kind in ("required", "optional"):
        for name, (_, *options) in node["input"].get(kind, {}).items():
            tooltip = options[0].get("tooltip") if options else None
            inputs[name] = {"name": name} | ({"tooltip": tooltip} if tooltip else {})
    outputs = {str(i): {"name": name} for i, name in enumerate(node["output_name"])}
    texts = {"display_name": node["display_name"], "description": node["description"]}
    return texts | ({"inputs": inputs} if inputs else {}) | {"outputs": outputs}


def paths(texts: dict[str, Any], prefix: str = "") -> set[str]:
    """Every place in a locale that holds a text."""
    found = set()
    for key, value in texts.items():
        if isinstance(value, dict):
            found |= paths(value, f"{prefix}{key}.")
        else:
            found.add(f"{prefix}{key}")
    return found
