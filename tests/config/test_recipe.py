"""Recipes are checked whole, and fingerprints say what a change invalidates."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from dsc_hub.chain.chain import Texts
from dsc_hub.config import fingerprints, publishing, recipe, recipe_files, stages
from dsc_hub.data import prompts
from dsc_hub.errors import ConfigError
from dsc_hub.metrics import registry
from dsc_hub.records import Prompt
from tests.conftest import RECIPE

IDENTITY = {"prompts": "a", "model": "b", "reward": "c", "second_scorer": "", "third_scorer": ""}


def test_every_problem_is_told_at_once_with_path_got_and_a_suggestion(recipe_file: Path):
    recipe_file.write_text(RECIPE.replace("steps: 2", "step: 2") + "generation: {temperature: hot}\ndatasett: {}\n")
    with pytest.raises(ConfigError) as e:
        recipe_files.load_recipe_file(recipe_file, ["prompts.split.train=0.9", "noequals"])
    text = str(e.value)
    assert "has 5 problems" in text
    assert "chain.step: unknown key; did you mean 'steps'?" in text
    assert "generation.temperature: should be a valid number" in text and "got 'hot'" in text
    assert "datasett: unknown key; did you mean 'dataset'?" in text
    assert "prompts.split: train + validation + test must be 1, got 1.4" in text
    assert "override 'noequals': expected key.sub=value" in text


def test_overrides_are_yaml_and_reach_into_sections(recipe_file: Path):
    r = recipe_files.load_recipe_file(
        recipe_file, ["chain.steps=3", "distill.lora.r=4", "publish.private=false", "dataset.min_reward=null"]
    )
    assert (r.chain.steps, r.distill.lora, r.publish.private, r.dataset.min_reward) == (3, {"r": 4}, False, None)


def test_broken_yaml_names_file_line_and_column(recipe_file: Path):
    recipe_file.write_text("name: a\nchain: {critique: [\n")
    with pytest.raises(ConfigError, match=r"recipe.yaml:\d+:\d+: not valid YAML"):
        recipe_files.load_recipe_file(recipe_file)


@pytest.mark.parametrize("text", [r"\\frac{1}{x} of {answer}", '{"score": {answer}}', "Use {braces} and {0} and {}"])
def test_braces_that_are_no_placeholder_are_text(recipe_file: Path, text: str):
    r = recipe_files.load_recipe_file(recipe_file, [f"chain.critique={json.dumps(text)}"])
    filled = Texts.fill(r.chain.critique, Prompt("p", "Say it.", "g", "train"), "It.")
    assert filled == r.chain.critique.replace("{answer}", "It.")


@pytest.mark.parametrize("word", ["{anwser}", "{Answer}", "{prompts}", "{principal}", "{grp}"])
def test_a_placeholder_with_a_typing_error_is_refused(recipe_file: Path, word: str):
    with pytest.raises(ConfigError, match="did you mean"):
        recipe_files.load_recipe_file(recipe_file, [f"chain.revision='Write {word} again'"])


@pytest.mark.parametrize(
    ("given", "codes"), [("no", ["no"]), ("'no'", ["no"]), ("de", ["de"]), ("[en, no, de]", ["en", "no", "de"])]
)
def test_the_languages_of_the_cards(recipe_file: Path, given: str, codes: list[str]):
    r = recipe_files.load_recipe_file(recipe_file, [f"publish.language={given}"])
    assert publishing.languages(r.publish) == codes
    with pytest.raises(ConfigError, match=r"publish\.language"):
        recipe_files.load_recipe_file(recipe_file, ["publish.language=true"])


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_a_file_that_is_no_mapping_is_refused(recipe_file: Path, text: str):
    recipe_file.write_text(text)
    with pytest.raises(ConfigError, match="expected a mapping"):
        recipe_files.load_recipe_file(recipe_file)


def test_unknown_placeholders_and_settings_that_are_ours_are_refused(recipe_file: Path):
    with pytest.raises(ConfigError) as e:
        recipe_files.load_recipe_file(recipe_file, ["chain.critique=Look at {anwser}", "distill.sft.push_to_hub=true"])
    assert "unknown placeholder {anwser}" in str(e.value) and "sft.push_to_hub is set by dsc itself" in str(e.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("evaluation.arms=base", "evaluation.arms: expected a list, as [base, another], got 'base'"),
        ("evaluation.arms=3", "evaluation.arms: expected a list, as [one, another], got 3"),
        ("evaluation.arms=[]", "evaluation.arms: expected at least one, got an empty list"),
        (
            "evaluation=1",
            "evaluation: expected a section (arms, samples, split, temperature, ...), got 1; did you mean",
        ),
        ("evaluation=1", "did you mean evaluation.samples=1?"),
        ("hygiene=off", "hygiene: expected a section (meta_talk, repeated, language, subject), got False; set one as"),
        ("second_scorer=vader", "did you mean second_scorer.scorer=vader?"),
        ("model=acme/small", "did you mean model.source=acme/small?"),
        ("generation=0.5", "did you mean generation.temperature=0.5?"),
        (
            "publish=false",
            "publish: expected a section (to, owner, dataset, adapter, ...), got False; set one as publish.to",
        ),
        ("distill.lora=8", "distill.lora: expected keys with values, as distill.lora.KEY=VALUE, got 8"),
        ("evaluation.arms=[base, distiled]", "got 'distiled'; did you mean 'distilled'?"),
        ("budget_s.sampeling=8", "budget_s.sampeling: should be 'prompts', 'sampling'"),
        ("hygiene.subject=perhaps", "hygiene.subject: should be true or false, got 'perhaps'"),
        ("name=Mine", "name: expected small letters, digits"),
        ("evaluation.samples=true", "evaluation.samples: should be a number, got true"),
        ("dataset.phrase_limit=true", "dataset.phrase_limit: should be a number, got true"),
        ("chain.temperature=yes", "chain.temperature: should be a number, got true"),
        ("prompts.split.train=on", "prompts.split.train: should be a number, got true"),
        ("budget_s.sampling=true", "budget_s.sampling: should be a number, got true"),
        ("seed=true", "seed: should be a number, got true"),
        (
            "reward.plus=[[]]",
            "reward.plus.0: expected a section (scorer, metric, revision, positive_label, ...), got []",
        ),
        ("reward.plus=[similarity]", "got 'similarity'; did you mean {scorer: similarity}?"),
        ("reward.plus=[{metrik: similarity}]", "reward.plus.0.metrik: unknown key; did you mean 'metric'?"),
        ("reward.plus=[{colour: red}]", "reward.plus.0.colour: unknown key; known: scorer, metric,"),
    ],
)
def test_what_is_not_of_the_kind_is_told_in_plain_words(recipe_file: Path, override: str, told: str):
    with pytest.raises(ConfigError) as e:
        recipe_files.load_recipe_file(recipe_file, [override])
    assert told in str(e.value) and "has 1 problem" in str(e.value)
    assert not any(word in str(e.value) for word in ("Input should", "String should", "dictionary", "tuple", "boolean"))


def test_one_slip_hides_no_other_and_is_told_once(recipe_file: Path):
    with pytest.raises(ConfigError) as e:
        recipe_files.load_recipe_file(
            recipe_file, ["chain.steps=true", "chain.temperature=-1", "evaluation.arms=[bas]"]
        )
    assert [p.partition(":")[0] for p in e.value.problems] == ["chain.steps", "chain.temperature", "evaluation.arms.0"]


def test_an_int_is_a_number_where_a_float_is_meant(recipe_file: Path):
    r = recipe_files.load_recipe_file(
        recipe_file, ["generation.temperature=1", "dataset.min_reward=0", "hygiene.repeated=1"]
    )
    assert (r.generation.temperature, r.dataset.min_reward, r.hygiene.repeated) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("arms", ["[]", "[base, base]"])
def test_arms_are_at_least_one_and_each_once(recipe_file: Path, arms: str):
    with pytest.raises(ConfigError, match=r"evaluation\.arms"):
        recipe_files.load_recipe_file(recipe_file, [f"evaluation.arms={arms}"])


def test_a_name_is_a_packaged_recipe_and_a_path_a_file(recipe_file: Path):
    assert recipe_files.find_recipe("quickstart").name == "recipe.yaml"
    assert (
        recipe_files.find_recipe(str(recipe_file)) == recipe_file
        and recipe_files.find_recipe(str(recipe_file.parent)) == recipe_file
    )
    with pytest.raises(ConfigError, match="did you mean 'quickstart'|Did you mean 'quickstart'"):
        recipe_files.find_recipe("quickstar")


def test_every_packaged_recipe_is_valid():
    found = recipe_files.packaged_recipes()
    assert list(found) == ["privacy", "privacy/hub", "quickstart", "safety", "safety/hub", "sentiment", "sentiment/hub"]
    names = [recipe_files.load_recipe_file(path).name for path in found.values()]
    assert names == [name.replace("/", "-") for name in found]  # no two share a folder of runs or a repo


@pytest.mark.parametrize("name", ["privacy", "safety", "sentiment"])
def test_a_hub_variant_has_the_same_prompts_and_rule_and_names_models_of_the_hub(name: str):
    packaged = recipe_files.packaged_recipes()
    offline, hub = (recipe_files.load_recipe_file(packaged[n]) for n in (name, f"{name}/hub"))
    assert (offline.prompts, offline.chain.acceptance) == (hub.prompts, hub.chain.acceptance)
    assert all(registry.is_packaged(s) for s in recipe.all_scorers(offline).values())
    assert not all(registry.is_packaged(s) for s in recipe.all_scorers(hub).values())
    assert hub.publish.to == "hub" and hub.publish.private and "/" in hub.model.source


def test_the_prompts_of_safety_are_two_of_each_kind_about_every_subject():
    path = recipe_files.packaged_recipes()["safety"]
    r = recipe_files.load_recipe_file(path)
    found, dropped = prompts.load_prompts(r.prompts, path.parent, r.seed)
    kinds = Counter((p.group, p.kind) for p in found)
    assert len(kinds) == 2 * len({p.group for p in found}) and set(kinds.values()) == {2}
    assert dropped.duplicates == dropped.overlaps == 0


def test_a_changed_distill_section_leaves_sampling_alone_and_changes_all_that_follows(recipe_file: Path):
    a = fingerprints.stage_fingerprints(recipe_files.load_recipe_file(recipe_file), IDENTITY)
    b = fingerprints.stage_fingerprints(recipe_files.load_recipe_file(recipe_file, ["distill.lora.r=4"]), IDENTITY)
    same = [s for s in stages.NAMES if a[s] == b[s]]
    assert same == ["prompts", "sampling", "dataset"]


@pytest.mark.parametrize(
    ("override", "first_changed"),
    [
        ("prompts.limit=5", "prompts"),
        ("seed=1", "prompts"),
        ("chain.steps=1", "sampling"),
        ("generation.top_p=0.5", "sampling"),
        ("hygiene.meta_talk=strip", "sampling"),
        ("reward.scorer=textblob", "sampling"),
        ("dataset.min_reward=0.5", "dataset"),
        ("distill.processes=2", "distill"),
        ("evaluation.split=validation", "evaluation"),
        ("evaluation.temperature=0.3", "evaluation"),
        ("second_scorer={scorer: minilm}", "evaluation"),
        ("publish.private=false", "cards"),
    ],
)
def test_each_section_changes_its_own_stage_first(recipe_file: Path, override: str, first_changed: str):
    a = fingerprints.stage_fingerprints(recipe_files.load_recipe_file(recipe_file), IDENTITY)
    b = fingerprints.stage_fingerprints(recipe_files.load_recipe_file(recipe_file, [override]), IDENTITY)
    assert next(s for s in stages.NAMES if a[s] != b[s]) == first_changed


def test_a_new_setting_at_its_default_changes_no_fingerprint(recipe_file: Path):
    """Fingerprints as they are: whoever changes them makes all runs begin anew, and must mean it."""
    found = fingerprints.stage_fingerprints(recipe_files.load_recipe_file(recipe_file), IDENTITY)
    assert {s: found[s] for s in ("prompts", "sampling", "distill", "evaluation", "publish")} == {
        "prompts": "54bc058be961",
        "sampling": "19a77e70f12b",
        "distill": "4b8dd4737c09",
        "evaluation": "602fdc6d59e8",
        "publish": "6ee74a2a78b9",
    }
    named = recipe_files.load_recipe_file(
        recipe_file, ["generation.top_p=1.0", "evaluation.samples=1", "publish.private=true"]
    )
    assert fingerprints.stage_fingerprints(named, IDENTITY) == found


@pytest.mark.parametrize("override", ["serving.concurrency=3", "serving.kv_cache_gib=1", "reward.batch_size=2"])
def test_how_fast_the_work_is_done_changes_no_fingerprint(recipe_file: Path, override: str):
    assert fingerprints.stage_fingerprints(
        recipe_files.load_recipe_file(recipe_file), IDENTITY
    ) == fingerprints.stage_fingerprints(recipe_files.load_recipe_file(recipe_file, [override]), IDENTITY)


def test_another_model_or_other_prompt_files_change_everything_from_there(recipe_file: Path):
    r = recipe_files.load_recipe_file(recipe_file)
    a = fingerprints.stage_fingerprints(r, IDENTITY)
    assert fingerprints.stage_fingerprints(r, IDENTITY | {"model": "x"})["sampling"] != a["sampling"]
    assert fingerprints.stage_fingerprints(r, IDENTITY | {"prompts": "x"})["prompts"] != a["prompts"]


@pytest.mark.parametrize(
    "override",
    [
        "dataset.min_reward=.nan",
        "generation.temperature=.inf",
        "seed=4294967296",
        "publish.dataset=a/b",
        "publish.adapter=x y",
    ],
)
def test_values_that_would_only_fail_later_are_refused(recipe_file: Path, override: str):
    with pytest.raises(ConfigError):
        recipe_files.load_recipe_file(recipe_file, [override])


def test_adapter_and_base_need_a_repo_each(recipe_file: Path):
    with pytest.raises(ConfigError, match="adapter and base are both 'y'"):
        recipe_files.load_recipe_file(recipe_file, ["publish.adapter=y", "publish.base=y"])


@pytest.mark.parametrize(
    "line", ["name: 2026-99-99", "seed: !!int abc", "x: " + "[" * 5000, 'description: "\\ud800 hi"']
)
def test_yaml_that_breaks_the_parser_or_the_writer_is_one_error(recipe_file: Path, line: str):
    recipe_file.write_text(RECIPE + line + "\n" if "name" not in line else RECIPE.replace("name: little", line))
    with pytest.raises(ConfigError):
        recipe_files.load_recipe_file(recipe_file)


def test_a_template_without_its_placeholder_is_told(recipe_file: Path):
    with pytest.raises(ConfigError, match="template has no {value}: 'Write something'"):
        recipe_files.load_recipe_file(recipe_file, ["prompts.templates=[Write something]"])


@pytest.mark.parametrize(
    "scorers", [["third_scorer={scorer: textblob}"], ["second_scorer={scorer: vader}", "reward.scorer=vader"]]
)
def test_scorers_are_different_ones_and_in_order(recipe_file: Path, scorers: list[str]):
    with pytest.raises(ConfigError, match=r"third_scorer: there is no second|the same scorer twice"):
        recipe_files.load_recipe_file(recipe_file, ["second_scorer=null", *scorers])


def test_a_group_in_the_texts_needs_groups_that_somebody_named(recipe_file: Path):
    (recipe_file.parent / "p.jsonl").write_text('{"prompt": "Hello."}\n')
    lists = ["prompts.path=p.jsonl", "prompts.templates=[]", "prompts.values=null", "chain.revision=Praise {group}."]
    with pytest.raises(ConfigError, match=r"\{group\} needs prompts from templates, or prompts.group_column"):
        recipe_files.load_recipe_file(recipe_file, lists)
    assert recipe_files.load_recipe_file(recipe_file, [*lists, "prompts.group_column=topic"]).chain.asks_for_group()
    assert recipe_files.load_recipe_file(
        recipe_file, ["chain.critique=What is good about {group}?"]
    ).chain.asks_for_group()


def test_the_arms_answer_at_the_evaluations_temperature_if_it_has_one(recipe_file: Path):
    own = recipe_files.load_recipe_file(recipe_file, ["generation.temperature=0.5", "evaluation.temperature=0"])
    assert recipe.generation_at_evaluation(own) == own.generation.model_copy(update={"temperature": 0})
    plain = recipe_files.load_recipe_file(recipe_file)
    assert recipe.generation_at_evaluation(plain) == plain.generation


@pytest.mark.parametrize("item", ["[]", "5", "null", "word"])
def test_a_list_item_that_is_no_section_is_said_with_its_place(recipe_file: Path, item: str):
    with pytest.raises(ConfigError) as error:
        recipe_files.load_recipe_file(recipe_file, [f"reward.plus=[{item}]"])
    assert any(p.startswith("reward.plus.0: expected") for p in error.value.problems), error.value


def test_a_grid_file_is_no_recipe(tmp_path: Path):
    (tmp_path / "grid.yaml").write_text("{recipe: quickstart, vary: {chain.steps: [1, 2]}}")
    with pytest.raises(ConfigError, match="is a grid file, expected a recipe"):
        recipe_files.load_recipe_file(tmp_path / "grid.yaml")
