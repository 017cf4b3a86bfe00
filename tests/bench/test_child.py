import os
import signal
import sys
import time

import pytest
import torch

from attnzoo.bench import isolate as child
from attnzoo.bench.isolate import Isolation

pytestmark = pytest.mark.serial


def echo(argument, say):
    say("thinking")
    return argument.upper()


def fail(argument, say):
    raise RuntimeError("it broke here")


def die(argument, say):
    say("a dangerous step")
    print("my last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), int(argument))


def leave(argument, say):
    os._exit(3)


def hang(argument, say):
    say("asleep")
    time.sleep(60)


class Unreadable:
    """An argument that no child can take in."""

    def __reduce__(self):
        return exec, ("import os; os._exit(5)",)


def threads_after_a_product(argument, say):
    torch.set_num_threads(2)
    return str((torch.ones(300, 300) @ torch.ones(300, 300)).sum().item())


@pytest.fixture(scope="module", params=["forkserver", "spawn"])
def isolation(request):
    return Isolation(["torch"], cuda=request.param == "spawn")


def test_an_answer_comes_back_and_words_on_the_way(isolation):
    words = []
    result = isolation.run(echo, "abc", 60, words.append)
    assert (result.end, result.answer, words) == ("done", "ABC", ["thinking"])


def test_an_exception_is_told_with_its_trace(isolation):
    result = isolation.run(fail, "", 60)
    assert result.end == "crashed"
    assert "it broke here" in result.message
    assert "in fail" in result.message


def test_a_crash_is_told_with_signal_stage_and_last_words(isolation):
    result = isolation.run(die, str(int(signal.SIGSEGV)), 60)
    assert result.end == "crashed"
    for part in ("SIGSEGV", "a dangerous step", "my last words"):
        assert part in result.message


def test_a_silent_exit_is_told_with_its_code(isolation):
    assert "exit code 3" in isolation.run(leave, "", 60).message


def test_a_hang_ends_at_its_time():
    isolation = Isolation(["torch"])
    isolation.run(echo, "the server is up now", 60)
    start = time.monotonic()
    result = isolation.run(hang, "", 3)
    assert result.end == "timeout"
    assert "3 s; last at: asleep" in result.message
    assert time.monotonic() - start < 20


def test_parallel_work_goes_on_in_a_child(isolation):
    assert isolation.run(threads_after_a_product, "", 60).answer == str(300.0**3)


@pytest.mark.parametrize(
    ("before", "after", "end", "says"),
    [(0, 1, "oom", "counted a kill"), (1, 1, "crashed", "counted no kill"), (None, None, "crashed", "does not say")],
)
def test_a_kill_is_called_out_of_memory_only_where_the_kernel_says_so(monkeypatch, before, after, end, says):
    counts = iter([before, after])
    monkeypatch.setattr(child, "_memory_kills", lambda: next(counts))
    result = Isolation().run(die, str(int(signal.SIGKILL)), 60)
    assert result.end == end
    assert says in result.message


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), ConnectionResetError(104, "reset"), EOFError()])
def test_a_child_that_dies_while_it_is_handed_its_work_is_an_answer(monkeypatch, error):
    """Such as one whose modules cannot be imported: the run goes on, and is not taken for one that nobody reads."""
    isolation = Isolation()

    def start(self):
        raise error

    monkeypatch.setattr(isolation._context.Process, "start", start)
    ended = isolation.run(echo, "hello", timeout=30)
    assert (ended.end, ended.answer) == ("crashed", "")
    assert "did not start" in ended.message


def test_a_child_that_cannot_take_its_work_in_is_an_answer():
    assert Isolation().run(echo, Unreadable(), timeout=60).end == "crashed"
