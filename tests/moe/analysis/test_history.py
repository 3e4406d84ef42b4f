"""Claims about what is read of a run's training."""

import json

import numpy as np
import pytest

from moe.analysis.history import read_history, spread
from moe.errors import BadInput
from moe.run.summary import Alarm, DomainScore, LayerMetrics, MetricsLine, Validation, line_to_json

ALARM = Alarm("uneven load", 7, 3, "e", "c", "a")


def _write(folder, counts):
    (folder / "routing").mkdir(parents=True)
    layer = lambda n, vio: LayerMetrics(n, vio, 0.9, 3.0, 0, 0.0, 0.0)
    lines = [MetricsLine(0, 0.0, val=Validation(5.0, 3.0, {"a": DomainScore(5.0, 3.0, 9)}))]
    alarms = {7: [ALARM]}
    lines += [
        MetricsLine(s, 1.0 * s, 4.0, layers=[layer(1, 0.1 * s), layer(3, 0.2 * s)], alarms=alarms.get(s))
        for s in range(1, 21)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line_to_json(line)) + "\n" for line in lines))
    text = "".join(json.dumps({"step": s, "counts": count}) + "\n" for s, count in counts.items())
    (folder / "routing" / "counts.jsonl").write_text(text)


def test_loads_are_over_a_fair_share_and_metrics_by_step(tmp_path):
    _write(tmp_path, {10: [[4, 0, 4, 0], [2, 2, 2, 2]], 20: [[8, 0, 0, 0], [0, 0, 0, 0]]})
    history = read_history(tmp_path)
    assert history.layers == [1, 3]
    assert history.load_steps == [10, 20]
    assert history.load_NLE.tolist() == [[[2, 0, 2, 0], [1, 1, 1, 1]], [[4, 0, 0, 0], [0, 0, 0, 0]]]
    assert history.steps == list(range(1, 21))
    assert history.max_vio_NL[:, 1] == pytest.approx(0.2 * np.arange(1, 21))
    assert (history.effective_NL == 0.75).all()
    assert (history.val_steps, history.val_loss) == ([0], [5.0])
    assert history.alarms == [ALARM]


def test_of_a_long_run_steps_are_spread_evenly_and_the_last_is_among_them(tmp_path):
    _write(tmp_path, {s: [[1, 1], [1, 1]] for s in range(1, 21)})
    history = read_history(tmp_path, most=5)
    assert history.load_steps == history.steps == [1, 6, 11, 15, 20]
    assert spread([1, 2, 3], 3) == [1, 2, 3]
    assert spread([1, 2, 3], 0) == [1]
    assert spread([], 3) == []


def test_layers_of_several_widths_are_padded(tmp_path):
    _write(tmp_path, {5: [[1, 1], [1, 2, 3]]})
    load_NLE = read_history(tmp_path).load_NLE
    assert load_NLE.shape == (1, 2, 3)
    assert np.isnan(load_NLE[0, 0, 2])


def test_a_dense_run_has_no_routing_and_a_damaged_one_is_refused(tmp_path):
    dense, damaged, none = (tmp_path / name for name in ("dense", "damaged", "none"))
    _write(dense, {})
    (dense / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": 0.1, "loss": 2.0}) + "\n")
    history = read_history(dense)
    assert (history.layers, history.steps, history.load_NLE.size) == ([], [], 0)
    _write(damaged, {5: [[1, 1], [1, 2]], 6: [[1, 1]]})
    with pytest.raises(BadInput, match="step 6 has other layers or experts"):
        read_history(damaged)
    none.mkdir()
    with pytest.raises(BadInput, match=r"has no metrics\.jsonl"):
        read_history(none)
