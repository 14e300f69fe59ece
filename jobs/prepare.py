"""Prepare a config's dataset, or find that it is prepared: python jobs/prepare.py CONFIG [--set a.b=c]..."""

import sys

from raymodels.config import Config
from raymodels.display import following
from raymodels.jobs import main


def run(config: Config) -> None:
    from raymodels.train.launch import prepare_data

    with following(config.train.steps) as show:
        prepared = prepare_data(config, on_event=show)
    print(f"prepared: {prepared.place} ({'found there' if prepared.reused else 'new'})")


if __name__ == "__main__":
    sys.exit(main(run, Config, __doc__))
