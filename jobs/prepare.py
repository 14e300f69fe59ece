"""Prepare a config's dataset, or find that it is prepared: python jobs/prepare.py CONFIG [--set a.b=c]..."""

import sys

from raymodels.config import Config
from raymodels.display import following
from raymodels.jobs import main


def run(config: Config) -> None:
    from raymodels.data.prepare import prepare
    from raymodels.train.engine import starting_point

    with following(config.train.steps) as show:
        # The tokenizer that training would take, so that training finds this dataset.
        prepared = prepare(
            config,
            tokenizer_from=starting_point(config).from_,
            progress=lambda done, total: show({"kind": "preparing", "done": done, "total": total}),
        )
    print(f"prepared: {prepared.place} ({'found there' if prepared.reused else 'new'})")


if __name__ == "__main__":
    sys.exit(main(run, Config, __doc__))
