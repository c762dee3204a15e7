"""All baselines on a model: everything kept is the dense model, the rest is what a masked dense model computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from zipvl.baselines import AIM, Baseline, FastV, PyramidDrop, TowerAttention, VisionZip, applied, observed_tower
from zipvl.baselines.common import Prompt, _functions, attention_replaced, steps_without_cudnn
from zipvl.baselines.visionzip import compress

from .conftest import IMAGE_TOKENS, ROW_ENDS

NEW = 4
TIGHT = [FastV(2, 0.3), PyramidDrop(0.4), VisionZip(0.25), AIM(0.5), AIM(0.3, 0.2)]
WHOLE = [FastV(2, 1.0), PyramidDrop(1.0), VisionZip(1.0), AIM(1.0, 1.5)]


def label(baseline: Baseline) -> str:
    return f"{baseline.name}-{baseline.schedule(6)[-1]:.2f}"


def generate(model: Any, inputs: dict[str, torch.Tensor], **more: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **options, **more)


@contextmanager
def masked(model: Any, kept: list[torch.Tensor], prompt: int, entering: torch.Tensor) -> Iterator[None]:
    """Makes ``model(whole sequence)`` compute what a pruned prefill and decoding should.

    Args:
        kept: for each layer the prompt's positions in its attention, ``[B, n]``.
        entering: ``[B, n, d]``, what the first layer gets at ``kept[0]`` (merged tokens differ from the embeddings).
    """

    def attend(module: Any, q: Any, k: Any, v: Any, _mask: Any, scaling: Any = None, **_: Any) -> Any:
        batch, tokens = q.shape[0], q.shape[2]
        alive = torch.zeros(batch, tokens, dtype=torch.bool).scatter(1, kept[module.layer_idx], True)
        alive[:, prompt:] = True
        may = torch.ones(tokens, tokens, dtype=torch.bool).tril() & alive[:, None, None]
        scores = (q.double() @ k.double().repeat_interleave(2, 1).mT) * scaling
        weights = scores.masked_fill(~may, -torch.inf).softmax(-1).nan_to_num(0.0)
        return (weights @ v.double().repeat_interleave(2, 1)).to(q.dtype).transpose(1, 2), None

    def enter(_module: Any, args: Any) -> Any:
        hidden = args[0].clone()
        hidden.scatter_(1, kept[0][..., None].expand_as(entering), entering)
        return hidden, *args[1:]

    text = model.model.language_model
    hook = text.layers[0].register_forward_pre_hook(enter)
    try:
        with attention_replaced([layer.self_attn for layer in text.layers], [text.config], attend):
            yield
    finally:
        hook.remove()


@pytest.mark.parametrize("baseline", TIGHT, ids=label)
def test_generates_what_a_masked_dense_model_does(
    model: Any, inputs: dict[str, torch.Tensor], baseline: Baseline
) -> None:
    entered: list[torch.Tensor] = []
    with applied(model, baseline) as record:
        note = model.model.language_model.layers[0].register_forward_pre_hook(lambda _m, args: entered.append(args[0]))
        found = generate(model, inputs)
        note.remove()
    prompt = inputs["input_ids"].shape[1]
    assert record.kept[-1].shape[1] < record.kept[0].shape[1] or record.kept[0].shape[1] < prompt
    with masked(model, record.kept, prompt, entered[0]):
        whole = inputs | {"input_ids": found.sequences, "attention_mask": torch.ones_like(found.sequences)}
        expected = model(**whole, use_cache=False).logits
    for step, logits in enumerate(found.logits):
        torch.testing.assert_close(logits, expected[:, prompt - 1 + step], rtol=1e-4, atol=1e-4)
        assert torch.equal(found.sequences[:, prompt + step], expected[:, prompt - 1 + step].argmax(-1))


@pytest.mark.parametrize("baseline", TIGHT, ids=label)
def test_cache_lacks_the_dropped_tokens_and_counts_them(
    model: Any, inputs: dict[str, torch.Tensor], baseline: Baseline
) -> None:
    with applied(model, baseline) as record:
        cache = generate(model, inputs).past_key_values
    prompt = inputs["input_ids"].shape[1]
    for layer, kept in zip(cache.layers, record.kept, strict=True):
        assert layer.keys.shape[2] == kept.shape[1] + NEW - 1
        assert layer.get_seq_length() == prompt + NEW - 1


@pytest.mark.parametrize("baseline", TIGHT, ids=label)
def test_decoding_several_tokens_at_once_is_decoding_them_in_turn(
    model: Any, inputs: dict[str, torch.Tensor], baseline: Baseline
) -> None:
    with applied(model, baseline):
        found = generate(model, inputs)
        cache, prompt = DynamicCache(config=model.config.text_config), inputs["input_ids"].shape[1]
        model(**inputs, past_key_values=cache)
        tail = model(input_ids=found.sequences[:, prompt:-1], past_key_values=cache).logits
    torch.testing.assert_close(tail, torch.stack(found.logits[1:], 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("baseline", TIGHT, ids=label)
def test_a_batch_is_its_rows(model: Any, inputs: dict[str, torch.Tensor], baseline: Baseline) -> None:
    with applied(model, baseline):
        together = generate(model, inputs)
        for row in range(2):
            alone = generate(model, {name: value[row : row + 1] for name, value in inputs.items()})
            assert torch.equal(alone.sequences[0], together.sequences[row])


@pytest.mark.parametrize("baseline", WHOLE, ids=label)
def test_keeping_everything_is_the_dense_model(model: Any, inputs: dict[str, torch.Tensor], baseline: Baseline) -> None:
    expected = generate(model, inputs)
    with applied(model, baseline) as record:
        found = generate(model, inputs)
        assert torch.equal(model(**inputs).logits, model(**inputs, use_cache=False).logits)
    assert record.budget == 1.0
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_budgets_are_the_schedules(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    ends = ROW_ENDS / IMAGE_TOKENS
    share = 0.45
    for baseline in (
        FastV.for_budget(share, 6),
        PyramidDrop.for_budget(share, 6),
        VisionZip.for_budget(share, ends),
        AIM.for_budget(share, 6),
    ):
        with applied(model, baseline) as record:
            generate(model, inputs)
        text = inputs["input_ids"].shape[1] - IMAGE_TOKENS
        expected = (share * IMAGE_TOKENS + text) / (IMAGE_TOKENS + text)
        assert abs(record.budget - expected) < 1.5 / IMAGE_TOKENS, baseline.name
        assert record.prefills == 2


def test_a_tower_observed_once_serves_later_blocks(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    with applied(model, VisionZip(0.3)):
        expected = generate(model, inputs).sequences
    tower = TowerAttention()
    with observed_tower(model, tower):
        model(**inputs)
    with applied(model, VisionZip(0.3, tower)):
        assert torch.equal(generate(model, inputs).sequences, expected)


def test_visionzip_of_a_padded_picture(model: Any) -> None:
    """Tiles of different sizes: the base view of 49 patches, and two that the padding cut."""
    generator = torch.Generator().manual_seed(2)
    sizes = torch.tensor([[28, 42]] * 2)
    pictures = torch.randn(2, 3, 3, 28, 28, generator=generator)
    baseline = VisionZip(0.4)
    with baseline.installed(model), torch.no_grad():
        packed = model.model.get_image_features(pixel_values=pictures, image_sizes=sizes).pooler_output
        count = len(packed[0])
        image = torch.ones(2, count + 3, dtype=torch.bool)
        image[:, -3:] = False
        positions = torch.arange(count + 3).expand(2, -1)
        hidden = torch.randn(2, count + 3, 64, generator=generator)
        prompt = Prompt(image, positions, count + 3, count, 1, 6, sizes)
        origin = baseline._origin(prompt, 2, 3, 49)
        found = baseline.reduce(0, hidden, prompt)
    score, key = baseline.tower.score.view(2, 3, 49), baseline.tower.key.view(2, 3, 49, -1)
    lengths = [int((origin // 49 == tile).sum()) for tile in range(3)]
    assert lengths[0] == 49 and all(0 < length < 49 for length in lengths[1:])
    kept, expected = [(origin < 0).nonzero()[:, 0], torch.arange(count, count + 3)], hidden.clone()
    for tile in range(3):
        tokens = (origin // 49 == tile).nonzero()[:, 0]
        at = origin[tokens] % 49
        for row in range(2):
            places, values = compress(
                hidden[row : row + 1, tokens], score[row : row + 1, tile, at], key[row : row + 1, tile, at],
                round(0.4 * len(tokens)),
            )  # fmt: skip
            expected[row, tokens[places[0]]] = values[0]
            if row == 0:
                kept.append(tokens[places[0]])
    assert torch.equal(prompt.positions[0], torch.cat(kept).sort().values)
    torch.testing.assert_close(found, expected.gather(1, prompt.positions[..., None].expand_as(found)))


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


HOST_READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.index")


def operations(model: Any, inputs: dict[str, torch.Tensor], new: int, baseline: Baseline | None) -> Counter[str]:
    with nullcontext() if baseline is None else applied(model, baseline), Operations() as seen:
        model.generate(**inputs, max_new_tokens=new, do_sample=False)
    return seen.counts


@pytest.mark.parametrize("baseline", TIGHT, ids=label)
def test_a_step_is_the_models_own(model: Any, inputs: dict[str, torch.Tensor], baseline: Baseline) -> None:
    """A decode step runs exactly the operations that it runs in the dense model."""
    step, dense = (
        operations(model, inputs, NEW, each) - operations(model, inputs, NEW - 1, each) for each in (baseline, None)
    )
    assert step == dense and sum(dense.values()) > 100


@pytest.mark.parametrize("baseline", [b for b in TIGHT if b.name != "VisionZip"], ids=label)
def test_choosing_tokens_reads_nothing(model: Any, inputs: dict[str, torch.Tensor], baseline: Baseline) -> None:
    """Between layers nothing waits for the device: a tight schedule reads no more than one that drops nothing."""
    whole = next(other for other in WHOLE if other.name == baseline.name)
    tight, loose = (operations(model, inputs, 1, each) for each in (baseline, whole))
    assert [tight[read] for read in HOST_READS] == [loose[read] for read in HOST_READS]


@pytest.mark.parametrize("wanted", [True, False])
def test_steps_use_no_cudnn(model: Any, inputs: dict[str, torch.Tensor], wanted: bool) -> None:
    decoder, seen = model.model.language_model, []
    flag, before = torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.cudnn_sdp_enabled()
    hook = decoder.layers[0].register_forward_pre_hook(lambda _m, args: seen.append((args[0].shape[1] > 1, flag())))
    torch.backends.cuda.enable_cudnn_sdp(wanted)
    try:
        alone = steps_without_cudnn(decoder)
        nested = (steps_without_cudnn(decoder), applied(model, FastV()))
        for outer, inner in ((nullcontext(), alone), (nullcontext(), applied(model, AIM(0.5))), nested):
            seen.clear()
            with outer, inner:
                generate(model, inputs)
                assert flag() is wanted
                with pytest.raises((RuntimeError, ValueError)):  # of the products, or of the pre-hook
                    decoder(inputs_embeds=torch.zeros(1, 1, 3))
                assert flag() is wanted
            assert seen[:NEW] == [(True, wanted)] + [(False, False)] * (NEW - 1)
        seen.clear()
        generate(model, inputs)
        assert [enabled for _, enabled in seen] == [wanted] * NEW
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
        hook.remove()


@pytest.mark.parametrize("baseline", TIGHT, ids=label)
def test_leaves_no_trace(model: Any, inputs: dict[str, torch.Tensor], baseline: Baseline) -> None:
    def hooks() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    expected, before = generate(model, inputs).sequences, hooks()
    with pytest.raises(ZeroDivisionError), applied(model, baseline):
        generate(model, inputs)
        raise ZeroDivisionError
    configs = (model.config.text_config, model.config.vision_config)
    assert [config._attn_implementation for config in configs] == ["sdpa", "sdpa"]
    assert (hooks(), len(_functions)) == (before, 0)
    assert "get_image_features" not in vars(model.model)
    assert torch.equal(generate(model, inputs).sequences, expected)


def test_a_text_prompt_stays_whole(model: Any) -> None:
    ids = torch.arange(2, 40)[None]
    expected = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    for baseline in (FastV(), PyramidDrop(), AIM()):
        with applied(model, baseline) as record:
            assert torch.equal(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False), expected)
        assert record.budget == 1.0


def test_what_is_not_supported_says_so(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    padded = inputs | {"attention_mask": inputs["attention_mask"].clone()}
    padded["attention_mask"][0, :2] = 0
    with applied(model, FastV()):
        with pytest.raises(ValueError, match="FastV: prompts with padding"):
            model(**padded)
        with pytest.raises(ValueError, match="FastV: expected a new DynamicCache or none, got a StaticCache"):
            model(**inputs, past_key_values=StaticCache(config=model.config.text_config, max_cache_len=300))
        cache = model(**inputs).past_key_values
        with pytest.raises(NotImplementedError, match="cannot be cropped"):
            cache.crop(5)
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ValueError, match="must be given input_ids"):
            model(inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="no image token"), applied(model.model.language_model, FastV()):
        pass
