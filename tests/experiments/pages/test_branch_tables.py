"""Claims about the tables of branch-train-mix."""

from experiments.pages.branch_tables import all_tables, arms, by_domain, copies, shares_of, specialised
from experiments.stats.branching import Row

COUNTS = [[[6, 2], [1, 7]]]


def rows(seeds=(0, 1)):
    """`mixed` is better than scratch by 0.5 in every seed, and in the domain a by 1."""
    made = []
    for seed in seeds:
        made += [
            Row(seed, "dense", 10, 1e9, 3.0 + seed, {"a": 3.0, "b": 3.0}),
            Row(seed, "copy-a", 5, None, 3.5, {"a": 2.75, "b": 4.0}),
            Row(seed, "copy-b-c", 5, None, 3.5, {"a": 4.0, "b": 2.5}),
            Row(seed, "mixed", 5, 2e9, 2.0 + seed, {"a": 1.0, "b": 2.0}, COUNTS, 1),
            Row(seed, "scratch", 12, 2e9, 2.5 + seed, {"a": 2.0, "b": 2.0}, COUNTS, 1),
        ]
    return made


def test_every_arm_has_a_row_and_mixed_a_verdict_on_each_other():
    table = arms(rows())
    assert [cells[0] for cells in table.rows] == ["dense", "mixed", "scratch"]
    assert dict(zip(table.headings, table.rows[2], strict=True)) == {
        "arm": "scratch", "last steps": "12", "training FLOPs": "2e+09", "loss": "3.000 ± 6.353",
        "mixed minus it": "-0.500 ± 0.000", "mixed is": "better",
    }  # fmt: skip
    assert table.rows[1][4:] == ("", "")


def test_one_seed_gives_no_interval_and_no_verdict():
    table = arms(rows(seeds=(0,)))
    assert table.rows[2][3:] == ("2.500", "-0.500", "single")


def test_domains_and_copies_have_their_own_columns():
    assert by_domain(rows()).rows[-1] == ("mixed minus scratch", "-1.000 ± 0.000", "+0.000 ± 0.000")
    assert copies(rows()).rows == [("copy of a", "-0.250", "+1.000"), ("copy of b-c", "+1.000", "-0.500")]


def test_only_experts_made_of_a_domain_have_one_at_home():
    table = specialised(rows())
    assert table.rows[0][:3] == ("mixed", "0.812 ± 0.000", "0.500")
    assert table.rows[1][1] == "no expert is a domain's"
    assert shares_of(rows()).rows[:2] == [("mixed", "0", "a", "0.75", "0.25"), ("mixed", "0", "b", "0.12", "0.88")]


def test_a_study_that_is_not_through_has_its_tables_too():
    assert len(all_tables([row for row in rows() if row.arm != "mixed"])) == 5
