"""Train one model.

python -m experiments.train                                    # an MoE on the blend, minutes on two CPU cores
python -m experiments.train model=cpu-nano train.steps=50      # seconds
python -m experiments.train model.moe=null                     # a dense model
python -m experiments.train data=text data.path=my/texts       # your own text
python -m experiments.train run=runs/... resume=true           # go on with an interrupted run, its own settings
python -m experiments.train -m router=softmax,sigmoid seed=0,1,2 resume=true   # a sweep that can be repeated
"""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from experiments import cli
from moe import run
from moe.config import Config
from moe.train import train


@cli.command("train", Config)
def main(cfg: Config) -> None:
    """Train. `run=... resume=true` alone takes every other setting from the run itself."""
    given = [each.lstrip("+").partition("=")[0] for each in HydraConfig.get().overrides.task]
    free = all(any(key == each or key.startswith(f"{each}.") for each in run.FREE) for key in given)
    if cfg.resume and cfg.run and free and Path(cfg.run).exists():
        old = run.read_config(Path(cfg.run))
        old.run, old.resume, old.log = cfg.run, True, cfg.log
        old.data.cache, old.data.workers = cfg.data.cache, cfg.data.workers
        cfg = old
    train(cfg)


if __name__ == "__main__":
    main()
