"""From the messages of an lmms-eval task to the inputs of a transformers model: text, images, frames of videos."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image

from zipvl.app.images import load_image

__all__ = ["Prompt", "collate", "from_context", "from_messages"]

_IMAGE_MARK = "<image>"

# transformers' names of the packages that decode videos; the first one installed is used.
_DECODERS = {"av": "pyav", "torchcodec": "torchcodec", "decord": "decord", "cv2": "opencv"}


@dataclass(frozen=True)
class Prompt:
    """One question as the processor wants it.

    Attributes:
        conversation: turns of ``{"role", "content"}``, each content a list of ``{"type": "text" | "image" | "video"}``.
        images: RGB pictures in the order of the conversation.
        videos: frames ``[T, H, W, 3]`` uint8 of each video, and where in the video they lie.
    """

    conversation: list[dict[str, Any]]
    images: list[Image.Image]
    videos: list[tuple[np.ndarray, Any]]

    @property
    def media(self) -> tuple[bool, bool]:
        """Whether there are images, and videos: prompts that differ in this do not share a batch."""
        return bool(self.images), bool(self.videos)


def from_messages(
    messages: list[dict[str, Any]], *, frames: int, as_video: bool, system_prompt: str | None = None
) -> Prompt:
    """A prompt from the messages of a chat task.

    Args:
        messages: turns whose content is text or a list of ``{"type": "text", "text"}``, ``{"type": "image", "url"}``
            and ``{"type": "video", "url"}``; an url is a path, a picture, or frames.
        frames: most frames of a video.
        as_video: whether the processor takes videos; otherwise frames become images.
        system_prompt: a system turn to put first.

    Raises:
        ValueError: the content is of another type, such as audio.
        InputError: a picture cannot be read.
    """
    prompt = Prompt([], [], [])
    if system_prompt:
        prompt.conversation.append({"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    for message in messages:
        items = message["content"]
        if isinstance(items, str):
            items = [{"type": "text", "text": items}]
        content = [part for item in items for part in _parts(item, prompt, frames, as_video)]
        prompt.conversation.append({"role": message["role"], "content": content})
    return prompt


def from_context(
    context: str, visuals: list[Any] | None, *, frames: int, as_video: bool, system_prompt: str | None = None
) -> Prompt:
    """A prompt from the text and the visuals of a simple task.

    Visuals (pictures, or paths of videos) come before the text, or at its ``<image>`` marks if there are as many.
    """
    items = [_visual(visual) for visual in visuals or []]
    texts: list[dict[str, Any]] = [{"type": "text", "text": context}]
    pieces = context.split(_IMAGE_MARK)
    if items and len(pieces) == len(items) + 1:
        content = [{"type": "text", "text": pieces[0]}]
        for item, piece in zip(items, pieces[1:], strict=True):
            content += [item, {"type": "text", "text": piece}]
        content = [item for item in content if item.get("text") != ""]
    else:
        content = items + texts
    messages = [{"role": "user", "content": content}]
    return from_messages(messages, frames=frames, as_video=as_video, system_prompt=system_prompt)


def collate(processor: Any, prompts: list[Prompt]) -> Any:
    """The model's inputs for prompts that have the same kinds of media, padded on the left."""
    texts = processor.apply_chat_template(
        [prompt.conversation for prompt in prompts], tokenize=False, add_generation_prompt=True
    )
    tokenizer = processor.tokenizer
    start = getattr(tokenizer, "bos_token", None)
    media: dict[str, Any] = {}
    if prompts[0].images:
        media["images"] = [prompt.images for prompt in prompts]
    videos = [video for prompt in prompts for video in prompt.videos]
    if videos:
        media |= {"videos": [frames for frames, _ in videos], "do_sample_frames": False}
        if all(where is not None for _, where in videos):
            media["video_metadata"] = [where for _, where in videos]
    return processor(
        text=texts,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=not (start and texts[0].startswith(start)),
        **media,
    )


def _parts(item: dict[str, Any], prompt: Prompt, frames: int, as_video: bool) -> list[dict[str, Any]]:
    """``item`` for the chat template; what it shows goes to ``prompt``."""
    kind = item["type"]
    if kind == "text":
        return [{"type": "text", "text": item["text"]}]
    source = next((item[key] for key in ("url", "image", "video", "path") if item.get(key) is not None), None)
    if kind == "image" and source is not None:
        prompt.images.append(load_image(source))
        return [{"type": "image"}]
    if kind == "video" and source is not None:
        pixels, where = _frames(source, frames)
        if as_video:
            prompt.videos.append((pixels, where))
            return [{"type": "video"}]
        prompt.images.extend(Image.fromarray(frame) for frame in pixels)
        return [{"type": "image"}] * len(pixels)
    raise ValueError(f"zipvl: expected text, images and videos in a message, got {kind!r} with {type(source).__name__}")


def _visual(visual: Any) -> dict[str, Any]:
    if isinstance(visual, Image.Image):
        return {"type": "image", "url": visual}
    if isinstance(visual, (str, list)):
        return {"type": "video", "url": visual}
    raise ValueError(f"zipvl: expected pictures or paths of videos as visuals, got {type(visual).__name__}")


def _frames(source: Any, most: int) -> tuple[np.ndarray, Any]:
    """At most ``most`` evenly spaced frames ``[T, H, W, 3]`` of a video file or of a list of pictures."""
    if isinstance(source, dict):
        source = source.get("url") or source.get("path")
    if isinstance(source, (list, tuple)):
        chosen = [source[i] for i in _spread(len(source), most)]
        return np.stack([np.asarray(load_image(frame)) for frame in chosen]), None
    from transformers.video_utils import load_video

    decoder = next((name for package, name in _DECODERS.items() if find_spec(package) is not None), None)
    if decoder is None:
        raise ImportError(f"zipvl: {source} needs a video decoder: install one of {', '.join(_DECODERS)}")
    pixels, where = load_video(
        source, backend=decoder, sample_indices_fn=lambda metadata, **_: _spread(metadata.total_num_frames, most)
    )
    return np.asarray(pixels), where


def _spread(count: int, most: int) -> np.ndarray:
    """Positions of ``most`` frames among ``count``, the first and the last included; all of them if they are fewer."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)
