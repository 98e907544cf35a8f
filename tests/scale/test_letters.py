"""What travels between a search and its workers where something on the way is missing."""

import inspect
import pickle
from concurrent.futures import Future

import pytest

import scorefn as sf
from scorefn.scale import Workers
from scorefn.scale.executors import _unbound
from scorefn.scale.transport import Missing, _sent, answer, received
from scorefn.search import minimize
from tests.scale import functions


class TwoPartError(Exception):
    """Pickled with one argument, and made of two."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def raised(error):
    try:
        raise error
    except Exception as caught:
        return caught


def test_an_error_that_cannot_be_made_again_arrives_in_words():
    failure = received(_sent(raised(TwoPartError("one", "two"))))
    assert failure.error is None
    assert failure.shown == "TwoPartError: one and two"
    assert "raise error" in failure.trace
    with pytest.raises(sf.ScorefnError, match=r"first failure was TwoPartError: one and two\. Try fun on one point"):
        failure.again()


def test_an_error_that_can_is_raised_as_it_was_with_the_trace_of_the_worker():
    failure = received(_sent(raised(KeyError("velocity"))))
    with pytest.raises(KeyError, match="velocity") as caught:
        failure.again()
    assert any("raise error" in note for note in caught.value.__notes__)


def test_a_worker_that_never_got_the_function_asks_for_it():
    assert isinstance(answer(pickle.dumps((b"never sent", None, (), 0, 0, False))), Missing)


def test_a_worker_that_answers_but_cannot_load_the_function_in_time():
    class OneAnswer:
        """Workers that say who they are, and then load for ever."""

        def submit(self, fn, /, *args, **kwargs):
            future = Future()
            if fn is not answer:
                host, process, token = fn(*args, **kwargs)
                future.set_result((host, process + 1, token))
            return future

    with pytest.raises(sf.ScorefnError, match=r"No worker could load fun within 0\.05 s, .*raise startup"):
        minimize(functions.sphere, [0.0, 0.0], 0.5, seed=0, executor=Workers(OneAnswer(), startup=0.05))


def test_a_factory_that_does_not_say_what_it_takes_is_called():
    with pytest.raises(ValueError, match="signature"):
        inspect.signature(dict)
    assert _unbound(dict) is None
    assert _unbound(lambda: None) is None
    assert _unbound(lambda size: None) == "missing a required argument: 'size'"
