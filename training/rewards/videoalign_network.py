"""VideoAlign's network: Qwen2-VL as the release runs it, and the reward head.

The published forward (KwaiVGI/VideoAlign, `Qwen2VLRewardModelBT`, under transformers 4.45) gives
the language model no positions, so they count through text and video alike; and the model is cast
whole, so that rotary frequencies are rounded with the weights. Both are part of what was trained.
Today's transformers does neither by itself, so both are done here, explicitly.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .videoalign_text import SCORES

_VISION_THETA = 10_000.0  # Qwen2-VL's vision tower; its config does not name it


class Network(nn.Module):
    """transformers' `Qwen2VLModel` and the reward head, named as in a converted file.

    Args:
        config: transformers' `Qwen2VLConfig`.

    Raises:
        ValueError: transformers is older than 4.52.
    """

    def __init__(self, config: Any) -> None:
        from transformers import Qwen2VLModel

        super().__init__()
        self.model = Qwen2VLModel(config)
        if not hasattr(self.model, "language_model"):
            raise ValueError("this transformers names Qwen2-VL's parts otherwise; install 4.52 on")
        self.rm_head = nn.Linear(config.text_config.hidden_size, len(SCORES), bias=False)

    def features(self, pixel_values: Tensor, grid: Tensor) -> Tensor:
        """What the language model gets of the videos: [tokens, D], one video after the other."""
        seen = self.model.visual(pixel_values.to(self.rm_head.weight.dtype), grid_thw=grid)
        return getattr(seen, "pooler_output", seen)  # transformers 4 gives the tensor itself

    def hidden(self, ids: Tensor, mask: Tensor, pixel_values: Tensor, grid: Tensor) -> Tensor:
        """The normed hidden states [B, L, D] of the last layer.

        Takes ids and mask [B, L] and what `patches` gives; features go, in order, where the ids are
        the video's.
        """
        embeds = self.model.get_input_embeddings()(ids)
        at_video = rearrange(ids == self.model.config.video_token_id, "b l -> b l 1")
        embeds = embeds.masked_scatter(at_video, self.features(pixel_values, grid))
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        return self.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    def head(self, hidden: Tensor, at_reward: Tensor) -> Tensor:
        """The head's output [B, 3, 3] in float32, token by score, of states [B, L, D].

        `at_reward` [B, L] is true at the three reward tokens of each row.
        """
        read = rearrange(hidden[at_reward], "(b n) d -> b n d", b=len(hidden))
        return read.float() @ self.rm_head.weight.float().T


def set_rotary_frequencies(network: Network, dtype: torch.dtype) -> None:
    """Rotary frequencies, which no file holds, with the rounding of a model cast to `dtype`."""
    model = network.model
    rotary = type(model.language_model.rotary_emb)(config=model.config.text_config).to(dtype)
    for module in model.language_model.modules():
        if hasattr(module, "rotary_emb"):  # transformers 4 has an idle one in every layer
            module.rotary_emb = rotary
    vision = model.config.vision_config
    model.visual.rotary_pos_emb = _VisionAngles(vision.embed_dim // vision.num_heads, dtype)


class _VisionAngles(nn.Module):
    """transformers 4.45's angles: products and cosines rounded too, where today's are float32."""

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2)
        frequencies = (1 / _VISION_THETA**exponents).to(dtype)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self, asked: Tensor | int, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Cosines and sines [P, head_dim] at rows and columns [P, 2] of patches.

        transformers 4 asks for a table of so many positions instead, and goes on in its dtype.
        """
        if position_ids is None:
            return torch.arange(asked).to(self.frequencies)[:, None] * self.frequencies
        angles = position_ids.to(self.frequencies)[..., None] * self.frequencies
        angles = rearrange(angles, "p side f -> p (side f)").repeat(1, 2)
        return angles.cos(), angles.sin()
