"""ZipVL inside vLLM: a plugin of an unmodified server (docs/vllm.md).

vLLM finds ``zipvl.vllm.plugin.register`` by its entry point and does as before; the plugin acts where
``--additional-config '{"zipvl": {...}}'`` asks for it. ``plugin``, ``versions``, ``options``, ``startup``,
``rows``, ``paged`` and ``report`` import no vLLM, and nothing here imports transformers.
"""
