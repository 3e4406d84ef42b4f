"""Claims about how alarms are counted."""

from experiments.suites.alarm_table import alarm_rows, fault_rows
from experiments.suites.faults import FAULTS, Row
from moe.run.summary import Alarm


def _alarm(kind, step):
    return Alarm(kind, step, 0, "e", "c", "a")


POISON = FAULTS[3]
ROWS = [
    Row("", "softmax", 0, [], None, None, 0.0),
    Row("", "softmax", 1, [_alarm("uneven load", 200)], None, None, 0.0),
    Row(POISON.name, "softmax", 0, [_alarm("loss spike", 250), _alarm("logits grow", 300)], 250, 260, 0.25),
    Row(POISON.name, "softmax", 1, [_alarm("logits grow", 270)], None, 270, 0.5),
    Row(POISON.name, "softmax", 2, [_alarm("starved experts", 312)], 312, None, 0.0),
]


def test_a_fault_is_told_of_where_an_alarm_that_fits_was_raised():
    (row,) = fault_rows(ROWS)
    # Steps 250 and 312 of a fault that begins at 250: after 1 and 63, the median 32. One run has both, 10 steps apart.
    assert row == (POISON.name, "2 of 3", "32 steps", "starved experts, loss spike", "2 of 3", "+10 steps", "+0.250")


def test_an_alarm_counts_where_it_fits_and_is_false_in_healthy_runs():
    rows = {row[0]: row[1:] for row in alarm_rows(ROWS)}
    assert rows["loss spike"] == ("3", "1", "2", "0")
    assert rows["uneven load"] == ("3", "0", "2", "1")
    assert rows["logits grow"] == ("0", "0", "2", "0"), "a poisoned expert is not what it is for"
