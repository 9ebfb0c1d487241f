"""Every experiment, with a few trials."""

import pytest

from . import all_experiments


def parameter(one):
    marks = [] if one.small else [pytest.mark.slow]
    if not one.holds:
        marks.append(pytest.mark.xfail(raises=AssertionError, reason="known not to hold"))
    return pytest.param(one, marks=marks, id=f"{one.id}-{one.run.__name__}")


@pytest.mark.parametrize("one", [parameter(one) for one in all_experiments()])
def test_the_claim_holds(one, tmp_path):
    outcome = one.run(tmp_path, one.small or 1)
    if outcome.trials == 0:
        pytest.skip(outcome.note)
    assert outcome.passed == outcome.trials, f"{one.claim}: {outcome}"
