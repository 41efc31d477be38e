"""Which rows settle, as a table, and how a window's width follows what its passes settle."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrt_core.window import CHEAP, PERIOD, WindowControl, num_settled

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], 1),
        ([0.0], 2),
        ([0.1], 2),
        ([0.11], 1),
        ([0.05, 0.05, 0.05], 4),
        ([0.05, 0.2, 0.05], 2),
        ([0.2, 0.0, 0.0], 1),
        ([NAN], 1),
        ([0.0, NAN, 0.0], 2),
        ([INF, 0.0], 1),
    ],
)
def test_settled_rows(changes: list[float], expected: int) -> None:
    """The first row always settles; the others up to the first change above 0.1, NaN included."""
    assert num_settled(changes, 0.1) == expected


def test_zero_tolerance_settles_only_what_stands_still() -> None:
    assert num_settled([0.0, 0.0, 1e-30, 0.0], 0.0) == 3


def widths_over(control: WindowControl, num_passes: int, settled_per_pass: int) -> list[int]:
    """The widths of so many passes, each as wide as it may be."""
    widths = []
    for _ in range(num_passes):
        widths.append(control.width)
        control.observe(min(settled_per_pass, control.width), control.width)
    return widths


def test_it_narrows_where_nothing_contracts() -> None:
    """One row a pass: halved every period, down to one or two positions."""
    control = WindowControl(128)
    expected = [width for width in (128, 64, 32, 16, 8, 4, 2, 1, 2, 1) for _ in range(PERIOD)]
    assert widths_over(control, len(expected), 1) == expected


@pytest.mark.parametrize(("width", "num_passes_a_row"), [(4, 2.7), (8, 3.7), (16, 4.6), (128, 5.7)])
def test_it_keeps_its_width_where_the_recurrence_contracts(width: int, num_passes_a_row: float) -> None:
    """What windows of such widths were measured to take."""
    control, settled = WindowControl(width), 0.0
    for _ in range(10 * PERIOD):
        before, settled = int(settled), settled + width / num_passes_a_row
        control.observe(int(settled) - before, width)
        assert control.width == width


@pytest.mark.parametrize(
    ("rows", "num_passes_a_row", "is_futile"), [(8, 8, True), (4, 4, True), (8, 3.7, False), (4, 2.7, False)]
)
def test_passes_that_the_budget_cuts_short_narrow_it_as_well(rows: int, num_passes_a_row: float, is_futile: bool) -> None:
    """Two or four prompts that share the 16 rows of a step."""
    control, settled = WindowControl(16), 0.0
    for _ in range(4 * PERIOD):
        before, settled = int(settled), settled + min(rows, control.width) / min(num_passes_a_row, control.width)
        control.observe(int(settled) - before, min(rows, control.width))
    assert control.width == (1 if is_futile else 16)


@pytest.mark.parametrize("settled_per_pass", [11, 16, 64, 128])
def test_it_stays_wide_where_passes_settle_enough(settled_per_pass: int) -> None:
    assert widths_over(WindowControl(128), 5 * PERIOD, settled_per_pass) == [128] * 5 * PERIOD


def test_the_first_passes_do_not_narrow_it() -> None:
    """They settle a row or two by nature; what counts is the whole period."""
    control = WindowControl(64)
    assert widths_over(control, PERIOD - 1, 1) == [64] * (PERIOD - 1)
    control.observe(64, 64)
    assert control.width == 64
    assert widths_over(control, PERIOD, 1)[-1] == 64, "a new period counts for itself"
    assert control.width == 32


def test_it_widens_again_up_to_its_maximum() -> None:
    control = WindowControl(48)
    widths_over(control, 2 * PERIOD, 1)
    assert control.width == 12
    assert [control.width for _ in range(4) if widths_over(control, PERIOD, 12)] == [24, 48, 48, 48]


def test_narrow_windows_of_a_full_step_are_no_reason_to_narrow() -> None:
    """A step's budget may cut a window; rows are counted, not widths."""
    control = WindowControl(64)
    for _ in range(3 * PERIOD):
        control.observe(1, 2)
    assert control.width == 64


@given(st.integers(1, 300), st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), max_size=200))
def test_any_history_keeps_it_within_bounds(maximum: int, passes: list[tuple[int, int]]) -> None:
    control = WindowControl(maximum)
    for settled, rows in passes:
        before = control.width
        control.observe(min(settled, rows), rows)
        assert 1 <= control.width <= maximum
        assert control.width in (before, before // 2, min(maximum, 2 * before))


def test_passes_that_were_cut_short_are_no_reason_to_widen() -> None:
    control = WindowControl(64)
    widths_over(control, 2 * PERIOD, 1)
    assert control.width == 16
    for _ in range(3 * PERIOD):
        control.observe(2, 2)
    assert control.width == 16, "of wider windows nothing was seen"
    widths_over(control, PERIOD, 16)
    assert control.width == 32


@given(st.integers(1, 128), st.lists(st.tuples(st.integers(1, 128), st.integers(1, 128)), max_size=400), st.booleans())
def test_whatever_settles_the_rows_are_bounded(maximum: int, passes: list[tuple[int, int]], is_full: bool) -> None:
    """Reading a token at a time takes a row each. A period that halves the width pays for itself with the width it gives up;
    one that doubles it may be followed by one twice as wide that settles nothing: at most 3 CHEAP rows a token in the long
    run, and 2 PERIOD maximal windows to begin with."""
    control, total_rows, total_settled = WindowControl(maximum), 0, 0
    for settled, cut in passes:
        rows = control.width if is_full else min(cut, control.width)
        settled = min(settled, rows)
        control.observe(settled, rows)
        total_rows, total_settled = total_rows + rows, total_settled + settled
        assert total_rows <= 3 * CHEAP * total_settled + 2 * PERIOD * maximum


def test_the_worst_of_all_orders_stays_below_the_bound() -> None:
    """Settle all in narrow windows and one row in wide ones, so that the width swings and every wide period is in vain."""
    control, rows, settled = WindowControl(64), 0, 0
    for _ in range(1000):
        width = control.width
        count = width if width <= 16 else 1
        control.observe(count, width)
        rows, settled = rows + width, settled + count
    assert 2 * CHEAP * settled > rows > settled
