"""The table of acceptance rules: what each keeps, and that the rest of dsc_hub knows each by its entry alone."""

from __future__ import annotations

import math

import pytest

from dsc_hub.acceptance import RULES, make_rule, metropolis
from dsc_hub.config.sampling import ChainConfig


def test_the_metropolis_rule_keeps_with_the_probability_of_the_formula():
    assert metropolis(0.5, 0.2, 0.3, 0.3678) and not metropolis(0.5, 0.2, 0.3, 0.3680)  # exp(-1) = 0.36788
    assert metropolis(0.2, 0.2, 0.3, 0.999)
    assert metropolis(-math.inf, -5.0, 0.01, 0.999) and not metropolis(1e9, 0.0, 1e-9, 0.0001)


@pytest.mark.parametrize("name", RULES)
def test_a_better_revision_is_kept_by_every_rule_and_a_worse_one_as_the_table_says(name: str):
    rule = make_rule(name, temperature=1.0)
    assert rule(0.1, 0.9, u=0.999) and rule(-math.inf, -5.0, u=0.999)
    assert rule(0.9, 0.1, u=0.0) == (RULES[name].can_descend or not RULES[name].compares)
    assert rule(None, 0.9, u=0.0) == (not RULES[name].compares)  # beside an answer that has no value


def test_only_strictly_better_improves():
    assert not make_rule("improve", 1.0)(0.5, 0.5, u=0.0)


@pytest.mark.parametrize("name", RULES)
def test_a_recipe_can_name_it_and_no_other(name: str):
    texts = {"critique": "Look.", "revision": "Revise."}
    assert ChainConfig(acceptance=name, **texts).acceptance == name
    assert RULES[name].caveat.format(temperature=0.1).endswith(".")
    with pytest.raises(ValueError, match="acceptance"):
        ChainConfig(acceptance=f"{name}d", **texts)
