"""ZipVLConfig takes what its fields mean, stores it as Python's own, and says what is wrong with the rest."""

from __future__ import annotations

import json
import math
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zipvl import ZipVLConfig

BELOW_2_63 = ("seed", "keep_recent", "min_tokens", "dense_below", "local_window", "dense_first_layers")
COUNTS = ("num_recent", "num_random", *BELOW_2_63)

REFUSED: list[tuple[str, list[Any]]] = [
    ("tau", ["0.9", True, 0.5j, [0.5], 0, -0.1, 1.5, math.nan, math.inf, np.float32(1.5), np.bool_(True)]),
    ("tau", [np.array([0.5]), Fraction(1, 10**400), 10**400, 10**5000]),
    ("ratio", ["0.5", False, 0.0, -1, 1.0001, math.nan, -math.inf, np.str_("0.5"), b"1"]),
    ("max_ratio", [None, "1", True, 0, -0.5, 1.01, math.nan, np.bool_(False)]),
    ("cache_ratio", ["0.5", True, 0.0, -1, 1.0001, math.nan, np.bool_(False)]),
    *[
        (name, [None, -1, 2.0, 1.5, "3", True, [1], np.float64(2), np.bool_(True), np.int64(-1)])
        for name in (*COUNTS, "num_sinks")
    ],
    *[(name, [2**31, 2**40, np.int64(2**31)]) for name in ("num_recent", "num_random")],
    *[(name, [2**63, 2**70, 10**5000, np.uint64(2**63)]) for name in BELOW_2_63],
    ("dense_below", ["automatic", "256", ""]),
    ("decode", [None, "fast", "Graph", 1, True]),
    *[(name, [None, "no", 0, 1]) for name in ("vision_attention", "vision_compile", "decode_compile", "keep_text")],
    ("text_prompts", [None, "Dense", "auto", 1, True, ["dense"]]),
    ("all_queries", [None, "no", "", 0, 1, 1.0, np.int64(1), []]),
    ("skip_projections", ["auto", 0, 1, 0.0, np.int64(0), ()]),
    ("cache", [None, "keep", "Drop", 1, ["drop"], np.array(["drop", "full"])]),
    *[
        (name, [None, 0, 3, 16, 4.0, "4", True, np.int64(5), (2, 4), (4, 4, 4), (8, 4), (4,), (), ("4", "2")])
        for name in ("high_bits", "low_bits")
    ],
    ("layers", [0, 1.5, True, "all", "0", b"01", [-1], [0, 1.0], ["0"], [True], [None], {0: 1}, np.array(3)]),
    ("layers", [np.array([0.0]), np.array([[0, 1]])]),
    (
        "skip_mlp_layers",
        [None, 0, 1.5, True, "1", b"1", [-1], [0, 1.0], ["0"], [True], [None], {0: 1}, np.array([0.5])],
    ),
]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED for value in values], ids=lambda v: str(type(v))
)
def test_refused_with_the_name_of_the_field(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^ZipVLConfig: {name} must be .*, got "):
        ZipVLConfig(**{name: value})
    with pytest.raises(ValueError, match=rf"^ZipVLConfig: {name} must be .*, got "):
        ZipVLConfig().replace(**{name: value})


@pytest.mark.parametrize(
    ("name", "given", "stored"),
    [
        ("tau", 1, 1.0),
        ("tau", np.float16(0.5), 0.5),
        ("tau", np.array(0.25), 0.25),
        ("ratio", np.int64(1), 1.0),
        ("ratio", Fraction(1, 4), 0.25),
        ("ratio", None, None),
        *[(name, np.int32(8), 8) for name in COUNTS],
        *[(name, np.array(9), 9) for name in COUNTS],
        *[(name, 2**63 - 1, 2**63 - 1) for name in BELOW_2_63],
        ("dense_below", "auto", "auto"),
        ("all_queries", np.bool_(True), True),
        ("skip_projections", np.bool_(False), False),
        ("skip_projections", None, None),
        ("decode", "graph", "graph"),
        ("vision_attention", np.bool_(False), False),
        ("vision_compile", np.bool_(True), True),
        ("decode_compile", np.bool_(True), True),
        ("keep_text", np.bool_(False), False),
        ("text_prompts", "sparse", "sparse"),
        ("max_ratio", Fraction(1, 2), 0.5),
        ("high_bits", np.uint8(8), (8, 8)),
        ("low_bits", 2, (2, 2)),
        ("low_bits", [4, np.int64(2)], (4, 2)),
        ("layers", None, None),
        ("layers", [2, 0], (2, 0)),
        ("layers", range(3), (0, 1, 2)),
        ("layers", np.array([1, 3]), (1, 3)),
        ("layers", (np.int64(4),), (4,)),
        pytest.param("layers", (i for i in (5, 6)), (5, 6), id="layers-a generator"),
        ("layers", [], ()),
        ("skip_mlp_layers", [3, 1], (3, 1)),
        ("skip_mlp_layers", np.array([1, 3]), (1, 3)),
        ("skip_mlp_layers", range(0), ()),
    ],
    ids=str,
)
def test_stored_as_pythons_own(name: str, given: Any, stored: Any) -> None:
    config = ZipVLConfig(**{name: given})
    got = getattr(config, name)
    assert got == stored and type(got) is type(stored)
    if isinstance(got, tuple):
        assert all(type(layer) is int for layer in got)
    plain = ZipVLConfig(**{name: stored})
    assert config == plain and hash(config) == hash(plain) and pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(("recent", "random"), [(0, 0), (2**30, 2**30), (1, 2**31 - 1)])
def test_the_number_of_probes(recent: int, random: int) -> None:
    with pytest.raises(ValueError, match=r"ZipVLConfig: num_recent \+ num_random must be .*, got"):
        ZipVLConfig(num_recent=recent, num_random=random)
    ZipVLConfig(num_recent=2**31 - 1, num_random=0)


def test_an_unknown_field_is_named() -> None:
    for make in (ZipVLConfig, ZipVLConfig().replace):
        with pytest.raises(TypeError, match="tua"):
            make(tua=0.5)


def test_replace_changes_what_it_names_alone() -> None:
    config = ZipVLConfig(tau=0.5, layers=[1])
    assert config.replace(seed=3) == ZipVLConfig(tau=0.5, layers=(1,), seed=3)
    assert config == ZipVLConfig(tau=0.5, layers=(1,))


def test_sinks_take_effect_with_a_window_alone() -> None:
    config = ZipVLConfig(local_window=64, num_sinks=np.int64(4))
    assert config.sinks == config.attention_kwargs()["num_sinks"] == 4
    without = config.replace(local_window=0)
    assert without.sinks == without.attention_kwargs()["num_sinks"] == 0


def test_a_layer_is_not_both_dense_and_named_sparse() -> None:
    assert ZipVLConfig(layers=(2, 3), dense_first_layers=2).layers == (2, 3)
    with pytest.raises(ValueError, match=r"ZipVLConfig: layers must be None or at least dense_first_layers=2, got"):
        ZipVLConfig(layers=(1, 3), dense_first_layers=2)


def test_the_last_tokens_mlp_is_never_skipped() -> None:
    assert ZipVLConfig(keep_recent=0).skip_mlp_layers == ()
    with pytest.raises(ValueError, match=r"skip_mlp_layers must be empty with keep_recent=0, got \(1,\)"):
        ZipVLConfig(keep_recent=0, skip_mlp_layers=[1])


@pytest.mark.parametrize("cache", ["full", "quantize"])
def test_a_budget_of_the_cache_is_drop_s_alone(cache: Any) -> None:
    config = ZipVLConfig(cache="drop", cache_ratio=np.float32(0.25))
    assert type(config.cache_ratio) is float and config.cache_ratio == 0.25
    assert hash(config) == hash(ZipVLConfig(cache="drop", cache_ratio=0.25))
    for make in (lambda: ZipVLConfig(cache=cache, cache_ratio=0.25), lambda: config.replace(cache=cache)):
        with pytest.raises(ValueError, match=rf'ZipVLConfig: cache_ratio must be None with cache="{cache}", got 0.25'):
            make()
    with pytest.raises(ValueError, match=r"cache_ratio must be None with num_recent=0, got 0\.25"):
        config.replace(num_recent=0)


def test_the_paper_s_method_has_nothing_of_ours() -> None:
    paper = ZipVLConfig.paper(tau=0.9, cache="full")
    assert (paper.local_window, paper.num_sinks, paper.keep_text, paper.text_prompts) == (0, 0, False, "sparse")
    assert (paper.max_ratio, paper.dense_first_layers, paper.all_queries) == (1.0, 0, False)
    assert paper.cache_ratio is None
    assert (paper.tau, paper.cache, ZipVLConfig.paper().cache) == (0.9, "full", "drop")
    with pytest.raises(TypeError, match="tua"):
        ZipVLConfig.paper(tua=0.5)


def test_text_keeps_more_unless_a_tau_is_given() -> None:
    config = ZipVLConfig(local_window=8)
    assert config.tau is None
    assert config.for_model(visual=True) == config.replace(tau=0.9)
    assert config.for_model(visual=False) == config.replace(tau=0.97)
    assert config.attention_kwargs() == config.replace(tau=0.97).attention_kwargs()  # of no model
    given = ZipVLConfig(tau=0.5)
    assert given.for_model(visual=True) is given.for_model(visual=False) is given
    assert ZipVLConfig.paper().for_model(visual=True).tau == 0.975


def test_attention_gets_what_decides_in_it() -> None:
    config = ZipVLConfig.paper(local_window=64, num_sinks=4, max_ratio=0.5)
    given = config.attention_kwargs()
    assert (given["local_window"], given["num_sinks"], given["max_ratio"]) == (64, 4, 0.5)
    assert all(getattr(config, name) == value for name, value in given.items())


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        ZipVLConfig(),
        ZipVLConfig.paper(cache="quantize"),
        ZipVLConfig(ratio=0.25, layers=(1, 3), dense_below=300, high_bits=8, skip_projections=False),
        ZipVLConfig(cache="drop", cache_ratio=1 / 3, seed=2**63 - 1),
    ],
)
def test_a_saved_configuration_is_loaded_as_it_was(tmp_path: Path, config: ZipVLConfig) -> None:
    config.save(tmp_path / "zipvl.json", origin={"model": "m"})
    assert ZipVLConfig.load(tmp_path / "zipvl.json") == config
    assert hash(ZipVLConfig.load(str(tmp_path / "zipvl.json"))) == hash(config)
    assert json.loads((tmp_path / "zipvl.json").read_text())["origin"] == {"model": "m"}
    assert ZipVLConfig.load(tmp_path / "zipvl.json", tau=0.5, seed=1) == config.replace(tau=0.5, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["zipvl.json"]


def test_a_field_that_a_file_lacks_has_its_default(tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text('{"config": {"tau": 0.5}}')
    assert ZipVLConfig.load(tmp_path / "some.json") == ZipVLConfig(tau=0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "path must be a file, got '.*': No such file"),
        (b"{", "path must be a JSON file, got"),
        (b'{"config": "caf\xe9"}', "path must be a JSON file, got"),
        (b"[]", 'path must be a JSON object with an object "config"'),
        (b'{"tau": 0.5}', 'path must be a JSON object with an object "config"'),
        (b'{"config": {"tua": 0.5, "tau": 0.5}}', "path must name fields of ZipVLConfig, got tua in"),
        (b'{"config": {"tau": 1.5}}', "tau must be in"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"^ZipVLConfig: {message}"):
        ZipVLConfig.load(tmp_path / "bad.json")


def test_what_stands_beside_a_configuration_is_not_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="about must be entries beside config"):
        ZipVLConfig().save(tmp_path / "zipvl.json", config=1)
    with pytest.raises(OSError):
        ZipVLConfig().save(tmp_path / "none" / "zipvl.json")
