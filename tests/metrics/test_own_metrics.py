"""What is wanted, put together: sums, signs, vetoes, metrics of one's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsc_hub.chain.chain import LOST_MEANING, TOO_SHORT
from dsc_hub.config import recipe
from dsc_hub.config.recipe import Recipe
from dsc_hub.config.sampling import RewardConfig, VetoConfig
from dsc_hub.errors import ConfigError, DataError, MetricError
from dsc_hub.evaluation.score_file import score_file
from dsc_hub.metrics import loading, registry
from dsc_hub.metrics.registry import _options
from dsc_hub.pipeline.context import _resolved
from dsc_hub.records import Prompt, Score
from tests.conftest import ROOT
from tests.fixture_run import RECIPE

PROMPT = Prompt("p", "Write.", "g", "test", "harmless")
OWN = """
import datasets
import evaluate

class Shouting(evaluate.Measurement):
    unit = "capital letters"
    higher_is_better = False

    def __init__(self, *args, least=1, **kwargs):
        self.least = least
        super().__init__(*args, **kwargs)

    def _info(self):
        return evaluate.MeasurementInfo(description="", citation="", inputs_description="", features=datasets.Features(
            {"data": datasets.Value("string"), "kinds": datasets.Value("string")}))

    def _compute(self, data, kinds):
        assert set(kinds) <= {"harmless", ""}
        scores = [sum(c.isupper() for c in text) if len(text) >= self.least else None for text in data]
        return {"scores": scores, "reasons": ["" if s is not None else "too short to shout" for s in scores]}
"""


def own(tmp_path: Path, text: str = OWN, **keys: object) -> loading.LoadedScorer:
    (tmp_path / "shouting.py").write_text(text)
    section = RewardConfig(metric="shouting.py", scorer="default", **keys)
    return loading.load_scorer(section, registry.identify_scorer(section, registry.Code(tmp_path)), tmp_path)


def test_a_metric_in_a_file_is_negated_where_lower_is_better_and_weighted(tmp_path: Path):
    scorer = own(tmp_path, weight=2, options={"least": 3})
    found = scorer.score(["ABC", "Abc", "A"], [PROMPT] * 3)
    assert found == [Score(-6.0), Score(-2.0), Score(None, "too short to shout")]
    assert scorer.unit == "minus 2 x capital letters" and scorer.name == "shouting (default)"
    assert scorer.score([], []) == []


def test_its_identity_is_the_files_content(tmp_path: Path):
    section = RewardConfig(metric="shouting.py", scorer="default")
    with pytest.raises(MetricError, match=r"shouting\.py can't be read: No such file"):
        registry.identify_scorer(section, registry.Code(tmp_path))
    (tmp_path / "shouting.py").write_text(OWN)
    before = registry.identify_scorer(section, registry.Code(tmp_path))
    (tmp_path / "shouting.py").write_text(OWN + "\n")
    assert registry.identify_scorer(section, registry.Code(tmp_path)) != before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (OWN.replace("    unit =", "    what ="), "has no attribute 'unit'"),
        (OWN.replace("import datasets", "import nosuchpackage"), "can't be loaded"),
        (OWN.replace("def _info", "def _info(self) oops"), r"shouting\.py, line 13: .*\n.*Mend that line"),
        (OWN.replace("in data]", "in data].exit(3)"), r"failed on 2 texts: AttributeError.*shouting\.py line \d+"),
        ("import sys\nsys.exit(3)\n" + OWN, r"can't be loaded: it called sys\.exit: 3 \(shouting\.py line 2\)"),
        (
            OWN.replace("assert set", "raise SystemExit; assert set"),
            r"failed on 2 texts: it called sys\.exit \(shouting\.py line \d+\)",
        ),
        ("1 / 0\n" + OWN, r"can't be loaded: ZeroDivisionError: .*shouting\.py line 1"),
        (OWN.replace("super().__init__(*args, **kwargs)", "None.x"), r"can't be loaded: AttributeError.*line \d+"),
        (OWN.replace('Value("string")', 'Value("strin")'), r"can't be loaded: ValueError.*shouting\.py line \d+"),
        (OWN.replace("assert set", "self._compute(data, kinds); assert set"), "RecursionError.*shouting"),
        (
            OWN.replace("assert set", "1 / 0; assert set"),
            r"failed on 2 texts: ZeroDivisionError(.*)shouting\.py line \d+",
        ),
        (OWN.replace("in data]", "in data[1:]]"), r"one score a text \(2\), got 1 of them"),
        (OWN.replace('return {"scores": scores,', 'return {"score": scores,'), "should return {'scores'"),
        (OWN.replace("sum(c.isupper() for c in text)", "float('nan')"), "gave nan as a score"),
        (OWN.replace("sum(c.isupper() for c in text)", "'many'"), "gave 'many' as a score"),
        (OWN.replace('"kinds": datasets', '"people": datasets').replace("kinds", "people"), "asks for people"),
    ],
)
def test_what_is_wrong_with_it_is_told_in_a_line(tmp_path: Path, text: str, told: str):
    assert text != OWN
    with pytest.raises(MetricError, match=told) as e:
        own(tmp_path, text).score(["ABC", "abc"], [PROMPT] * 2)
    assert len(str(e.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\n", "defines no class derived from evaluate.Measurement"),
        ("class Shouting:\n    pass\n", "defines no class derived"),
        (OWN.replace("def _info", "def info"), "its class has no _info"),
        (OWN.replace("def _info", "def info").replace("def _compute", "def compute"), "no _info and no _compute"),
        (
            OWN.replace("import datasets\nimport evaluate", "import datasets, evaluate"),
            "line 2: several imports in one line",
        ),
        (OWN + "def (:\n", r"line \d+: .*\n.*Mend that line"),
        (OWN + "\0", "is not Python text|null bytes"),
        (b"\xff\xfe", r"line 1: .*utf-8"),
        ("(" * 3000, "shouting"),
    ],
)
def test_what_is_wrong_with_its_source_is_told_before_anything_runs(tmp_path: Path, text: str | bytes, told: str):
    (tmp_path / "shouting.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MetricError, match=told) as e:
        registry.identify_scorer(RewardConfig(metric="shouting.py", scorer="default"), registry.Code(tmp_path))
    assert len(str(e.value).splitlines()) <= 2


def test_a_class_may_stand_inside_a_block_and_a_method_be_assigned(tmp_path: Path):
    lines = OWN.replace("def _compute(self", "def counted(self").rstrip() + "\n\n    _compute = counted\n"
    text = "if True:\n" + "".join(f"    {line}\n" for line in lines.splitlines())
    (tmp_path / "shouting.py").write_text(text)
    assert registry.identify_scorer(RewardConfig(metric="shouting.py", scorer="default"), registry.Code(tmp_path))


def test_a_base_class_of_one_s_own_may_have_all_that_a_metric_needs(tmp_path: Path):
    (tmp_path / "loud.py").write_text("from mine import Base\n\nclass Loud(Base):\n    unit = 'x'\n")
    assert registry.identify_scorer(RewardConfig(metric="loud.py", scorer="default"), registry.Code(tmp_path))


def test_an_option_that_it_lacks_is_told(tmp_path: Path):
    with pytest.raises(MetricError, match=r"has no option 'loudest'(?s:.*)__init__: least"):
        own(tmp_path, options={"loudest": 3})
    with pytest.raises(MetricError, match=r"sentiment has no option 'loudest'"):
        registry.identify_scorer(RewardConfig(options={"loudest": 3}))


def test_options_are_part_of_what_a_scorer_is_and_servers_are_not():
    plain, people, words = (
        registry.identify_scorer(RewardConfig(metric="privacy", scorer="spacy", options=options))
        for options in ({}, {"per": "text", "entities": ["person"]}, {"per": "text"})
    )
    assert len({plain, people, words}) == 3 and "[entities=['person'], per=text] (en-core" in people
    assert _options(RewardConfig(options={"endpoint": "http://10.0.0.1", "api_key_env": "KEY"})) == ""


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"metric": "sentimant"}, "no metric 'sentimant'; did you mean 'sentiment'"),
        ({"scorer": "vadar"}, "sentiment has no scorer 'vadar'; did you mean 'vader'"),
    ],
)
def test_names_that_are_nothing_are_told(keys: dict[str, str], told: str):
    with pytest.raises(MetricError, match=told):
        registry.identify_scorer(RewardConfig(**keys))


def identify_all(r: Recipe, code: registry.Code) -> dict[str, str]:
    found = {place: registry.identify_scorer(section, code) for place, section in recipe.all_scorers(r).items()}
    return dict.fromkeys(("second_scorer", "third_scorer"), "") | found


def made(**reward: object) -> Recipe:
    return Recipe.model_validate(RECIPE | {"reward": reward})


def test_a_reward_is_the_weighted_sum_of_its_terms_and_unscored_if_one_is(tmp_path: Path):
    (tmp_path / "shouting.py").write_text(OWN)
    plus = {"metric": "shouting.py", "scorer": "default", "weight": 0.5, "options": {"least": 4}}
    r = made(scorer="vader", plus=[plus])
    identity = identify_all(r, registry.Code(tmp_path))
    assert list(identity) == ["second_scorer", "third_scorer", "reward", "reward.plus.0"] and all(
        identity[k] for k in ("reward", "reward.plus.0")
    )
    scorer = loading.load_all(r, identity, tmp_path)["reward"]
    vader = loading.load_scorer(RewardConfig(), identity["reward"]).score(["I LOVE it."], [PROMPT])[0].value
    found = scorer.score(["I LOVE it.", "ABC", "..."], [PROMPT] * 3)
    assert found[0].value == pytest.approx(vader - 2.5)
    assert found[1:] == [Score(None, "too short to shout"), Score(None, "no words")]
    assert scorer.name == "sentiment (vader) + shouting (default)" and "0.5 x capital letters" in scorer.unit


def test_scores_that_chose_nothing_have_no_further_terms():
    with pytest.raises(ValueError, match="plus"):
        Recipe.model_validate(RECIPE | {"second_scorer": {"scorer": "textblob", "plus": []}})


# -- vetoes

STORY = "A fire broke out at a bakery in Leeds. John Smith, the owner, said that nobody was hurt by the flames."
SAME = "There was a fire at a bakery in Leeds. The owner said nobody was hurt by the flames that night."
OTHER = "The council meets on Monday to talk about the new bus line and the price of parking in the town."


def veto_of(**keys: object):
    r = Recipe.model_validate(RECIPE | {"chain": RECIPE["chain"] | {"veto": keys}})
    return loading.load_veto_scorer(r, identify_all(r, registry.Code()))


@pytest.mark.parametrize("scorer", ["minilm", "rouge_l"])
def test_a_revision_must_keep_the_meaning_and_the_length(scorer: str):
    veto = veto_of(scorer=scorer, similarity=0.4, length=0.5)
    found = veto([SAME, OTHER, "Nobody was hurt.", "", STORY], [STORY] * 5)
    assert found == ["", LOST_MEANING, TOO_SHORT, TOO_SHORT, ""]
    assert veto(["..."], ["..."]) == [LOST_MEANING]  # no likeness can be told: not kept


def test_a_veto_that_looks_at_nothing_loads_nothing():
    r = Recipe.model_validate(RECIPE | {"chain": RECIPE["chain"] | {"veto": {"similarity": 0, "length": 0}}})
    assert recipe.effective_veto(r) is None and "chain.veto" not in identify_all(r, registry.Code())
    assert loading.load_veto_scorer(r, {})(["a"], ["b c d"]) == [""]
    assert veto_of(similarity=0, length=0.5)([OTHER, "b"], [STORY] * 2) == ["", TOO_SHORT]


def test_it_is_on_by_default_for_privacy_alone():
    assert recipe.effective_veto(made()) is None
    assert recipe.effective_veto(made(metric="privacy", scorer="spacy")) == VetoConfig()
    assert recipe.effective_veto(made(plus=[{"metric": "privacy", "scorer": "spacy"}])) == VetoConfig()


# -- code of others


@pytest.mark.parametrize(
    "allowed",
    [(), ("ann/other@" + "a" * 40,), ("ann/kindness@" + "b" * 40,), ("ann/kindness@" + "a" * 7,)],
)
def test_a_spaces_code_runs_only_where_it_is_allowed(allowed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dsc_hub.hub.client.space_commit", lambda repo, revision: "a" * 40)
    section = RewardConfig(metric="ann/kindness", scorer="vader")
    with pytest.raises(ConfigError, match=r"--allow-code ann/kindness@a{40}"):
        registry.identify_scorer(section, registry.Code(allowed=allowed))
    allowing = registry.Code(allowed=[f"ann/kindness@{'a' * 40}"])
    assert registry.identify_scorer(section, allowing) == f"vader of ann/kindness@{'a' * 40}"


def test_the_example_in_the_documentation_works(tmp_path: Path):
    page = (ROOT / "docs" / "howto" / "own-metric.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(# brevity\.py\n.*?)```", page, re.S)
    assert block, "the page has no example of a metric of one's own"
    (tmp_path / "brevity.py").write_text(block.group(1))
    section = RewardConfig(metric="brevity.py", scorer="default")
    scorer = loading.load_scorer(section, registry.identify_scorer(section, registry.Code(tmp_path)), tmp_path)
    short, long, empty = scorer.score(["Two words.", "These are four words.", ""], [PROMPT] * 3)
    assert short.value > long.value and empty.value is None


# -- dsc score


def test_a_file_is_scored_in_the_metrics_own_direction(tmp_path: Path):
    (tmp_path / "shouting.py").write_text(OWN)
    (tmp_path / "texts.jsonl").write_text('{"answer": "ABC", "kind": "harmless"}\n{"answer": "a"}\n{"answer": null}\n')
    found = score_file("shouting.py", tmp_path / "texts.jsonl", None, "answer", {"least": 1}, registry.Code(tmp_path))
    assert [(r.score, r.reason) for r in found.rows] == [(3.0, ""), (0.0, ""), (None, "too short to shout")]
    assert found.unscored == 1 and found.estimate.mean == 1.5 and not found.higher_is_better
    (tmp_path / "texts.txt").write_text("I love it.\n\nI hate it.\n")
    lines = score_file("sentiment", tmp_path / "texts.txt", None, "text", {}, registry.Code())
    assert [r.score > 0 for r in lines.rows] == [True, False] and lines.metric == "sentiment (vader)"


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("no.txt", None, "not found"),
        (".", None, "is a folder, expected a file"),
        ("empty.txt", "\n", "holds no texts"),
        ("a.jsonl", '{"other": "x"}\n', r"row 1 has no column 'text'; it has \['other'\]"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.csv", "text\na,b\n", "more cells than the header"),
    ],
)
def test_a_file_that_cannot_be_scored_is_told(tmp_path: Path, name: str, text: str | None, told: str):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=told):
        score_file("sentiment", tmp_path / name, None, "text", {}, registry.Code())


def test_a_veto_that_holds_by_default_is_recorded():
    assert _resolved(made(metric="privacy", scorer="spacy"))["chain"]["veto"] == VetoConfig().model_dump()
    assert _resolved(made())["chain"]["veto"] is None


def test_a_metric_gets_conversations_where_it_names_them(tmp_path: Path):
    text = OWN.replace("data, kinds):", "data, kinds, conversations):")
    text = text.replace('{"scores": scores', '{"scores": [float(len(turns)) for turns in conversations]')
    turns = tuple({"role": role, "content": role} for role in ("system", "user", "assistant", "user"))
    talk = Prompt("c", "user", "g", "test", messages=turns)
    assert [s.value for s in own(tmp_path, text).score(["Abc", "Abc"], [talk, PROMPT])] == [-4.0, -1.0]
