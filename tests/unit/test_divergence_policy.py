from __future__ import annotations

import json
import math
import pickle
import random
from typing import Any

import pytest

from raymodels.config import TrainConfig
from raymodels.errors import ConfigError, Diverged, TrainingError
from raymodels.train.divergence import GO_ON, Divergence


def settings(action: str = "stop", warmup_steps: int = 0, precision: str = "fp32", **divergence: Any) -> TrainConfig:
    raw = {"steps": 10_000, "global_batch": 1, "micro_batch": 1, "lr": 1e-3, "warmup_steps": warmup_steps}
    small = {"window": 5, "patience": 3, "factor": 2.0, "rollback_steps": 4} | divergence
    return TrainConfig.model_validate(raw | {"on_divergence": action, "divergence": small, "precision": precision})


def ask(policy: Divergence, losses: list[float], first: int = 0) -> list[str]:
    return [policy.judge(first + i, loss, 1.0).action for i, loss in enumerate(losses)]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_no_number_stops_at_once_also_in_warm_up(loss: float) -> None:
    decision = Divergence(settings(warmup_steps=100)).judge(6, loss, 1.0)
    assert decision.action == "stop"
    with pytest.raises(TrainingError, match=rf"the loss is {loss} at step 7: lower train\.lr, raise train\.warmup"):
        raise decision.error()


def test_a_loss_that_stays_high_stops_after_patience() -> None:
    policy = Divergence(settings())
    assert ask(policy, [2.0] * 5 + [4.1, 4.1]) == ["go_on"] * 7
    decision = policy.judge(7, 4.1, 1.0)
    assert decision.action == "stop" and decision.back_to is None
    assert "4.1 at step 8, over 2 times its running median 2, for 3 steps in a row" in decision.reason


@pytest.mark.parametrize("interrupted_after", range(1, 8))
def test_an_interrupted_run_decides_as_an_undisturbed_one(interrupted_after: int) -> None:
    losses = [2.0, 2.1, 1.9, 2.0, 2.2, 4.5, 4.6, 4.7]
    undisturbed = ask(Divergence(settings("rollback")), losses)
    assert undisturbed == ["go_on"] * 7 + ["roll_back"]
    first = Divergence(settings("rollback"))
    before = ask(first, losses[:interrupted_after])
    second = Divergence(settings("rollback"), (), json.loads(json.dumps(first.memory())))
    assert before + ask(second, losses[interrupted_after:], interrupted_after) == undisturbed


def test_spikes_and_slow_changes_are_no_divergence() -> None:
    policy = Divergence(settings())
    assert ask(policy, [2.0] * 5 + [9.0, 9.0, 2.0] * 20) == ["go_on"] * 65
    assert ask(Divergence(settings()), [2.0 * 1.01**step for step in range(300)]) == ["go_on"] * 300


def test_a_healthy_noisy_run_is_never_touched() -> None:
    draw = random.Random(1)
    for action in ("stop", "rollback"):
        policy = Divergence(settings(action, window=50, patience=10))
        losses = [(2 + 8 * math.exp(-step / 200)) * draw.lognormvariate(0, 0.15) for step in range(5000)]
        assert ask(policy, losses) == ["go_on"] * 5000


def test_a_loss_that_grows_without_end_is_caught_although_the_window_moves() -> None:
    losses = [2.0] * 60 + [2.0 * 1.05**step for step in range(200)]
    actions = ask(Divergence(settings(window=50, patience=10)), losses)
    assert "stop" in actions[60:110]


def test_the_rule_is_off_until_the_window_is_full_and_warm_up_over() -> None:
    assert ask(Divergence(settings()), [1.0] * 4 + [50.0]) == ["go_on"] * 5
    assert ask(Divergence(settings(warmup_steps=40)), [1.0] * 5 + [50.0] * 30) == ["go_on"] * 35
    assert "stop" in ask(Divergence(settings(warmup_steps=6)), [1.0] * 7 + [50.0] * 30)


@pytest.mark.parametrize("loss", [math.nan, 5.0])
def test_skip_drops_one_batch(loss: float) -> None:
    policy = Divergence(settings("skip"))
    ask(policy, [2.0] * 5)
    decision = policy.judge(5, loss, 1.0)
    assert (decision.action, decision.back_to, decision.drop) == ("roll_back", 5, (5, 5))


def test_skips_are_bounded() -> None:
    decision = Divergence(settings("skip", max_skips=3), [(1, 1), (4, 4), (6, 6)]).judge(9, math.nan, 1.0)
    assert decision.action == "stop"
    assert "went back 3 times before" in decision.reason and "max_skips" in decision.reason


def test_rollback_goes_before_the_first_bad_step_and_drops_the_bad_batches() -> None:
    policy = Divergence(settings("rollback"))
    ask(policy, [2.0] * 20 + [9.0, 9.0])
    decision = policy.judge(22, 9.0, 1.0)
    assert (decision.action, decision.back_to, decision.drop) == ("roll_back", 16, (20, 22))
    with pytest.raises(Diverged, match=r"going back to step 16 or before, to drop the batches of 21 to 23") as raised:
        raise decision.error()
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.back_to, again.drop) == (decision.reason, 16, (20, 22))


def test_rollback_of_no_number_is_at_once_and_not_before_the_start() -> None:
    decision = Divergence(settings("rollback")).judge(2, math.nan, 1.0)
    assert (decision.action, decision.back_to, decision.drop) == ("roll_back", 0, (2, 2))


def test_rollbacks_are_bounded_and_their_batches_dropped() -> None:
    policy = Divergence(settings("rollback", max_rollbacks=2), dropped=[(20, 22), (30, 30)])
    assert [step for step in range(40) if policy.drops(step)] == [20, 21, 22, 30]
    decision = policy.judge(40, math.nan, 1.0)
    assert decision.action == "stop" and "went back 2 times before" in decision.reason


def test_gradients_that_are_no_numbers() -> None:
    stopped = Divergence(settings()).judge(3, 2.0, math.inf)
    assert stopped.action == "stop" and "the gradient is no number at step 4" in stopped.reason
    assert Divergence(settings("rollback")).judge(3, 2.0, math.inf).drop == (3, 3)


def test_in_fp16_an_infinite_gradient_is_how_the_loss_scale_is_found() -> None:
    assert Divergence(settings(precision="fp16")).judge(3, 2.0, math.inf) == GO_ON


def test_what_happens_on_divergence_has_no_meaning_for_the_result(tiny: dict[str, Any]) -> None:
    from raymodels.config import difference
    from tests.conftest import altered

    plain = altered(tiny)
    other = altered(
        tiny, train={"on_divergence": "skip", "divergence": {"factor": 9.0}}, retry={"hang": "always", "lost_node": 1}
    )
    assert other.digest() == plain.digest() and difference(plain, other) == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"on_divergence": "ignore"}}, r"train\.on_divergence"),
        ({"train": {"divergence": {"factor": 1.0}}}, r"train\.divergence\.factor"),
        ({"train": {"divergence": {"windows": 9}}}, r"train\.divergence\.windows: unknown key; did you mean window"),
        ({"retry": {"hang": -1}}, r"retry\.hang"),
        ({"retry": {"user_bug": 3}}, r"retry\.user_bug: unknown key"),
    ],
)
def test_wrong_settings_are_named(tiny: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    from tests.conftest import altered

    with pytest.raises(ConfigError, match=message):
        altered(tiny, **sections)
