"""The share of a loop that waits for its data, by a clock that the test turns."""

import pytest

from common import clock
from tests.common.toy import ToyLoader, make_trainer


@pytest.fixture
def now(monkeypatch):
    hand = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: hand[0])
    return hand


def test_the_loops_time_is_split_into_waiting_and_the_rest(now):
    def slow():
        for i in range(3):
            now[0] += 2.0
            yield i

    loop, seen = clock.LoopClock(), []
    for batch in loop.around(slow()):
        now[0] += 6.0
        loop.saw(4)
        seen.append(batch)
        if batch == 1:
            pace = loop.read()
            assert (pace.seconds, pace.waited, pace.samples) == (16.0, 4.0, 8)
            assert pace.data_share == 0.25 and pace.samples_per_second == 0.5
    assert seen == [0, 1, 2]
    assert loop.read() == clock.Pace(8.0, 2.0, 4)
    assert loop.read().data_share == 0 and loop.read().samples_per_second == 0


def test_what_is_waited_for_data_is_logged_and_written(now, tmp_path, caplog):
    class Slow(ToyLoader):
        def __iter__(self):
            for batch in super().__iter__():
                now[0] += 1.0
                yield batch

    trainer, rows = make_trainer(tmp_path, loader=Slow(), epochs=1), []
    step = trainer.engine.step

    def turned(*args, **rest):
        now[0] += 3.0
        return step(*args, **rest)

    trainer.engine.step = turned
    trainer.writers = [lambda scalars, step: rows.append(dict(scalars))]
    with caplog.at_level("INFO"):
        trainer.fit()
    training = [row for row in rows if "data_share" in row]
    assert [row["data_share"] for row in training] == [0.25] * 3
    assert [row["samples_per_second"] for row in training] == [4.0] * 3
    assert sum("waited for data 25.0%" in message for message in caplog.messages) == 3
