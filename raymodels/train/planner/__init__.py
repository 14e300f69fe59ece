"""What a run will take, before it runs: `plan` says, `preflight` refuses what cannot fit, `relief` helps what did
not. Imports no DeepSpeed."""

from raymodels.train.planner.plan import Plan, plan
from raymodels.train.planner.preflight import preflight, relief

__all__ = ["Plan", "plan", "preflight", "relief"]
