"""The one object that a forward of a decoder hands to its attention layers: ``Call``."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import sdpa_mask

from zipvl import budget, policy
from zipvl.config import ZipVLConfig
from zipvl.ranks import OverRanks
from zipvl.stats import Stats
from zipvl.transformers.cache import ZipVLCache
from zipvl.transformers.cache_layer import ZipVLCacheLayer
from zipvl.transformers.mlp import Passed, rows_of
from zipvl.transformers.reasons import NOT_PLAIN_CAUSAL, TEXT, Dense, reason_dense
from zipvl.transformers.storage import Tokens
from zipvl.transformers.target import is_source, layer_index
from zipvl.transformers.visual import Visual, VisualMask


class Run:
    """One configuration in force on one model, and what is recorded of it.

    Args:
        config: what to keep.
        stats: where prefills are recorded; None: nowhere.
        in_block: in force for the length of a block: a copy of the model would stay behind after it, and record here.
        cost_key: ``policy.cost_key(config)``, where it was made beforehand.
        visual_mask: what the caller says of visual tokens; None: input ids decide.
    """

    def __init__(
        self,
        config: ZipVLConfig,
        stats: Stats | None = None,
        *,
        in_block: bool = False,
        cost_key: str | None = None,
        visual_mask: VisualMask | None = None,
    ) -> None:
        self.config, self.stats, self.in_block, self.visual_mask = config, stats, in_block, visual_mask
        self.cost_key = policy.cost_key(config) if cost_key is None else cost_key
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        if self.in_block:
            raise TypeError(
                "zipvl.sparse: a model cannot be copied or pickled inside the block; do it before or after, and open a "
                "block on the copy (state_dict() works anywhere)"
            )
        return self.__dict__

    def warn_once(self, text: str) -> None:
        """Warns, the first time in a run that records; not while a graph is traced, where a warning would end it."""
        if torch.compiler.is_compiling() or text in self._warned:
            return
        if self.stats is not None:
            self._warned.add(text)
        warnings.warn(text, stacklevel=3)


DEFAULT_RUN = Run(ZipVLConfig(text_prompts="sparse", keep_text=False).for_model(visual=False))
"""The ``Run`` of a model with ``attn_implementation="zipvl"`` that nobody configured. It has no hooks that could see
which tokens are visual."""


@dataclass(frozen=True)
class Selected:
    """What a sparse layer leaves for later ones that attend to its keys and values."""

    tokens: Tokens
    """Those that it attended to."""
    index: torch.Tensor
    """``[B, S]``, the selected ones."""
    count: torch.Tensor
    """``[B]``, how many."""
    stored: tuple[torch.Tensor, torch.Tensor] | None
    """Of a cache with a budget of its own, as ``Stats.add`` takes it."""
    last_key: torch.Tensor | None
    """``[B, n]`` int32, the last token that each row sees; None: itself."""
    dense_below: int
    """The fewest tokens of a sparse prompt."""


class Call:
    """Everything that one forward carries, from the pre-hook of the decoder to each attention function.

    Args:
        run: the run in force.
        cache: the cache that the decoder is given, if any. A ``ZipVLCache``'s own configuration decides.
        visual: which tokens are visual; None: none.
        over_ranks: the mean of scores over the processes that have some of the heads each; None: all are here.

    Attributes:
        candidates: how many last tokens are guesses of assisted decoding, behind the end of the prompt.
        reached: whether any attention function was handed this object.
        saw_prefill: whether any layer ran a prefill.
        passed: where attention leaves selections for MLPs; None: every MLP runs for every token.
        selected: of sparse layers that others share keys and values with, by their index.
        behind: layers that were packed before this forward.
    """

    reached = saw_prefill = False
    passed: Passed | None = None
    # What is made once for all layers, and of which tensors.
    _extra: tuple[torch.Tensor, torch.Tensor] | None = None
    _first_stored: tuple[Any, tuple[torch.Tensor, torch.Tensor | None]] | None = None
    _new: tuple[torch.Tensor | None] | None = None
    _real: tuple[torch.Tensor | None, int, torch.Tensor] | None = None
    _read: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None = None
    _seen_by: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(
        self, run: Run, cache: Cache | None, visual: Visual | None = None, over_ranks: OverRanks | None = None
    ) -> None:
        self.run, self.cache, self.visual = run, cache, Visual() if visual is None else visual
        self._layers: dict[int | None, Any] = {} if cache is None else dict(enumerate(cache.layers))
        self.over_ranks = over_ranks
        self.config, self.cost_key, self.candidates = run.config, run.cost_key, 0
        if isinstance(cache, ZipVLCache):
            self.config, self.cost_key = cache.config, cache.cost_key
            self.candidates, cache.candidates = cache.candidates, 0
        self.selected: dict[int, Selected] = {}
        self.behind: set[int] = set()
        self._answers: dict[tuple[int | None, bool], Dense | None] = {}
        self._prefills: list[str | None] = []
        self._expanded: dict[tuple[int, int, torch.device], torch.Tensor] = {}

    # The cache

    def layer_of(self, module: nn.Module, keys: torch.Tensor, values: torch.Tensor) -> ZipVLCacheLayer | None:
        """The ``ZipVLCacheLayer`` of a module that has just been updated; None in another cache, or without one.

        Args:
            keys, values: what the module's attention function is given.

        Raises:
            RuntimeError: these are not what the layer returned.
        """
        index = layer_index(module)
        layer = None if index is None else self.layer_at(index)
        if layer is None or layer.returned is None:
            return None
        returned_keys, returned_values = layer.returned
        if returned_keys is not keys or returned_values is not values:
            raise RuntimeError(
                f"zipvl attention ({type(module).__name__}): the keys or values of a ZipVLCache were altered between "
                "the cache and the attention function, so this model's attention is not supported with ZipVLCache"
            )
        return layer

    def stored_in(self, keys: torch.Tensor) -> ZipVLCacheLayer | None:
        """The ``ZipVLCacheLayer`` whose storage ``keys`` is: one that holds tokens as they came; None: there is
        none."""
        ours = (layer for layer in self._layers.values() if isinstance(layer, ZipVLCacheLayer))
        return next((layer for layer in ours if layer.packed is None and layer.keys is keys), None)

    def layer_at(self, index: int) -> ZipVLCacheLayer | None:
        """The ``ZipVLCacheLayer`` of that index; None in another cache, or without one."""
        layer = self._layers.get(index)
        return layer if isinstance(layer, ZipVLCacheLayer) else None

    @property
    def captures(self) -> bool:
        """Whether this is a forward of a ``generate()`` that captures its steps; dense prefills are packed for it."""
        return isinstance(self.cache, ZipVLCache) and self.cache.plan is not None and self.cache.plan.captures

    # The decision

    def is_chunk(self, new: int, tokens: int) -> bool:
        """Whether ``new`` of ``tokens`` tokens are a chunk of a prompt, behind a filled cache, that may be sparse.

        Not so few that their probes would be all of them, which costs what dense attention does: decoded tokens, a
        short turn. Nor candidates of assisted generation, nor what comes behind a quantised cache.
        """
        if self.config.cache == "quantize" or getattr(self.cache, "assisted", False):
            return False
        return self.config.num_recent + self.config.num_random < new < tokens

    def dense_below(self, query_heads: int, head_dim: int, states: torch.Tensor, queries: int | None = None) -> int:
        """``policy.dense_below`` of a layer with so many heads; ``states`` has its dtype and device. ``queries`` is the
        length of a chunk, or None: all tokens are new."""
        if torch.compiler.is_compiling():
            queries = None  # it may be a symbol, and the answer is a constant
        return policy.dense_below(self.config, query_heads, head_dim, states, self.cost_key, queries)

    def reason_dense(
        self, module: nn.Module, dense_below: int, tokens: int, attention_mask: torch.Tensor | None, **facts: Any
    ) -> Dense | None:
        """``reasons.reason_dense``, and that all rows are text which is to be dense; asked once a layer.

        Raises:
            ValueError: the layer is named in ``config.layers``, and is dense for more than its length.
        """
        key = layer_index(module), bool(getattr(module, "is_causal", False))  # cross-attention may share the index
        if key not in self._answers:
            answer = reason_dense(module, self.config, dense_below, tokens, attention_mask, **facts)
            if answer is None and self.config.text_prompts == "dense" and self.visual.kind() == "text":
                answer = Dense(TEXT, always=False)
            self._answers[key] = answer
            if answer is not None:
                self._tell(module, answer)
        return self._answers[key]

    def answer_of(self, index: int) -> Dense | None:
        """Why the prefill of the causal layer ``index`` was dense in this forward; None: it was not, or had none."""
        return self._answers.get((index, True))

    def _tell(self, module: nn.Module, dense: Dense) -> None:
        """An error if a layer that has to be sparse is dense, a warning if only this prompt makes it so."""
        named = self.config.layers is not None and layer_index(module) in self.config.layers
        if named and (dense.always or dense.words == NOT_PLAIN_CAUSAL):
            raise ValueError(
                f"zipvl attention ({type(module).__name__}, layer {layer_index(module)}): ZipVLConfig.layers names "
                f"this layer, but it cannot be sparse: {dense.words}. Leave it out, or use layers=None for every layer "
                "that can be."
            )
        if dense.words == TEXT:
            self.run.warn_once(
                f"zipvl: layers of {type(module).__name__} are dense for this prompt: {TEXT}. For sparse text use "
                'text_prompts="sparse"; where visual tokens cannot be known by their input ids (inputs_embeds, '
                "cross-attention), name them by visual_mask=."
            )
        if dense.words == NOT_PLAIN_CAUSAL:
            self.run.warn_once(
                f"zipvl: layers of {type(module).__name__} are dense for this prompt: {dense.words} (packed sequences, "
                "blocks of tokens that lie apart and attend both ways, or a custom 4-D mask)."
            )

    # Statistics

    def record(
        self,
        module: nn.Module,
        layer: ZipVLCacheLayer | None,
        states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dense_below: int,
        *,
        dense: Dense | None = None,
        chosen: torch.Tensor | None = None,
        count: torch.Tensor | None = None,
        stored: tuple[torch.Tensor, torch.Tensor] | None = None,
        mlp: torch.Tensor | None = None,
    ) -> None:
        """Writes one layer's prefill to the run's statistics.

        Args:
            states: ``[B, H, N, D]`` of the prompt.
            dense: why it was dense; None: ``chosen [B, N]`` and ``count [B]`` were selected.
            stored: of a cache with a budget of its own, ``[B, N]`` the tokens that it took, ``[B]`` how many it holds.
            mlp: ``[B]``, for how many tokens the layer's MLP runs; None: for all.
        """
        index, stats = layer_index(module), self.run.stats
        if stats is None or index is None:
            return
        tokens, words = states.shape[2], None if dense is None else dense.words
        if tokens >= dense_below:
            self._prefills.append(words)
        real = self._real_tokens(states, attention_mask)
        if torch.compiler.is_compiling():
            stats.traced.leave(index, words, tokens, real, chosen, count, stored, mlp)
            return
        entry = stats.add(index, words, tokens, real, chosen, count, stored, mlp)
        if layer is not None:
            layer.measured_by(entry)

    def _real_tokens(self, states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """``[B]``, how many of the tokens of ``states [B, H, N, D]`` are real."""
        batch, _, tokens, _ = states.shape
        if self._real is not None:
            mask, prompt, real = self._real
            if mask is attention_mask and prompt == tokens and real.shape[0] == batch and real.device == states.device:
                return real
        if attention_mask is None:
            real = torch.full((batch,), tokens, device=states.device)
        elif attention_mask.dim() == 2:
            real = attention_mask.sum(-1)
        else:  # [B, 1, N, N], boolean or additive: a real token attends to itself under every pattern
            itself = attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)
            real = (itself if itself.dtype == torch.bool else itself >= 0).sum(-1).expand(batch)
        self._real = attention_mask, tokens, real
        return real

    def leave_for_mlp(
        self,
        module: nn.Module,
        chosen: torch.Tensor,
        count: torch.Tensor,
        tokens: int,
        new: int,
        candidates: int,
        dense_below: int,
        masked: bool,
    ) -> torch.Tensor | None:
        """Leaves a layer's selection for its MLP, where that is to run for selected tokens alone.

        Args:
            chosen, count: ``[B, M]`` and ``[B]``, the selection among ``tokens``, of which the last ``new`` are those
                of this forward.
            candidates: tokens behind them, which the MLP runs for.
            masked: whether tokens may be padding.

        Returns:
            ``[B]``, for how many tokens of this forward it will run; None: for all.
        """
        index = layer_index(module)
        if self.passed is None or index is None or index not in self.config.skip_mlp_layers:
            return None
        most = policy.max_selected(self.config, tokens, dense_below, masked, self.keeps_more())
        rows = rows_of(chosen, count, tokens, new, candidates, most)
        self.passed.put(index, rows)
        return rows.mask.sum(-1)

    # Layers that attend to the keys and values of others

    def leave_for_shared(self, module: nn.Module, selected: Selected) -> None:
        """Leaves a layer's selection, where others attend to its keys and values."""
        index = layer_index(module)
        if index is not None and is_source(module):
            self.selected[index] = selected

    def note_behind(self, module: nn.Module) -> None:
        """Notes that a layer was packed before this forward."""
        index = layer_index(module)
        if index is not None:
            self.behind.add(index)

    def idle_reasons(self) -> list[str]:
        """Why every layer's prefill was dense, for a prompt that is long enough; empty if one was sparse, if there was
        none, or if a layer was dense for the prompt's text, of which there is a warning."""
        found = set(self._prefills)
        return [] if found & {None, TEXT} else sorted(words for words in found if words)

    # What is kept beside the selection

    def keeps_more(self) -> bool:
        """Whether tokens that the device alone knows may be kept on top of a selection: text, or rows of text."""
        config, kind = self.config, self.visual.kind
        return (config.keep_text and kind() != "text") or (config.text_prompts == "dense" and kind() == "mixed")

    def extra_mask(self, visual: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
        """``[B, S]`` bool: the text to keep on top, in rows with visual tokens; None: none. Padding counts as text.

        Args:
            visual: ``[B, S]``, which of the tokens are visual; None: none.
            like: ``[B, H, S, D]``, gives sizes and the device.
        """
        if not self.config.keep_text or self.visual.kind() == "text":
            return None
        rows = self.visual.rows(like.device)[:, None]
        if visual is None:
            return rows.repeat(1, like.shape[2])
        if self._extra is None or self._extra[0] is not visual:  # once for all layers, unless they hold other tokens
            self._extra = visual, ~visual & rows
        return self._extra[1]

    def visual_of(self, tokens: int, device: torch.device, *, new: bool = False) -> torch.Tensor | None:
        """``[B, tokens]`` bool: which of the first ``tokens`` so far, with ``new`` of this forward, are visual. None:
        none is, or it makes no difference."""
        if not self.config.keep_text or self.visual.kind() == "text":
            return None
        return self.visual.of(tokens, device, new=new)

    def keep_mask(self, token_mask: torch.Tensor | None, dense_below: int, like: torch.Tensor) -> torch.Tensor | None:
        """``[B, S]`` bool: the tokens of rows that keep them all, as they do alone; None: there are no such rows.

        Those are rows of fewer than ``dense_below`` real tokens, and rows of text where that is to be dense.

        Args:
            token_mask: ``[B, S]`` or None: all real.
            like: ``[B, H, S, D]``, gives sizes and the device.
        """
        whole = None if token_mask is None else token_mask.sum(-1, keepdim=True) < dense_below
        if self.config.text_prompts == "dense" and self.visual.kind() == "mixed":
            text = ~self.visual.rows(like.device)[:, None]
            whole = text if whole is None else whole | text
        if whole is None:
            return None
        return whole.repeat(1, like.shape[2]) if token_mask is None else token_mask & whole

    def first_stored(
        self, tokens: Tokens, new: int | None, dense_below: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``budget.first_stored``, made once for all layers unless they hold other tokens."""
        given = tokens.token_mask, tokens.visual, new, dense_below
        known, like = self._first_stored, tokens.keys
        if known is None or known[0][0] is not given[0] or known[0][1] is not given[1] or known[0][2:] != given[2:]:
            known = None
        if known is None or known[1][0].shape[1] != like.shape[2]:
            whole, extra = self.keep_mask(given[0], dense_below, like), self.extra_mask(given[1], like)
            known = given, budget.first_stored(self.config, like, new, given[0], whole, extra)
            self._first_stored = known
        return known[1]

    # The mask

    def read_mask(
        self, attention_mask: torch.Tensor | None, new: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The meaning of a mask of ``masks.mask_function``, read once for all layers of this forward.

        Returns:
            The mask itself and None. Of a uint8 mask ``[B, 1, 1, S]``: ``[B, S]`` bool of the real tokens, and None.
            Of an int32 mask ``[B, 1, 1, S]``: the same, or None if all are; and ``[B, new]`` int32, which of the
            ``new`` tokens is the last that each of them sees.
        """
        if attention_mask is None or attention_mask.dtype not in (torch.int32, torch.uint8):
            return attention_mask, None
        if self._read is None or self._read[0] is not attention_mask:
            last = attention_mask[:, 0, 0]
            if last.dtype == torch.uint8:
                self._read = attention_mask, last.bool(), None
                return self._read[1:]
            real, ends = last >= 0, last[:, -new:] - (last.shape[1] - new)
            known = not torch.compiler.is_compiling() and bool(real.all())
            self._read = attention_mask, None if known else real, ends
        return self._read[1:]

    def seen_by(self, ends: torch.Tensor, token_mask: torch.Tensor | None, tokens: int) -> torch.Tensor:
        """The 4-D mask that SDPA needs for the last tokens of ``tokens``, made once for all layers of this forward.

        Args:
            ends: ``[B, n]`` int32, of ``read_mask``.
            token_mask: ``[B, tokens]`` or None: all real.

        Returns:
            ``[B, 1, n, tokens]`` bool.
        """
        if self._seen_by is None or self._seen_by[0] is not ends or self._seen_by[1].shape[-1] != tokens:
            keys = torch.arange(tokens, device=ends.device) - (tokens - ends.shape[1])
            seen = keys <= ends[:, :, None]
            seen = seen if token_mask is None else seen & token_mask[:, None]
            self._seen_by = ends, seen[:, None]
        return self._seen_by[1]

    def new_mask(self, attention_mask: torch.Tensor | None, new: int) -> torch.Tensor | None:
        """Which of ``new`` tokens behind a filled cache are real: ``[B, new]``, or None: all. Read once a forward."""
        if attention_mask is None or self.candidates > 0:
            return None
        if self._new is None:
            mask = attention_mask[:, -new:]
            known = new > 1 and not torch.compiler.is_compiling() and bool(mask.all())
            self._new = (None if known else mask,)
        return self._new[0]

    def expanded(self, token_mask: torch.Tensor, new: int, device: torch.device) -> torch.Tensor:
        """``expand``, made once for all layers of this forward."""
        key = (new, token_mask.shape[1], device)
        if key not in self._expanded:
            self._expanded[key] = expand(token_mask, new, device)
        return self._expanded[key]


def expand(token_mask: torch.Tensor, new: int, device: torch.device) -> torch.Tensor:
    """The 4-D mask that SDPA needs for the last ``new`` tokens of ``token_mask [B, S]``: ``[B, 1, new, S]`` bool."""
    batch, length = token_mask.shape
    made = sdpa_mask(
        batch_size=batch,
        q_length=new,
        kv_length=length,
        q_offset=length - new,
        attention_mask=token_mask.to(device),
        allow_is_causal_skip=False,
        device=device,
    )
    assert made is not None
    return made
