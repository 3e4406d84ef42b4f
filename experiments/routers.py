"""Every router of conf/router: what it does, how many experts a token takes, whether it sees later tokens.

python -m experiments.routers
python -m experiments.routers names=[softmax,expert-choice]

`conf/router/README.md` is this table.
"""

from dataclasses import dataclass, field

from experiments import cli
from experiments.pages import router_table, tables


@dataclass
class RoutersConfig:
    """Which routers."""

    names: list[str] = field(default_factory=list)  # empty: all


@cli.command("routers", RoutersConfig)
def main(cfg: RoutersConfig) -> None:
    """Print a row per router."""
    tables.print_table(router_table.HEADINGS, router_table.rows(cfg.names), router_table.LEFT)


if __name__ == "__main__":
    main()
