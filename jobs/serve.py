"""Serve models until interrupted or stopped: python jobs/serve.py CONFIG [--set a.b=c]..."""

import sys

from raymodels.config import ServeConfig
from raymodels.jobs import main


def run(config: ServeConfig) -> None:
    from raymodels.serve.deploy import deploy

    with deploy(config) as endpoint:
        print(f"serving: {endpoint.url}", flush=True)
        endpoint.wait()


if __name__ == "__main__":
    sys.exit(main(run, ServeConfig, __doc__))
