"""ZipVL on one model: ``sparse`` for the length of a ``with`` block, ``configure`` for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from zipvl.config import ZipVLConfig
from zipvl.stats import Stats
from zipvl.transformers import target as targets
from zipvl.transformers.cache import check_cache
from zipvl.transformers.call import Run
from zipvl.transformers.hooks import DecoderHook
from zipvl.transformers.visual import VisualMask, check_visual_mask


@contextmanager
def sparse(
    model: nn.Module,
    config: ZipVLConfig | None = None,
    *,
    record_index: bool = False,
    visual_mask: VisualMask | None = None,
    **overrides: Any,
) -> Iterator[Stats]:
    """Runs the language part of ``model`` with ZipVL inside the ``with`` block, and leaves no trace after it.

    Vision towers and other submodels keep their attention. ``generate()`` and plain forwards get a ``ZipVLCache``
    where they would have made an ordinary dynamic cache. Blocks may be nested: the innermost one counts.

    Args:
        model: a transformers model, or a module around one.
        config: what to keep; the default configuration if None.
        record_index: keep the positions of the selected tokens in the statistics (``LayerStats.index``).
        visual_mask: which tokens are visual, where their input ids do not say it (``inputs_embeds``, images looked at
            by cross-attention): ``[B, N]`` bool of the prompts to come, column by position, or a function of the input
            ids and embeddings of one forward (``visual.VisualMask``). None: the ids of the model's image and video
            tokens.
        overrides: fields of ``config`` to change, such as ``tau=0.9``.

    Yields:
        the statistics of the block, which stay readable after it.

    Raises:
        ValueError: the model, ``config.layers``, ``config.skip_mlp_layers`` or ``visual_mask`` is not supported;
            inside the block, a cache that is not.
        RuntimeError: inside the block, layers that do not hand keyword arguments on to their attention function.
    """
    config = (config or ZipVLConfig()).replace(**overrides)
    check_visual_mask(visual_mask)
    hook, stats = _checked(model, config), Stats(record_index=record_index)
    config = hook.settled(config, visual_mask)
    with hook.block(Run(config, stats, in_block=True, visual_mask=visual_mask)):
        yield stats


def configure(
    model: nn.Module,
    config: ZipVLConfig | None,
    *,
    record_index: bool = False,
    visual_mask: VisualMask | None = None,
) -> Stats:
    """Runs the language part of ``model`` with ZipVL from now on, as ``sparse`` does inside its block.

    Deep copies of the model, pickled and saved ones are configured alike, with statistics of their own. Where a forward
    is given a ``ZipVLCache``, that cache's configuration counts.

    Args:
        model: a transformers model, or a module around one.
        config: what to keep; None undoes an earlier ``configure``.
        record_index: keep the positions of the selected tokens in the statistics.
        visual_mask: as for ``sparse``; a function, if the model is to be copied, must allow it.

    Returns:
        statistics of what runs from now on.

    Raises:
        ValueError: the model, ``config.layers``, ``config.skip_mlp_layers`` or ``visual_mask`` is not supported.
    """
    check_visual_mask(visual_mask)
    stats = Stats(record_index=record_index)
    if config is None:
        DecoderHook.of(targets.find(model)).unconfigure()
    else:
        hook = _checked(model, config)
        hook.configure(Run(hook.settled(config, visual_mask), stats, visual_mask=visual_mask))
    return stats


def _checked(model: nn.Module, config: ZipVLConfig) -> DecoderHook:
    """The hook of ``model``, which can do what ``config`` says."""
    target = targets.find(model)
    targets.check_layers(target, config)
    check_cache(config, target.decoder.config)
    hook = DecoderHook.of(target)
    hook.mlps.check(config)
    return hook
