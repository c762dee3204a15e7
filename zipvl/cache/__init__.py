"""A transformers cache that keeps what ZipVL selected."""

from zipvl.cache._cache import ZipVLCache, check_model, expect_candidates, is_ready, make_sparse, settle
from zipvl.cache._layer import ZipVLCacheLayer

__all__ = ["ZipVLCache", "ZipVLCacheLayer", "check_model", "expect_candidates", "is_ready", "make_sparse", "settle"]
