import pytest

from setriton.train import ScheduleConfig
from setriton.train.schedule import learning_rate


def rates(schedule: ScheduleConfig, steps_per_epoch: int = 10) -> list[float]:
    steps = range(schedule.epochs * steps_per_epoch)
    return [learning_rate(step, peak=0.6, schedule=schedule, steps_per_epoch=steps_per_epoch) for step in steps]


def test_step_decay_drops_where_the_paper_says() -> None:
    lr = rates(ScheduleConfig("step", epochs=100, step_epochs=30, gamma=0.1))
    for epoch, wanted in [(0, 0.6), (29, 0.6), (30, 0.06), (59, 0.06), (60, 0.006), (90, 0.0006), (99, 0.0006)]:
        assert lr[epoch * 10] == pytest.approx(wanted)
        assert lr[epoch * 10 + 9] == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["step", "cosine"])
def test_warmup_rises_linearly_to_the_peak(kind: str) -> None:
    lr = rates(ScheduleConfig(kind, epochs=20, warmup_epochs=2))  # type: ignore[arg-type]
    assert lr[:20] == pytest.approx([0.6 * (step + 1) / 21 for step in range(20)])
    assert lr[20] == pytest.approx(0.6)


def test_cosine_falls_from_the_peak_towards_zero() -> None:
    lr = rates(ScheduleConfig("cosine", epochs=20))
    assert lr[0] == 0.6
    assert lr[100] == pytest.approx(0.3)
    assert 0 < lr[-1] < 1e-4
    assert lr == sorted(lr, reverse=True)
