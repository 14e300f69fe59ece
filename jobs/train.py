"""Train a model, or go on with a run that was interrupted: python jobs/train.py CONFIG [--set a.b=c]..."""

import sys

from raymodels.config import Config
from raymodels.display import following
from raymodels.jobs import main


def run(config: Config) -> None:
    from raymodels.train.launch import train

    with following(config.train.steps) as show:
        result = train(config, on_event=show)
    print(f"run: {result.place}")
    print(f"checkpoint: {result.checkpoint.place}")
    if result.version:
        print(f"version: {result.version.reference}")


if __name__ == "__main__":
    sys.exit(main(run, Config, __doc__))
