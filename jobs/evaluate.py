"""Print the held-out loss of a run's newest checkpoint: python jobs/evaluate.py CONFIG [--set a.b=c]..."""

import sys

from raymodels.config import Config
from raymodels.display import following
from raymodels.jobs import main


def run(config: Config) -> None:
    from raymodels.train.launch import evaluate

    with following(config.train.steps) as show:
        metrics = evaluate(config, on_event=show)
    for name, value in metrics.items():
        print(f"{name}: {value:g}")


if __name__ == "__main__":
    sys.exit(main(run, Config, __doc__))
