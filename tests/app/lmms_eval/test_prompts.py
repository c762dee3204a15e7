"""From messages to what a processor is given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zipvl.lmms_eval.prompts import Prompt, collate, from_context, from_messages


def grey(level: int) -> Image.Image:
    return Image.new("L", (8, 6), level)


def user(*content: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def test_images_keep_their_places(tmp_path: Path) -> None:
    grey(7).save(tmp_path / "page.png")
    items = [
        text("first"),
        {"type": "image", "url": grey(3)},
        text("then"),
        {"type": "image", "url": tmp_path / "page.png"},
    ]
    prompt = from_messages(user(*items), frames=4, as_video=True, system_prompt="Be brief.")
    assert prompt.conversation == [
        {"role": "system", "content": [text("Be brief.")]},
        {"role": "user", "content": [text("first"), IMAGE, text("then"), IMAGE]},
    ]
    assert [image.getpixel((0, 0)) for image in prompt.images] == [(3, 3, 3), (7, 7, 7)]
    assert prompt.media == (True, False)


@pytest.mark.parametrize(
    ("context", "visuals", "content"),
    [
        ("Q", [grey(1), grey(2)], [IMAGE, IMAGE, text("Q")]),
        ("a <image> b <image>", [grey(1), grey(2)], [text("a "), IMAGE, text(" b "), IMAGE]),
        ("<image> twice <image>", [grey(1)], [IMAGE, text("<image> twice <image>")]),
        ("Q", None, [text("Q")]),
    ],
)
def test_visuals_stand_before_the_text_or_at_its_marks(context: str, visuals: Any, content: Any) -> None:
    assert from_context(context, visuals, frames=4, as_video=True).conversation == user(*content)


@pytest.mark.parametrize(("most", "levels"), [(4, [0, 3, 6, 9]), (2, [0, 9]), (1, [0]), (32, list(range(10)))])
def test_frames_are_spread_over_the_video(most: int, levels: list[int]) -> None:
    frames = [grey(level) for level in range(10)]
    prompt = from_messages(user({"type": "video", "url": frames}), frames=most, as_video=False)
    assert [image.getpixel((0, 0))[0] for image in prompt.images] == levels
    assert prompt.conversation == user(*[IMAGE] * len(levels)) and not prompt.videos


def test_a_video_file_is_decoded(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="no video decoder is installed")
    path = tmp_path / "grey.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for level in range(0, 200, 10):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    for source in (str(path), {"url": str(path)}):
        prompt = from_messages(user({"type": "video", "url": source}), frames=3, as_video=True)
        ((pixels, where),) = prompt.videos
        assert pixels.shape == (3, 48, 64, 3) and prompt.conversation == user(VIDEO)
        assert np.abs(pixels.mean((1, 2, 3)) - [0, 100, 190]).max() < 5
        assert list(where.frames_indices) == [0, 10, 19] and where.fps == 10
    assert len(from_context("Q", [str(path)], frames=3, as_video=False).images) == 3


def test_audio_is_refused() -> None:
    with pytest.raises(ValueError, match="expected text, images and videos in a message, got 'audio'"):
        from_messages(user({"type": "audio", "url": "x.wav"}), frames=4, as_video=True)
    with pytest.raises(ValueError, match="expected pictures or paths of videos as visuals, got int"):
        from_context("Q", [3], frames=4, as_video=True)


class Recorder:
    """A processor that hands back what it was given."""

    def __init__(self, bos: str | None) -> None:
        self.tokenizer = SimpleNamespace(bos_token=bos)

    def apply_chat_template(self, conversations: list[Any], **kwargs: Any) -> list[str]:
        assert kwargs == {"tokenize": False, "add_generation_prompt": True}
        return ["<s>" + conversation[-1]["content"][-1]["text"] for conversation in conversations]

    def __call__(self, **kwargs: Any) -> dict[str, Any]:
        return kwargs


@pytest.mark.parametrize("bos", ["<s>", None])
def test_a_batch_as_the_processor_gets_it(bos: str | None) -> None:
    """Images are nested by prompt, videos are flat with their places, and no second begin token is added."""
    page, frames = grey(1).convert("RGB"), np.zeros((2, 6, 8, 3), np.uint8)
    prompts = [Prompt(user(text(name)), [page] * count, [(frames, "where")]) for count, name in ((1, "a"), (2, "b"))]
    given = collate(Recorder(bos), prompts)
    assert given["text"] == ["<s>a", "<s>b"] and given["images"] == [[page], [page, page]]
    assert len(given["videos"]) == 2 and given["video_metadata"] == ["where"] * 2
    assert given["do_sample_frames"] is False and given["padding_side"] == "left"
    assert given["add_special_tokens"] is (bos is None)
    plain = collate(Recorder(bos), [Prompt(user(text("a")), [], [])])
    assert not plain.keys() & {"images", "videos", "video_metadata", "do_sample_frames"}
