"""What long work says where stderr is no terminal."""

import io
import sys

import pytest

from hf_llfc.cli.console import format_seconds, plain_lines, progress_bars


def test_a_stage_is_said_when_it_begins_and_its_steps_at_intervals(capsys):
    clock = iter([0.0, 1.0, 2.0, 3.0, 33.5, 40.0, 93.5, 94.0, 95.0])
    say = plain_lines(lambda: next(clock))
    say("diagnosing", 0, 100)
    say("diagnosing", 5, 100)  # too soon
    say("matching, sweep 1", 0, 10)
    say("matching, sweep 2", 0, 10)  # a step of the same stage
    say("matching, sweep 2", 5, 10)  # 30.5 s for half
    say("matching, sweep 2", 6, 10)
    say("matching, sweep 2", 10, 10)  # done, which needs no estimate
    say("merging a: diagnosing", 0, 10)
    say("merging a: evaluating", 1, 10)
    assert capsys.readouterr().err.splitlines() == [
        "hf-llfc: diagnosing",
        "hf-llfc: matching",
        "hf-llfc: matching, sweep 2, 5 of 10 (50%), about 30 s left",
        "hf-llfc: merging a",
    ]


def test_quiet_says_nothing_and_stdout_stays_for_data(capsys):
    with progress_bars(shown=False) as progress:
        progress("diagnosing", 0, 100)
    assert capsys.readouterr() == ("", "")
    with progress_bars(shown=True) as progress:
        progress("diagnosing", 0, 100)
    assert capsys.readouterr() == ("", "hf-llfc: diagnosing\n")


def test_a_terminal_shows_bars_that_count_samples(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bars(shown=True) as progress:
        progress("diagnosing", 12, 100)
    assert "diagnosing" in terminal.getvalue() and "12/100" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (42, "42 s"), (89, "89 s"), (90, "2 min"), (3000, "50 min"), (7200, "2 h")]
)
def test_estimates_are_round(seconds, text):
    assert format_seconds(seconds) == text
