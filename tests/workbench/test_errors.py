from dataclasses import dataclass

import pytest

from workbench.errors import ConfigError, require_least, shorten, unknown_name


@dataclass
class Settings:
    steps: int = 3
    rate: float = 0.5
    limit: int | None = None


def test_fields_may_be_at_the_least_or_left_out():
    require_least(Settings(), 0.5, "rate", "limit")
    require_least(Settings(), 3, "steps")


@pytest.mark.parametrize("given", [Settings(steps=2), Settings(steps=float("nan"))])
def test_the_first_field_below_is_named(given):
    with pytest.raises(ConfigError, match=f"^steps={given.steps}: expected at least 3$"):
        require_least(given, 3, "limit", "steps", "rate")


def test_an_unknown_name_comes_with_near_ones():
    said = str(unknown_name("task", "winogrand", ["winogrande", "rte"]))
    assert said == "unknown task 'winogrand'; nearest: winogrande; known: rte, winogrande"


def test_a_long_message_loses_its_middle():
    assert shorten("abc") == "abc"
    cut = shorten("a" * 2000 + "b" * 2000)
    assert len(cut) <= 1000
    assert cut[0] == "a"
    assert cut[-1] == "b"
