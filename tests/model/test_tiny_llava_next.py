"""models/tiny-llava-next: loads offline, reads its pages, and its vectorised training path equals the model's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
from PIL import Image  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "models" / "tiny-llava-next"
sys.path.insert(0, str(FOLDER))
try:
    import network
    import pages
    import sparse_attention
    import train
finally:
    sys.path.remove(str(FOLDER))

VISUAL_TOKENS = 2928


@pytest.fixture(scope="module")
def processor():
    return transformers.AutoProcessor.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForImageTextToText.from_pretrained(
        FOLDER, local_files_only=True, dtype=torch.float32
    ).eval()


def conversation(image: Image.Image, label: str) -> list[dict]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": label}]
    return [{"role": "user", "content": content}]


def processed(processor, messages, **kwargs):
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


@pytest.fixture(scope="module")
def demo(processor):
    """The shipped page: its facts and what the processor makes of it."""
    facts = json.loads((FOLDER / "pages" / "demo.json").read_text())
    with Image.open(FOLDER / "pages" / "demo.png") as image:
        return facts, processed(processor, conversation(image.copy(), facts["question"]))


def test_size_and_kind(model):
    weights = FOLDER / "model.safetensors"
    assert type(model) is transformers.LlavaNextForConditionalGeneration
    assert sum(p.numel() for p in model.parameters()) < 8_000_000
    assert weights.stat().st_size < 16 * 2**20
    assert model.generation_config.eos_token_id == network.EOS


def test_prompt(processor, demo):
    facts, inputs = demo
    ids = inputs["input_ids"][0].tolist()
    assert ids[0] == network.BOS
    assert ids[1 : 1 + VISUAL_TOKENS] == [network.IMAGE] * VISUAL_TOKENS
    assert processor.decode(ids[1 + VISUAL_TOKENS :]) == f"?{facts['question']}="


def test_chat_template_renders_an_answer(processor):
    messages = conversation(Image.new("RGB", (672, 672)), "KQ")
    messages.append({"role": "assistant", "content": [{"type": "text", "text": "482"}]})
    assert processor.apply_chat_template(messages) == "<bos><image>?KQ=482<eos>"


def test_tokenizer_takes_any_ascii(processor):
    text = "Where is ~KQ~? {a b}"
    ids = processor.tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert network.UNK not in ids
    assert processor.tokenizer.decode(ids) == text


def test_batches_are_padded_on_the_left(processor):
    images = Image.new("RGB", (672, 672)), Image.new("RGB", (336, 672))
    inputs = processed(processor, [conversation(image, "KQ") for image in images], processor_kwargs={"padding": True})
    assert inputs["attention_mask"][0].all()
    padding = VISUAL_TOKENS - int((inputs["input_ids"][1] == network.IMAGE).sum())
    assert inputs["input_ids"][1, :padding].eq(network.PAD).all()
    assert not inputs["attention_mask"][1, :padding].any()


@torch.inference_mode()
def test_reads_the_demo_page(model, processor, demo):
    facts, inputs = demo
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    said = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == facts["answer"] == facts["entries"][facts["question"]]


@pytest.mark.parametrize("name", ["demo", "easy", "dense", "full"])
def test_shipped_pages_are_those_of_their_seed(name):
    facts = json.loads((FOLDER / "pages" / f"{name}.json").read_text())
    page = pages.held_out_page(facts["seed"], len(facts["entries"]))
    assert (page.entries, page.label, page.answer) == (facts["entries"], facts["question"], facts["answer"])
    with Image.open(FOLDER / "pages" / f"{name}.png") as image:
        drawn = torch.tensor(list(image.getdata()), dtype=torch.int).view(pages.PAGE_SIDE, pages.PAGE_SIDE)
    assert (drawn - page.image.int()).abs().max() <= 1


def test_training_pixels_equal_the_processor(demo):
    facts, inputs = demo
    page = pages.held_out_page(facts["seed"], len(facts["entries"]))
    difference = (network.pixel_values_from_pages(page.image[None]) - inputs["pixel_values"]).abs()
    grey_level = 1 / 255 / network.IMAGE_STD
    assert difference[:, 0].max() < 1.01 * grey_level  # the base view: rounding while shrinking
    assert difference[:, 1:].max() < 1e-5


@torch.inference_mode()
def test_training_path_equals_the_forward(model, demo):
    _, inputs = demo
    features = network.vision_features(model, inputs["pixel_values"][0])[None]
    visual = network.pack_features(model, features)
    own = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
    torch.testing.assert_close(visual[0], own, rtol=1e-4, atol=1e-4)

    dense = sparse_attention.DecodingAttention(torch.Generator().manual_seed(0))
    hidden = network.prompt_embeddings(model, visual, inputs["input_ids"][:, 1 + VISUAL_TOKENS :])
    hidden = network.run_text_layers(model, hidden, dense)
    logits = network.next_token_logits(model, hidden[:, -1:])
    expected = model(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_held_out_pages_are_not_trained_on():
    with pytest.raises(ValueError, match="held-out seeds start"):
        pages.held_out_page(pages.FIRST_HELD_OUT_SEED - 1)
    with pytest.raises(ValueError, match="training seeds"):
        pages.training_generator(pages.FIRST_HELD_OUT_SEED, "cpu")
    assert sum(stage.most_steps for stage in train.STAGES) < train.CONTROL_SEED
    assert train.CONTROL_SEED + sum(stage.most_steps for stage in train.STAGES) < pages.FIRST_HELD_OUT_SEED


def test_pages_are_deterministic_and_get_harder():
    seed = pages.FIRST_HELD_OUT_SEED + 7
    assert torch.equal(pages.held_out_page(seed).image, pages.held_out_page(seed).image)
    assert [len(pages.held_out_page(seed, n).entries) for n in pages.ENTRY_COUNTS] == list(pages.ENTRY_COUNTS)


def test_entries_stay_inside_their_tile():
    layout = pages.random_layout(8, 64, pages.PAGE_SIDE, torch.Generator().manual_seed(0))
    _, height, width = pages.glyphs().shape
    for start, size in ((layout.x, pages.ENTRY_LENGTH * width), (layout.y, height)):
        assert torch.equal(start // pages.TILE_SIDE, (start + size - 1) // pages.TILE_SIDE)


def test_training_attention_among_all_tokens_is_dense():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 200, 16), torch.randn(2, 2, 200, 16), torch.randn(2, 2, 200, 16)
    index = torch.arange(200).expand(2, -1)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(sparse_attention.attend_among(q, k, v, index), dense)


def test_selection_follows_its_definition():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 300, 16), torch.randn(2, 2, 300, 16)
    rows = sparse_attention.probe_positions(300, torch.Generator().manual_seed(0))
    assert rows.unique().numel() == rows.numel() == 128
    accumulated, normalised = sparse_attention.probe_scores(q, k, rows)
    torch.testing.assert_close(accumulated.sum(1), torch.full((2,), 128.0))
    count = sparse_attention.tokens_needed(accumulated, 0.9)
    best = accumulated.sort(-1, descending=True).values
    for row, needed in zip(best, count.tolist(), strict=True):
        assert row[:needed].sum() >= 0.9 * row.sum() > row[: needed - 1].sum()
    kept = sparse_attention.keep_best(normalised, count)
    assert kept[:, -1].all()
    assert torch.equal(kept.sum(1), count)
