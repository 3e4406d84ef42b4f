"""What ended training, in a sentence that names the last good checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe.config.run import Config
from moe.errors import BadInput, of_the_machine
from moe.run.checkpoint import last_good


@contextmanager
def naming_checkpoint(cfg: Config, root: Path) -> Iterator[None]:
    """What the machine refuses meanwhile, and any other `BadInput`, is raised as a `BadInput` that names the last good
    checkpoint in `root`."""
    smaller = (
        f"lower train.batch_size={cfg.train.batch_size} or model.context={cfg.model.context}, raise train.accumulate="
        f"{cfg.train.accumulate}, set train.checkpoint_activations=true"
    )
    try:
        yield
    except Exception as error:
        refusal = error if isinstance(error, BadInput) else of_the_machine(error, smaller)
        if refusal is None:
            raise
        good = last_good(root)
        if refusal is error and good in str(error):
            raise
        raise BadInput(f"{str(refusal).rstrip('.')}; {good}.") from error
