"""What the rows of all stages come to."""

import json

from experiments.suites import evidence
from tests.experiments.gpu_rows import rows, written


def test_the_summary_counts_rows_and_targets_and_keeps_the_last_of_a_key(tmp_path):
    found = written(tmp_path)
    assert len(found) == len(rows())
    redone = rows()[-2] | {"status": "measured"}
    with open(tmp_path / "gpu-correctness.jsonl", "a") as file:
        file.write(json.dumps(redone | {"seconds": 3.0}) + "\n")
    assert len(evidence.read(tmp_path)) == len(found)
    assert evidence.wrong(evidence.read(tmp_path)) == []
    assert evidence.wrong(found) == ["wrong: correctness layer bf16: errors exceed bounds: dx"]
    assert evidence.read(tmp_path, code="other") == []
    assert evidence.stages(found)[2] == ("layer", "10", "", "", "1", "", "20")
    targets = evidence.targets(found)
    assert ("kernels", "gate and plan, µs", "gate_plan", "1 of 2", "60", "50") in targets
    assert ("layer", "promise forward TF/s", "mixtral uniform", "0 of 2", "500", "560") in targets
    assert ("layer", "promise forward TF/s", "small uniform", "2 of 2", "500", "300") in targets
    lines = evidence.layer(found)
    assert ("olmoe", "uniform", "liger", "500", "", "0.80, ", "1.30×") in lines
    assert ("every", "every", "sonicmoe", "absent", "", "", "") in lines
