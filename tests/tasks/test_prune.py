import pytest

from tasks.stages.prune import say_if_far


@pytest.mark.parametrize(
    ("removed", "given", "said"),
    [
        (0.273, {"ratio": 0.3}, False),
        (0.238, {"ratio": 0.3}, True),
        (0.34, {"ratio": 0.3}, True),
        (0.0476, {"ratio": 0.3, "target": "80M"}, False),
    ],
)
def test_a_plan_that_is_far_from_the_ratio_says_so(removed, given, said, caplog):
    say_if_far(removed, {"align": 96, **given})
    line = f"{removed:.3g} of the prunable parameters are removed, prune.ratio asks for 0.3"
    assert (line in caplog.text and "prune.align = 96" in caplog.text) == said
