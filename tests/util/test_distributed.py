"""One process: what is done in the main one alone."""

import pytest

from util import distributed
from util.errors import UserError


def test_the_main_process_does_it_once_and_all_get_what_it_gave():
    calls = []
    assert distributed.on_main(lambda: calls.append(1) or "done") == "done"
    assert calls == [1]


def test_another_process_leaves_it_to_the_main_one_and_gets_its_result_or_its_error(monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    gathered = [("done", None), (None, None)]
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [gathered[0], own])
    assert distributed.on_main(lambda: pytest.fail("not the main process")) == "done"
    gathered[0] = (None, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        distributed.on_main(lambda: pytest.fail("not the main process"))


def test_an_error_reaches_the_caller_as_it_is():
    error = UserError("one sentence")

    def fail():
        raise error

    with pytest.raises(UserError) as raised:
        distributed.on_main(fail)
    assert raised.value is error
