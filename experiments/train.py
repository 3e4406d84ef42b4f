"""Train one model.

python -m experiments.train                                    # an MoE on the blend, minutes on two CPU cores
python -m experiments.train model=cpu-nano train.steps=50      # seconds
python -m experiments.train model.moe=null                     # a dense model
python -m experiments.train data=text data.path=my/texts       # your own text
python -m experiments.train run=runs/... resume=true           # go on with an interrupted run, its own settings
python -m experiments.train -m router=softmax,sigmoid seed=0,1,2 resume=true   # a sweep that can be repeated
"""

import copy
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from experiments import cli
from moe.config.parse import lookup
from moe.config.run import Config
from moe.run import folder
from moe.train.loop import train


@cli.command("train", Config)
def main(cfg: Config) -> None:
    """Train. With `run=... resume=true` every setting that the command line does not give is the run's own."""
    given = [each.lstrip("+~").partition("=")[0] for each in HydraConfig.get().overrides.task]
    if cfg.resume and cfg.run and Path(cfg.run).exists() and "experiment" not in given:
        cfg = overlay(folder.read_config(Path(cfg.run)), cfg, given)
    train(cfg)


def overlay(own: Config, cfg: Config, keys: list[str]) -> Config:
    """`own` with the settings and groups that `keys` name taken from `cfg`."""
    own = copy.deepcopy(own)
    for key in keys:
        path, _, name = key.rpartition(".")
        group = lookup(own, path) if path else own
        if hasattr(group, name):  # a group may be null in one of the two
            setattr(group, name, lookup(cfg, key))
    return own


if __name__ == "__main__":
    main()
