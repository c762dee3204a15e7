"""models/tiny-llava-next: loads offline, reads its pages, and its vectorised training path equals the model's own.

The shipped folder, and one with random weights for tiles of another side, as the training script writes it.
"""

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

SHIPPED_SIDE = json.loads((FOLDER / "config.json").read_text())["vision_config"]["image_size"]
OTHER_SIDE = 224 if SHIPPED_SIDE == 336 else 336


@pytest.fixture(scope="module", params=["shipped", "random"])
def folder(request, tmp_path_factory):
    if request.param == "shipped":
        return FOLDER
    made = tmp_path_factory.mktemp("random")
    network.save_folder(network.build_model(tile_side=OTHER_SIDE), made)
    return made


@pytest.fixture(scope="module")
def processor(folder):
    return transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def model(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def tile_side(model):
    return network.tile_side_of(model)


@pytest.fixture(scope="module")
def visual_tokens(tile_side):
    base, page = tile_side // pages.PATCH, pages.PAGE_SIDE // pages.PATCH
    return base**2 + page * (page + 1)


def conversation(image: Image.Image, label: str) -> list[dict]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": label}]
    return [{"role": "user", "content": content}]


def processed(processor, messages, **kwargs):
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


@pytest.fixture(scope="module")
def demo(processor, tile_side):
    """The page of the shipped demo's seed, its question, and what the processor makes of both."""
    facts = json.loads((FOLDER / "pages" / "demo.json").read_text())
    page = pages.held_out_page(facts["seed"], tile_side, len(facts["entries"]))
    return page, processed(processor, conversation(Image.fromarray(page.image.numpy()), page.label))


def test_size_and_kind(folder, model):
    weights = folder / "model.safetensors"
    assert type(model) is transformers.LlavaNextForConditionalGeneration
    assert sum(p.numel() for p in model.parameters()) < 8_000_000
    assert weights.stat().st_size < 16 * 2**20
    assert model.generation_config.eos_token_id == network.EOS


def test_prompt(processor, demo, visual_tokens):
    page, inputs = demo
    ids = inputs["input_ids"][0].tolist()
    assert ids[0] == network.BOS
    assert ids[1 : 1 + visual_tokens] == [network.IMAGE] * visual_tokens
    assert processor.decode(ids[1 + visual_tokens :]) == f"?{page.label}="


def test_model_and_processor_agree_on_the_tiles(model, processor, tile_side):
    expected = network.grid_pinpoints(tile_side)
    assert model.config.image_grid_pinpoints == expected
    assert processor.image_processor.image_grid_pinpoints == expected
    assert [pages.PAGE_SIDE, pages.PAGE_SIDE] in expected and [tile_side, tile_side] not in expected


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


def test_batches_are_padded_on_the_left(processor, visual_tokens):
    images = Image.new("RGB", (672, 672)), Image.new("RGB", (336, 672))
    inputs = processed(processor, [conversation(image, "KQ") for image in images], processor_kwargs={"padding": True})
    assert inputs["attention_mask"][0].all()
    padding = visual_tokens - int((inputs["input_ids"][1] == network.IMAGE).sum())
    assert inputs["input_ids"][1, :padding].eq(network.PAD).all()
    assert not inputs["attention_mask"][1, :padding].any()


@torch.inference_mode()
def test_reads_the_demo_page():
    processor = transformers.AutoProcessor.from_pretrained(FOLDER, local_files_only=True)
    model = transformers.AutoModelForImageTextToText.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32)
    facts = json.loads((FOLDER / "pages" / "demo.json").read_text())
    with Image.open(FOLDER / "pages" / "demo.png") as image:
        inputs = processed(processor, conversation(image.copy(), facts["question"]))
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    said = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == facts["answer"] == facts["entries"][facts["question"]]


@pytest.mark.parametrize("name", ["demo", "easy", "dense", "full"])
def test_shipped_pages_are_those_of_their_seed(name):
    facts = json.loads((FOLDER / "pages" / f"{name}.json").read_text())
    page = pages.held_out_page(facts["seed"], SHIPPED_SIDE, len(facts["entries"]))
    assert (page.entries, page.label, page.answer) == (facts["entries"], facts["question"], facts["answer"])
    with Image.open(FOLDER / "pages" / f"{name}.png") as image:
        drawn = torch.tensor(list(image.getdata()), dtype=torch.int).view(pages.PAGE_SIDE, pages.PAGE_SIDE)
    assert (drawn - page.image.int()).abs().max() <= 1


def test_training_pixels_equal_the_processor(demo, tile_side):
    page, inputs = demo
    difference = (network.pixel_values_from_pages(page.image[None], tile_side) - inputs["pixel_values"]).abs()
    grey_level = 1 / 255 / network.IMAGE_STD
    assert difference[:, 0].max() < 1.01 * grey_level  # the base view: rounding while shrinking
    assert difference[:, 1:].max() < 1e-5


@torch.inference_mode()
def test_training_path_equals_the_forward(model, demo, visual_tokens):
    _, inputs = demo
    features = network.vision_features(model, inputs["pixel_values"][0])[None]
    visual = network.pack_features(model, features)
    own = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
    torch.testing.assert_close(visual[0], own, rtol=1e-4, atol=1e-4)

    dense = sparse_attention.DecodingAttention(torch.Generator().manual_seed(0))
    hidden = network.prompt_embeddings(model, visual, inputs["input_ids"][:, 1 + visual_tokens :])
    hidden = network.run_text_layers(model, hidden, dense)
    logits = network.next_token_logits(model, hidden[:, -1:])
    expected = model(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_held_out_pages_are_not_trained_on():
    with pytest.raises(ValueError, match="held-out seeds start"):
        pages.held_out_page(pages.FIRST_HELD_OUT_SEED - 1, SHIPPED_SIDE)
    with pytest.raises(ValueError, match="training seeds"):
        pages.training_generator(pages.FIRST_HELD_OUT_SEED, "cpu")
    assert 10_000_000 < train.TRAINING_PROBES < pages.FIRST_HELD_OUT_SEED - 10_000_000


def test_pages_are_deterministic_and_get_harder():
    seed = pages.FIRST_HELD_OUT_SEED + 7
    drawn = [pages.held_out_page(seed, SHIPPED_SIDE) for _ in range(2)]
    assert torch.equal(drawn[0].image, drawn[1].image)
    counts = [len(pages.held_out_page(seed, SHIPPED_SIDE, n).entries) for n in pages.ENTRY_COUNTS]
    assert counts == list(pages.ENTRY_COUNTS)


@pytest.mark.parametrize("side", [SHIPPED_SIDE, OTHER_SIDE])
def test_entries_stay_inside_their_tile(side):
    layout = pages.random_layout(8, 64, pages.PAGE_SIDE, side, torch.Generator().manual_seed(0))
    _, height, width = pages.glyphs().shape
    for start, size in ((layout.x, pages.ENTRY_LENGTH * width), (layout.y, height)):
        assert torch.equal(start // side, (start + size - 1) // side)


def some_attention(tokens: int) -> tuple[torch.Tensor, ...]:
    """q, k and v of two rows, sharp enough that selection drops most tokens, the rows different numbers of them."""
    torch.manual_seed(0)
    sharpness = torch.tensor([3.0, 1.5])[:, None, None, None]
    q, k = sharpness * torch.randn(2, 4, tokens, 16), torch.randn(2, 2, tokens, 16)
    return q, k, torch.randn(2, 2, tokens, 16)


@pytest.mark.parametrize("settings", [{"ratios": [0.9999]}, {"tau": 1.0}])
def test_training_attention_among_all_tokens_is_dense(settings):
    q, k, v = some_attention(200)
    attention = sparse_attention.TrainingAttention(195, torch.Generator().manual_seed(0), **settings)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attention(0, q, k, v), dense)


@pytest.mark.parametrize("settings", [{"tau": 0.8}, {"tau": 0.8, "limits": [0.7]}, {"ratio": 0.3}])
def test_training_sees_what_evaluation_does(settings):
    prompt, q_k_v = 296, some_attention(300)
    decoding = sparse_attention.DecodingAttention(
        torch.Generator().manual_seed(1), settings.get("tau"), settings.get("ratio")
    )
    parts = [decoding(0, *(x[:, :, :prompt] for x in q_k_v))]
    parts += [decoding(0, *(x[:, :, i : i + 1] for x in q_k_v)) for i in range(prompt, 300)]

    ratios = {"ratios": [settings["ratio"]]} if "ratio" in settings else settings
    training = sparse_attention.TrainingAttention(prompt, torch.Generator().manual_seed(1), **ratios)
    torch.testing.assert_close(training(0, *q_k_v), torch.cat(parts, 2))
    if "tau" in settings:
        torch.testing.assert_close(training.shares[0], decoding.shares[0])
        assert training.shares[0].max() < 0.7 and training.shares[0][0] != training.shares[0][1]


def test_training_selects_what_the_package_does():
    zipvl = pytest.importorskip("zipvl")
    q, k, v = some_attention(300)
    training = sparse_attention.TrainingAttention(300, torch.Generator().manual_seed(1), tau=0.8)
    training.rows = zipvl.ops.probe_index(q, num_recent=64, num_random=64, seed=0)[0].long()
    out, _, count = zipvl.ops.zipvl_attn(q, k, v, tau=0.8)
    torch.testing.assert_close(training(0, q, k, v), out, rtol=1e-4, atol=1e-5)
    assert torch.equal((training.shares[0] * 300).round().int(), count)


def test_entropy_is_relative_to_the_context():
    rows = torch.tensor([0, 1, 50, 199])
    q, k, _ = some_attention(200)
    assert sparse_attention.row_entropy(torch.zeros_like(q), k, rows).item() == pytest.approx(0.75)
    assert sparse_attention.row_entropy(100 * q, k, rows).item() < 0.2


@pytest.mark.parametrize(
    "plan", [train.Plan(), train.Plan(tau=0.975), train.Plan(ratios=[0.2, 0.4, 1.0, 0.3, 0.2, 0.2])]
)
def test_a_training_step_of_each_kind_has_gradients(plan):
    learner = train.Learner(0, compiled=False)
    stage = train.Stage("sparsity", (4,), 168, 2, 1.0)
    batch = train.make_batch(stage, network.TILE_SIDE, 3, 2, 1, torch.device("cpu"))
    attention = sparse_attention.TrainingAttention(
        batch.prompt, pages.training_generator(4, "cpu"), ratios=plan.ratios, tau=plan.tau, with_entropy=True
    )
    with torch.enable_grad():
        measured = learner(batch, stage.kind, attention, torch.full((6,), 0.01))
        measured.loss.backward()
    assert measured.loss.isfinite() and (measured.shares is not None) == (plan.tau is not None)
    for name, parameter in learner.named_parameters():
        if "post_layernorm" not in name:  # of the CLS token, which LLaVA-NeXT drops
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_answers_are_read_at_the_right_places():
    learner = train.Learner(0, compiled=False)
    batch = train.make_batch(train.STAGES[1], network.TILE_SIDE, 3, 2, 8, torch.device("cpu"))
    attention = sparse_attention.TrainingAttention(batch.prompt, pages.training_generator(4, "cpu"))
    features = learner.features(batch)
    loss, _ = learner.answer_loss(features, batch, attention)
    hidden = network.prompt_embeddings(learner.model, network.pack_features(learner.model, features, False), batch.ids)
    hidden = network.run_text_layers(learner.model, hidden, attention)
    logits = network.next_token_logits(learner.model, hidden[:, 1 + batch.visual :])
    losses = []
    for question in range(3):
        for place in range(4, 8):
            at = 8 * question + place
            losses.append(torch.nn.functional.cross_entropy(logits[:, at - 1], batch.ids[:, at]))
    torch.testing.assert_close(loss, torch.stack(losses).mean())


@pytest.fixture(scope="module")
def learner():
    """A learner with the shipped weights, cut to the tiles that training uses."""
    started = train.Learner(0, compiled=False)
    started.start_from(FOLDER)
    return started


@pytest.mark.parametrize("stage", train.STAGES[1:], ids=lambda stage: stage.name)
@torch.inference_mode()
def test_a_trained_model_passes_every_stage(learner, stage):
    """So everything that a stage asks can be read in what it shows, and is compared with the right answer."""
    batch = train.make_batch(stage, network.TILE_SIDE, 3, max(1, (336 // stage.side) ** 2), 8, torch.device("cpu"))
    attention = sparse_attention.TrainingAttention(batch.prompt, pages.training_generator(4, "cpu"))
    _, right = learner.answer_loss(learner.features(batch), batch, attention)
    assert right.mean() >= 0.85
    assert right[:, 0].mean() >= 0.75  # without the labels: one in as many as there are entries


def test_a_stage_that_is_not_passed_ends_the_run(tmp_path):
    trainer = train.Trainer(tmp_path, tmp_path / "last.pt", 0, compiled=False, seconds=1000, smoke=False)
    trainer.stage_index, trainer.numbers, trainer.seconds = 1, {"right": 0.611}, train.STUCK_SECONDS - 1
    trainer.check_stuck()
    trainer.seconds = train.STUCK_SECONDS + 1
    with pytest.raises(SystemExit, match=r"stuck at 0\.611"):
        trainer.check_stuck()
    trainer.stage_index = len(train.STAGES) - 1
    trainer.check_stuck()


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
