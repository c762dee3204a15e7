"""What differs between versions of vLLM, without vLLM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from zipvl.vllm.compat import Admissions, accepted, replaced


@dataclass
class Metadata:
    rows: int
    req_idx: int | None = None

    def replace(self, **changes: Any) -> Metadata:
        return replace(self, **changes)


@dataclass
class OlderMetadata:
    rows: int
    _seq_lens_cpu: int | None = 3

    def replace(self, **changes: Any) -> OlderMetadata:
        return replace(self, **changes)


def test_fields_that_a_version_lacks_are_left_out() -> None:
    changes = {"rows": 2, "req_idx": 7, "_seq_lens_cpu": None}
    assert replaced(Metadata(1), **changes) == Metadata(2, 7)
    assert replaced(OlderMetadata(1), **changes) == OlderMetadata(2, None)


def test_arguments_that_a_version_does_not_take_are_left_out() -> None:
    def newer(num_reqs: int, kv_cache_dtype: str = "auto") -> None: ...

    def older(num_reqs: int) -> None: ...

    assert accepted(newer, kv_cache_dtype="auto") == {"kv_cache_dtype": "auto"}
    assert accepted(older, kv_cache_dtype="auto") == {}


def test_the_newer_scheduler_says_how_long_a_prompt_is() -> None:
    admissions = Admissions()
    assert admissions.whole("a", 300, {"prefill_end": 400, "apply_admission_cap": True}) == 400
    assert admissions.whole("a", 300, {"prefill_end": 300}) == 300


def test_the_older_scheduler_asks_for_the_whole_request_first() -> None:
    admissions = Admissions()
    assert admissions.whole("a", 400, {"apply_admission_cap": True}) == 400
    assert admissions.whole("a", 300, {"apply_admission_cap": False}) == 400, "the step holds less: cut"
    assert admissions.whole("b", 50, {}) == 0, "never asked for as a whole"
    admissions.forget("a")
    assert admissions.whole("a", 300, {}) == 0
    assert admissions.whole("a", 420, {"apply_admission_cap": True}) == 420, (
        "back from pre-emption, with what it had decoded"
    )
