"""A short run of the fuzzer, by fresh seeds: python tests/tools/fuzz.py runs a long one, or one case alone."""

import pytest
from fuzz import report, run_case, run_cases, seeds
from fuzz_refusals import REFUSED, unrefused

CASES = 200

pytestmark = pytest.mark.usefixtures("one_thread")  # cases are too small for two


@pytest.mark.filterwarnings("ignore")
def test_random_calls(seed):
    failures = run_cases(seeds(seed, CASES))
    assert not failures, "python tests/tools/fuzz.py\n" + report(failures)


def test_a_case_is_its_seed(seed):
    """Alone as in a run, whatever ran before it."""
    cases = seeds(seed, 4)
    assert [run_case(s) for s in cases] == [run_case(s) for s in reversed(cases)][::-1]


@pytest.mark.parametrize(("name", "call", "values"), REFUSED)
def test_wrong_arguments_are_refused_by_name(name, call, values):
    assert not [wrong for value in values if (wrong := unrefused(name, call, value))]
