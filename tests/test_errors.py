"""Several problems are said at once, a single one as it is."""

from __future__ import annotations

import pytest

from dsc_hub.errors import ConfigError, HubError, ModelError, gather


def missing(error: Exception):
    def step() -> None:
        raise error

    return step


def test_results_come_back_by_name():
    assert gather({"a": lambda: 1, "b": lambda: 2}, "{n} are missing") == {"a": 1, "b": 2}


def test_a_single_error_is_raised_as_it_is():
    with pytest.raises(HubError, match="no such repo"):
        gather({"a": lambda: 1, "b": missing(HubError("no such repo"))}, "{n} are missing")


def test_several_errors_are_said_together():
    steps = {"a": missing(HubError("no such repo")), "b": missing(ModelError("no weights", "Look there."))}
    with pytest.raises(ConfigError, match="2 are missing") as error:
        gather(steps, "{n} are missing")
    assert error.value.problems == ("a: no such repo", "b: no weights\n  Look there.")


def test_what_is_no_error_of_the_user_is_not_held_back():
    with pytest.raises(ZeroDivisionError):
        gather({"a": missing(HubError("x")), "b": lambda: 1 / 0}, "{n}")
