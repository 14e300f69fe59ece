"""Run a job on a Ray cluster from this working tree: pack it, submit it, follow its log, return its result.

    submit("jobs/configs/demo.yaml", address="https://ray.example.com", overrides=["train.steps=50"])

The cluster's token is found where Ray itself looks: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token. It is sent
as a header and kept nowhere.
"""

from raymodels.submit.connect import ADDRESS, Cluster, connect
from raymodels.submit.follow import Following
from raymodels.submit.job import LOST_AFTER_S, Job, Submission, submit
from raymodels.submit.state import JobResult, JobState, job_state, list_jobs, logs, stop

__all__ = [
    "ADDRESS",
    "LOST_AFTER_S",
    "Cluster",
    "Following",
    "Job",
    "JobResult",
    "JobState",
    "Submission",
    "connect",
    "job_state",
    "list_jobs",
    "logs",
    "stop",
    "submit",
]
