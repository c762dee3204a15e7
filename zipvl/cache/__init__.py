"""A transformers cache that keeps what ZipVL selected."""

from zipvl.cache._cache import ZipVLCache, check_bits, check_model, expect_candidates, is_ready, make_sparse, settle
from zipvl.cache._layer import ZipVLCacheLayer
from zipvl.cache._quantized import QuantizedKV

__all__ = [
    "QuantizedKV",
    "ZipVLCache",
    "ZipVLCacheLayer",
    "check_bits",
    "check_model",
    "expect_candidates",
    "is_ready",
    "make_sparse",
    "settle",
]
