"""When a run evaluates, saves and stops."""

import pytest

from pretrain.training.run import RunProgress


def progress(step: int, request: int = 0) -> RunProgress:
    return RunProgress(step, step, 12, request)


def test_a_skipped_step_is_no_update():
    found = progress(3)
    found.advance(was_skipped=True)
    found.advance(was_skipped=False)
    assert (found.step, found.adam_step) == (5, 4)


@pytest.mark.parametrize(("step", "request_number", "every", "evaluates", "saves"), [
    (4, 0, 4, True, True), (5, 0, 4, False, False), (4, 0, 0, False, False), (12, 0, 5, True, True),
    (12, 0, 0, True, False), (4, 15, 4, False, True), (5, 15, 0, False, True), (12, 15, 0, True, True),
])  # fmt: skip
def test_what_is_due(step, request_number, every, evaluates, saves):
    found = progress(step, request_number)
    assert found.is_evaluation_due(every) == evaluates
    assert found.is_checkpoint_due(every) == saves


def test_a_request_at_the_last_step_interrupts_nothing():
    assert progress(11, 15).is_interrupted
    assert not progress(12, 15).is_interrupted
    assert not progress(11).is_interrupted
    assert progress(14).is_last, "a run folder that went further than run.steps"
