"""Claims about the table of runs that learnt more and more kinds of task."""

from experiments.pages.diversity_table import Row, cells


def test_differences_are_by_seed():
    rows = [Row(0, seed, [], 5.0, 6.0) for seed in (0, 1, 2)]
    rows += [Row(1, seed, [], 2.0 + seed, 3.0) for seed in (0, 1, 2)] + [
        Row(8, seed, [], 1.5 + seed, 1.0) for seed in (0, 1, 2)
    ]
    table = cells(rows)
    assert table[0] == ("none", "5.000", "", "6.000")
    assert [row[0] for row in table] == ["none", "1", "8"]
    assert table[2][2] == "0.500"  # the same in every seed
    assert table[2][1].startswith("2.500 (0.016 to 4.984)")  # 1.5, 2.5, 3.5: 4.303 / sqrt(3)
