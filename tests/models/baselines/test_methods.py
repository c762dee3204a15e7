"""Each baseline's schedule and choice, against examples worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from zipvl.baselines import AIM, FastV, PyramidDrop, VisionZip, image_budget
from zipvl.baselines.aim import TEMPERATURE, merge_most_similar, walked
from zipvl.baselines.common import keep_best, last_query_importance
from zipvl.baselines.visionzip import compress


def test_last_query_importance() -> None:
    # Two heads that share a key head. Head 0 asks along x: scores 0, ln 2, ln 5, so 1/8, 2/8, 5/8. Head 1 asks nothing.
    k = torch.tensor([[0.0, 0.0], [math.log(2), 0.0], [math.log(5), 9.0]]).view(1, 1, 3, 2)
    q = torch.full((1, 2, 3, 2), 100.0)
    q[0, 0, 2], q[0, 1, 2] = torch.tensor([2.0, 0.0]), torch.zeros(2)
    expected = (torch.tensor([1.0, 2.0, 5.0]) / 8 + 1 / 3) / 2
    torch.testing.assert_close(last_query_importance(q, k, 0.5)[0], expected)


def test_keep_best() -> None:
    image = torch.tensor([[False, True, True, True, True, False]] * 2)
    scores = torch.tensor([[0.0, 0.1, 0.4, 0.2, 0.4, 0.0], [0.9, 0.1, 0.1, 0.1, 0.1, 0.9]])
    assert keep_best(scores, image, 4).tolist() == [[0, 2, 4, 5], [0, 1, 2, 5]]
    assert keep_best(scores, image, 2).tolist() == [[0, 5], [0, 5]]


def test_fastv_schedule() -> None:
    baseline = FastV()  # K = 2, R = 50%
    assert baseline.schedule(6) == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    assert [baseline.observes(i, 6) for i in range(6)] == [False, True, False, False, False, False]
    assert sum(baseline.schedule(32)) / 32 == 0.53125
    assert FastV.for_budget(0.5, 6).keep == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"2 of 6 layers see everything, so the least is 0\.333"):
        FastV.for_budget(0.3, 6)


def test_pyramiddrop_schedule() -> None:
    baseline = PyramidDrop()
    assert baseline.stages(32) == [8, 16, 24]
    assert baseline.schedule(8) == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert sum(baseline.schedule(32)) / 32 == 0.46875  # the paper's 46.8%
    assert [i for i in range(32) if baseline.observes(i, 32)] == [7, 15, 23]
    assert baseline.stages(6) == [2, 3, 4]
    assert PyramidDrop.for_budget(0.46875, 32).keep == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"PyramidDrop: budget: 0\.064 of the image tokens is out of reach; 0\.333"):
        PyramidDrop.for_budget(0.064, 6)


def test_visionzip_compress() -> None:
    # Eight patches to four: dominant are round(4 * 54 / 64) = 3, those of the best scores: 1, 4 and 6. Of the rest,
    # 0 2 3 5 7, one is a target: the first, at stride 5. All others join it: the mean of features 0, 2, 3, 5, 7.
    score = torch.tensor([[0.1, 0.9, 0.2, 0.1, 0.8, 0.3, 0.7, 0.2]])
    features = torch.arange(8.0).view(1, 8, 1) ** 2
    places, values = compress(features, score, torch.randn(1, 8, 3), 4)
    assert places.tolist() == [[0, 1, 4, 6]]
    assert values.flatten().tolist() == pytest.approx([(0 + 4 + 9 + 25 + 49) / 5, 1, 16, 36])


def test_visionzip_merges_by_key() -> None:
    # Thirteen patches to twelve tokens: dominant 10 (patches 3 to 12), targets at stride 1: patches 0 and 1. Patch 2
    # has the key of patch 1, whatever their features are.
    score = torch.arange(13.0)[None]
    key = torch.zeros(1, 13, 2)
    key[0, 0], key[0, 1], key[0, 2] = torch.tensor([1.0, 0]), torch.tensor([0, 1.0]), torch.tensor([0.1, 5.0])
    features = torch.zeros(1, 13, 1)
    features[0, :3, 0] = torch.tensor([2.0, 10.0, 4.0])
    places, values = compress(features, score, key, 12)
    assert places.tolist() == [[0, 1, *range(3, 13)]]
    assert values[0, :2, 0].tolist() == [2.0, 7.0]


def test_visionzip_budget() -> None:
    assert VisionZip.for_budget(1 / 3).keep == pytest.approx(1 / 3)
    assert VisionZip.for_budget(0.5, row_ends=0.2).keep == pytest.approx(0.375)
    with pytest.raises(ValueError, match=r"row ends alone are 0\.200"):
        VisionZip.for_budget(0.1, row_ends=0.2)


def test_aim_merging() -> None:
    # Sources are tokens 0, 2, 4; destinations 1, 3, 5. 0 is parallel to 3, 4 nearly to 3, 2 at 45 degrees to 1.
    tokens = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 1], [2, 0, 0], [3, 0.1, 0], [0, 0, -1]])[None]
    places = torch.tensor([[10, 11, 12, 13, 14, 15]])
    left, at = merge_most_similar(tokens, places, 5)
    assert at.tolist() == [[11, 12, 13, 14, 15]]
    torch.testing.assert_close(left[0, 2], torch.tensor([1.5, 0, 0]))
    left, at = merge_most_similar(tokens, places, 4)
    assert at.tolist() == [[11, 12, 13, 15]]
    torch.testing.assert_close(left[0, 2], torch.tensor([2.0, 0.1 / 3, 0]))
    # A second round begins when half are gone: 1 (with 2), 3 (with 0 and 4) and 5 are left; 1 may merge into 3 only.
    left, at = merge_most_similar(tokens, places, 2)
    assert at.tolist() == [[13, 15]]
    first = torch.tensor([0, 1.0, 0.5])
    torch.testing.assert_close(left[0, 0], (torch.tensor([2.0, 0.1 / 3, 0]) + first) / 2)


def test_aim_walk() -> None:
    # Three tokens, causal. Head 0: 1 and 2 look at token 0 alone. Head 1: every token looks at itself alone.
    nothing = -torch.inf
    heads = [[[0, nothing, nothing], [0, nothing, nothing], [0, nothing, nothing]]]
    heads.append([[0, nothing, nothing], [nothing, 0, nothing], [nothing, nothing, 0]])
    assert walked(torch.tensor([heads]))[0].flatten().tolist() == pytest.approx([1, 0, 0, 1 / 3, 1 / 3, 1 / 3])
    # One head, two tokens; token 1 gives itself 1/4: after five steps it has (1/4) ** 5 of its half.
    logits = torch.tensor([[[[0, nothing], [math.log(3) * TEMPERATURE, 0]]]])
    assert walked(logits)[0, 0].tolist() == pytest.approx([1 - 0.5 / 4**5, 0.5 / 4**5], rel=1e-4)


def test_aim_importance() -> None:
    # Two heads that share a key head, two tokens. Head 0 asks nothing: from token 1 half goes back to 0 at each step,
    # so 0.5 / 2 ** 5 is left at it. Head 1 asks for token 1 so loudly that each token looks at itself alone.
    k = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).view(1, 1, 2, 2)
    q = torch.zeros(1, 2, 2, 2)
    q[0, 1, 1, 0] = 100.0
    shares = torch.tensor([[1 - 0.5 / 2**5, 0.5 / 2**5], [0.5, 0.5]])
    torch.testing.assert_close(AIM().importance(q, k, 1.0)[0], shares.square().mean(0).sqrt())


def test_aim_schedule() -> None:
    baseline = AIM(0.25)
    expected = [1.0] * 15 + [max(0.0, 1 - 0.125 * (i - 14 + 1)) for i in range(14, 27)]
    assert baseline.schedule(28) == pytest.approx([0.25 * share for share in expected])
    assert AIM(1.0, 1.5).schedule(6) == [1.0] * 6
    for share in (0.064, 0.333, 0.7, 0.9, 1.0):
        assert sum(AIM.for_budget(share, 6).schedule(6)) / 6 == pytest.approx(share, abs=1e-6)


def test_image_budget() -> None:
    assert image_budget(0.5, 110, 100) == pytest.approx(0.45)
    assert image_budget(1.0, 110, 100) == 1.0
    with pytest.raises(ValueError, match=r"budget must be in \(0\.0909, 1\] for 10 text tokens, got 0\.05"):
        image_budget(0.05, 110, 100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FastV(0), "FastV: layer must be at least 1"),
        (lambda: FastV(2, 1.5), r"keep in \[0, 1\], got 2 and 1.5"),
        (lambda: PyramidDrop(-1), r"PyramidDrop: keep must be in \[0, 1\], got -1"),
        (lambda: VisionZip(0.0), r"VisionZip: keep must be in \(0, 1\], got 0.0"),
        (lambda: AIM(2.0), r"AIM: retain must be in \(0, 1\], got 2.0"),
    ],
)
def test_bad_parameters(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
