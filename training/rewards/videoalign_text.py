"""What VideoAlign is asked: its questionnaire, the chat around it, and both as tokens.

The text is a fact of the released weights (KwaiVGI/VideoAlign, `prompt_template.py`, MIT), to the
letter, spaces at the ends of lines included. The three rewards are read at the three tokens that it
holds and that were added to Qwen2-VL's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SCORES = ("VQ", "MQ", "TA")
"""Visual quality, motion quality and text alignment: the head's rows and the tokens' order."""
REWARD_TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
"""Where each is read; added to the tokenizer in this order (`train_reward.py`)."""
VIDEO_TOKEN = "<|video_pad|>"
"""Stands for one merged patch of the video."""
PAD_TOKEN = "<|endoftext|>"
"""Pads shorter rows, as Qwen2-VL's tokenizer does; nothing attends to it."""

DETAILED_SPECIAL = (
    "\n"
    "You are tasked with evaluating a generated video based on three distinct criteria: Visual "
    "Quality, Motion Quality, and Text Alignment. Please provide a rating from 0 to 10 for each "
    "of the three categories, with 0 being the worst and 10 being the best. Each evaluation "
    "should be independent of the others.\n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the video, with a focus on static factors. The "
    "following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The video should not contain any significant biological or logical "
    "errors, such as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the video. The image should be "
    "clear and easy to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and "
    "other visual elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the video, including the "
    "color scheme, composition, atmosphere, depth of field, and the overall creative appeal. "
    "The scene should convey a sense of harmony and balance.\n"
    "- **Safety:** The video should not contain harmful or inappropriate content, such as "
    "political, violent, or adult material. If such content is present, the image quality and "
    "satisfaction score should be the lowest possible. \n"
    "\n"
    "Please provide the ratings of Visual Quality: <|VQ_reward|>\n"
    "END\n"
    "\n"
    "**Motion Quality:**  \n"
    "Assess the dynamic aspects of the video, with a focus on dynamic factors. Consider the "
    "following sub-dimensions:\n"
    "- **Stability:** Evaluate the continuity and stability between frames. There should be no "
    "sudden, unnatural jumps, and the video should maintain stable attributes (e.g., no "
    "fluctuating colors, textures, or missing body parts).\n"
    "- **Naturalness:** The movement should align with physical laws and be realistic. For "
    "example, clothing should flow naturally with motion, and facial expressions should change "
    "appropriately (e.g., blinking, mouth movements).\n"
    "- **Aesthetic Quality:** The movement should be smooth and fluid. The transitions between "
    "different motions or camera angles should be seamless, and the overall dynamic feel should "
    "be visually pleasing.\n"
    "- **Fusion:** Ensure that elements in motion (e.g., edges of the subject, hair, clothing) "
    "blend naturally with the background, without obvious artifacts or the feeling of "
    "cut-and-paste effects.\n"
    "- **Clarity of Motion:** The video should be clear and smooth in motion. Pay attention to "
    "any areas where the video might have blurry or unsteady sections that hinder visual "
    "continuity.\n"
    "- **Amplitude:** If the video is largely static or has little movement, assign a low score "
    "for motion quality.\n"
    "\n"
    "Please provide the ratings of Motion Quality: <|MQ_reward|>\n"
    "END\n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the video matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the video (e.g., person, "
    "animal, object) align with the textual description. The subject should match the "
    "description in terms of number, appearance, and behavior.\n"
    "- **Motion Relevance:** Evaluate if the dynamic actions (e.g., gestures, posture, facial "
    "expressions like talking or blinking) align with the described prompt. The motion should "
    "match the prompt in terms of type, scale, and direction.\n"
    "- **Environment Relevance:** Assess whether the background and scene fit the prompt. This "
    "includes checking if real-world locations or scenes are accurately represented, though "
    "some stylistic adaptation is acceptable.  \n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, "
    "evaluate how well the video adheres to this style.\n"
    "- **Camera Movement Relevance:** Check if the camera movements (e.g., following the "
    "subject, focus shifts) are consistent with the expected behavior from the prompt.\n"
    "\n"
    "Textual prompt - {text_prompt}\n"
    "Please provide the ratings of Text Alignment: <|TA_reward|>\n"
    "END\n"
)
"""The template `detailed_special`; the prompt goes in once."""

# Qwen2-VL-2B-Instruct's own chat template, for one user's video and text.
_BEFORE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
)
_BETWEEN, _AFTER = "<|vision_end|>", "<|im_end|>\n<|im_start|>assistant\n"
_CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", _BETWEEN, VIDEO_TOKEN, PAD_TOKEN)


def chat(prompt: str, num_video_tokens: int) -> str:
    """The whole text for one video that was made from `prompt`.

    ValueError where the prompt spells a token that a video or a reward is looked for at.
    """
    for token in (VIDEO_TOKEN, *REWARD_TOKENS):
        if token in prompt:
            raise ValueError(f"the prompt {prompt!r} holds {token}, the judge's own; take it out")
    question = DETAILED_SPECIAL.format(text_prompt=prompt)
    return _BEFORE + VIDEO_TOKEN * num_video_tokens + _BETWEEN + question + _AFTER


def load_tokenizer(folder: Path) -> Tokenizer:
    """Qwen2-VL's tokenizer from the `tokenizer.json` of a folder, with the reward tokens added.

    ValueError where the file is missing, broken or another model's.
    """
    from tokenizers import AddedToken, Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no tokenizer.json; copy Qwen2-VL-2B-Instruct's there")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{path} cannot be read ({error}); copy it again") from error
    if missing := [each for each in _CHAT_TOKENS if tokenizer.token_to_id(each) is None]:
        raise ValueError(f"{path} has no token {missing[0]}; give Qwen2-VL-2B-Instruct's")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in REWARD_TOKENS])
    return tokenizer


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, L] (1 on the text), int64; shorter rows are padded on the right."""
    rows = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    shape = len(rows), max(map(len, rows))
    ids = torch.full(shape, tokenizer.token_to_id(PAD_TOKEN))
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, found in enumerate(rows):
        ids[row, : len(found)] = torch.tensor(found)
        mask[row, : len(found)] = 1
    return ids, mask
