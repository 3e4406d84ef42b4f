"""Rows that a GPU might give: for the tests of what is made of them."""

import json

from experiments.suites import evidence, shapes


def rows():
    """What a GPU might give."""
    common = {
        "device": "NVIDIA H100", "driver": "580", "versions": {"torch": "2.11", "triton": "3.6.0", "cuda": "13.0"},
        "commit": "c" * 40, "dirty": False, "code": "k",
        "command": "python -m experiments.gpu_evidence --out DIR --stage x",
    }  # fmt: skip
    ceilings = {"copy": 3e12, "matmul": 8e14, "launch": 5e-6}
    found = []
    for name, shape in shapes.SHAPES.items():
        for contestant, ratio in (("triton", None), ("liger", 1.3)):
            row = {"stage": "layer", "suite": "layer", "shape": name, "load": "uniform", "contestant": contestant}
            row |= {
                "status": "measured",
                **shape._asdict(),
                "ceilings": ceilings,
                "forward_tf": 500.0,
                "backward_tf": None,
            }
            row |= {"forward_of_bmm": 0.8, "backward_of_bmm": None, "seconds": 2.0}
            row |= {"ours_over_this": ratio} if ratio else {}
            row["targets"] = [shapes.target("promise forward TF/s", 500.0, shapes.PROMISE[name].forward)]
            found.append(common | row)
    row = {"stage": "layer", "suite": "layer", "shape": "every", "load": "every", "contestant": "sonicmoe"}
    found.append(common | row | {"status": "absent", "error": "sonicmoe not installed", "seconds": 0.0})
    for us in (40.0, 60.0):
        row = {
            "stage": "kernels",
            "suite": "kernels",
            "op": "gate_plan",
            "T": int(us),
            "status": "measured",
            "seconds": 1.0,
        }
        found.append(common | row | {"targets": [shapes.target("gate and plan, µs", us, 50.0, at_most=True)]})
    row = {"stage": "kernels", "suite": "kernels", "op": "combine", "T": 16, "K": 8, "D": 64, "status": "measured"}
    found.append(common | row | {"us": 9.0, "eager_us": 20.0, "bytes": 1000, "ceilings": ceilings, "targets": []})
    row = {"stage": "correctness", "suite": "correctness", "check": "layer", "dtype": "bf16", "status": "wrong"}
    found.append(common | row | {"error": "errors exceed bounds: dx", "seconds": 1.0})
    row = {"stage": "train_step", "suite": "train_step", "preset": "gpu-1b", "model": "switchyard MoE (triton)"}
    row |= {
        "precision": "bf16",
        "status": "measured",
        "parameters": 10,
        "tokens_per_s": 5.0,
        "moe_speed_over_this": 1.0,
    }
    found.append(common | row | {"mfu": 0.41, "seconds": 1.0})
    return found


def written(folder):
    for row in rows():
        with open(evidence.path_of(folder, row["stage"]), "a") as file:
            file.write(json.dumps(row) + "\n")
    return evidence.read(folder)
