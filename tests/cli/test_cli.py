"""`dsc` as a user meets it, against a scripted server: what it says when something is wrong, and that nothing half-done
passes for done."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsc_hub.config import recipe_files
from dsc_hub.pipeline import resolve
from dsc_hub.system import plain_yaml
from tests.conftest import ROOT


def error(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a run that failed for the user's reasons: exit 2 and no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return done.stderr


def sample(dsc, recipe_file: Path, server: str, *overrides: str):
    return dsc("sample", str(recipe_file), f"serving.endpoints=[{server}]", *overrides)


def the_run(dsc) -> Path:
    (folder,) = (dsc.work / "runs" / "little").iterdir()
    return folder


# -- what goes well


def test_sampling_and_dataset_over_an_endpoint_that_already_runs(dsc, recipe_file: Path, server: str):
    done = sample(dsc, recipe_file, server)
    assert done.returncode == 0, done.stderr
    assert "sampling  14/14 chains  failed 0" in done.stderr
    run = the_run(dsc)
    made = [run.parent.parent, *run.parent.parent.rglob("*")]
    assert all(path.stat().st_mode & 0o077 == 0 for path in made)  # nobody else's business
    markers = {p.name for p in run.glob("*.done.json")}
    assert markers == {"prompts.done.json", "sampling.done.json"}
    again = sample(dsc, recipe_file, server)
    assert "sampling: done before" in again.stderr
    done = dsc("dataset", str(recipe_file), f"serving.endpoints=[{server}]", code=0)
    counts = json.loads((run / "metrics.json").read_text())["dataset"]
    assert (
        counts["chains"]["train"] + counts["chains"]["validation"] == 14
        and (run / "dataset/sft/train-00000-of-00001.parquet").is_file()
    )
    facts = json.loads((run / "run.json").read_text())
    assert facts["model"]["commit"] and facts["versions"]["trl"] and facts["recipe"]["chain"]["steps"] == 2


def test_a_changed_distill_section_does_not_sample_again(dsc, recipe_file: Path, server: str):
    sample(dsc, recipe_file, server)
    done = sample(dsc, recipe_file, "http://127.0.0.1:1/v1")
    assert done.returncode == 2  # another endpoint may hold another model: not taken over
    first = the_run(dsc)
    marker = json.loads((first / "sampling.done.json").read_text())
    assert "server_start_s" not in marker  # of a server that was up
    (first / "sampling.done.json").write_text(json.dumps(marker | {"server_start_s": 12.5}))
    done = sample(dsc, recipe_file, server, "distill.lora.r=4")
    assert done.returncode == 0 and "sampling: taken over from" in done.stderr, done.stderr
    (other,) = [folder for folder in first.parent.iterdir() if folder.name != first.name]
    assert json.loads((other / "metrics.json").read_text())["server_starts"] == {"sampling": 12.5}
    (other / "sampling.done.json").unlink()
    (first / "sampling.done.json").unlink()
    assert sample(dsc, recipe_file, server, "distill.lora.r=4").returncode == 0
    assert not json.loads((other / "metrics.json").read_text())["server_starts"]  # what is done anew has its own


def test_changed_and_foreign_rows_are_noticed_before_anything_builds_on_them(dsc, recipe_file: Path, server: str):
    sample(dsc, recipe_file, server)
    chains = the_run(dsc) / "chains.jsonl"
    *others, last = chains.read_text().splitlines(keepends=True)
    foreign = json.loads(last) | {"prompt_id": "0123456789abcdef"}
    chains.write_text("".join([*others, last, json.dumps(foreign) + "\n"]))
    done = dsc("dataset", str(recipe_file), f"serving.endpoints=[{server}]", code=2)
    assert "chains.jsonl was changed since the stage 'sampling' was done" in done.stderr
    (chains.parent / "sampling.done.json").unlink()
    done = sample(dsc, recipe_file, server)
    assert done.returncode == 2 and "holds a chain of 0123456789abcdef" in done.stderr and "Trace" not in done.stderr
    chains.write_text("".join([*others, last, last]))  # twice is once
    assert sample(dsc, recipe_file, server).returncode == 0


def test_the_plan_counts_what_is_left_and_says_where_the_rest_is(dsc, recipe_file: Path, server: str):
    sample(dsc, recipe_file, server)
    arms = "evaluation.arms=[self_critique, base]"
    asked = ("plan", str(recipe_file), f"serving.endpoints=[{server}]", arms)
    shown = " ".join(dsc(*asked, code=0).stdout.split())
    assert "sampling nothing left to ask for evaluation 30 requests" in shown
    assert f"done already nothing taken over prompts, sampling from runs/little/{the_run(dsc).name} " in shown
    assert "claim none will be judged: it needs base as the first arm, and distilled" in shown
    sample(dsc, recipe_file, server, arms)
    plan = json.loads(dsc(*asked, "--json", code=0).stdout)
    assert (plan["done"], plan["taken_over"]) == (["prompts", "sampling"], {})
    assert [plan[k]["sampling"] for k in ("requests", "new_tokens_at_most", "seconds")] == [0, 0, None]
    assert plan["requests"]["evaluation"] and plan["seconds"]["evaluation"] is None  # never measured


def test_plan_checks_and_writes_nothing(dsc, recipe_file: Path):
    done = dsc("plan", str(recipe_file), code=0)
    assert (
        "14 of 2 step(s)" in done.stdout
        and "70 requests" in done.stdout
        and "nothing (publish.to is none)" in done.stdout
    )
    assert "time unknown" in done.stdout
    assert not (dsc.work / "runs").exists()


def test_try_shows_whole_chains_with_scores_and_decisions(dsc, recipe_file: Path, server: str):
    done = dsc("try", str(recipe_file), "-n", "3", f"serving.endpoints=[{server}]", code=0)
    assert done.stdout.count("critique 1") == 3 and done.stdout.count("critique 2") == 3
    assert "accepted" in done.stdout and "rejected: not accepted by the rule" in done.stdout
    assert not (dsc.work / "runs").exists()


def test_recipes_are_listed_copied_and_never_overwritten(dsc):
    assert "quickstart" in dsc("recipes", "list", code=0).stdout
    dsc("recipes", "copy", "quickstart", code=0)
    assert (
        recipe_files.load_recipe_file(dsc.work / "quickstart" / "recipe.yaml").name == "quickstart"
        and (dsc.work / "quickstart" / "films.txt").is_file()
    )
    assert "exists" in error(dsc("recipes", "copy", "quickstart"))
    # Under another name its runs are its own.
    assert "named my-films" in dsc("recipes", "copy", "quickstart", "My Films", code=0).stdout
    mine = dsc.work / "My Films" / "recipe.yaml"
    assert recipe_files.load_recipe_file(mine).name == "my-films" and "# Reviews that stay positive" in mine.read_text()
    (dsc.work / "file").write_text("")
    for folder in ("file/x", "x" * 300):
        told = error(dsc("recipes", "copy", "quickstart", folder))
        assert "can't be written" in told and "Name a FOLDER" in told and "--runs" not in told
    assert "Did you mean" in error(
        dsc("recipes", "copy", "quickstrat")
    ) or "There are: privacy, privacy/hub, quickstart" in error(dsc("recipes", "copy", "quickstrat"))


@pytest.mark.parametrize(
    ("folder", "name"), [("1_000", "1_000"), ("2026-99-99", "2026-99-99"), ("null", "null"), ("日本", "quickstart")]
)
def test_a_copy_is_named_after_any_folder(dsc, folder: str, name: str):
    assert f"named {name}, is yours" in dsc("recipes", "copy", "quickstart", folder, code=0).stdout
    assert recipe_files.load_recipe_file(dsc.work / folder / "recipe.yaml").name == name
    packaged = recipe_files.packaged_recipes()["quickstart"].read_text().splitlines()
    copied = (dsc.work / folder / "recipe.yaml").read_text().splitlines()
    assert [line for line in copied if line not in packaged] == [f'name: "{name}"']


def test_a_copy_that_breaks_off_leaves_no_half_recipe(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "dsc_hub", "recipes", "copy", "quickstart", str(tmp_path / "mine")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),  # its README.md is larger
    )
    assert "mine can't be written: [Errno 27]" in error(done) and not (tmp_path / "mine").exists()


def test_the_copy_of_a_variant_is_a_recipe_of_its_own(dsc):
    dsc("recipes", "copy", "privacy/hub", code=0)
    there = {p.name for p in (dsc.work / "privacy-hub").iterdir()}
    assert "events.txt" in there and "hub.yaml" not in there
    copied = recipe_files.load_recipe_file(dsc.work / "privacy-hub" / "recipe.yaml")
    assert copied.name == "privacy-hub" and copied.publish.to == "hub"
    dsc("recipes", "copy", "privacy", "mine", code=0)
    assert "hub.yaml" not in {p.name for p in (dsc.work / "mine").iterdir()}


def test_the_schema_is_json_schema(dsc):
    schema = json.loads(dsc("schema", code=0).stdout)
    assert schema["properties"]["chain"] and schema["additionalProperties"] is False


# -- what goes wrong


def test_a_hub_that_can_not_be_reached_is_not_called_offline_nor_empty(dsc):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    told = error(dsc("evaluate", "quickstart", "--adapter", "hub:a/b", **nowhere))
    assert "adapter 'hub:a/b': http://127.0.0.1:9 can't be reached" in told and "HF_HUB_OFFLINE" not in told
    told = error(dsc("evaluate", "quickstart", "--adapter", "hub:a/b", HF_HUB_OFFLINE="1", **nowhere))
    assert "offline, and not in the cache" in told
    told = error(dsc("plan", "hub:a/b", **nowhere))
    assert "'hub:a/b': http://127.0.0.1:9 can't be reached" in told and "recipe.yaml" not in told
    assert "USER/REPO[@REVISION]" in error(dsc("plan", "hub:a/b/c", **nowhere))


def test_a_stage_that_can_not_begin_leaves_no_run_folder(dsc):
    assert "the stage 'prompts'" in error(dsc("report", "quickstart"))
    assert not list((dsc.work / "runs").glob("quickstart/*"))


def test_recipe_not_found(dsc):
    assert "recipe 'nosuch' not found" in error(dsc("run", "nosuch"))
    assert not (dsc.work / "runs").exists()


def test_broken_yaml_unknown_key_and_empty_prompt_file(dsc, recipe_file: Path):
    assert "chain.setps: unknown key; did you mean 'steps'?" in error(dsc("run", str(recipe_file), "chain.setps=1"))
    (recipe_file.parent / "films.txt").write_text("\n")
    assert "holds no prompts" in error(dsc("run", str(recipe_file)))
    recipe_file.write_text("name: [unclosed\n")
    assert "not valid YAML" in error(dsc("run", str(recipe_file)))
    assert not list(dsc.work.rglob("*.done.json"))


def test_a_prompt_longer_than_the_context_is_told_before_anything_runs(dsc, recipe_file: Path, server: str):
    (recipe_file.parent / "films.txt").write_text("\n".join(["the long film " * 700, *(f"Film {i}" for i in range(9))]))
    message = error(sample(dsc, recipe_file, server))
    assert "2 of 20 don't fit a context of 2048 tokens" in message and "serving.context" in message
    assert not (dsc.work / "runs").exists()


def test_a_context_beyond_the_model_is_told(dsc, recipe_file: Path, server: str):
    assert "99999 is more than the model's 8192 positions" in error(
        sample(dsc, recipe_file, server, "serving.context=99999")
    )


def test_a_model_without_chat_template_or_that_is_none(dsc, recipe_file: Path, tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert "is no model: expected config.json and *.safetensors" in error(
        dsc("plan", str(recipe_file), f"model.source={folder}")
    )
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    (folder / "tokenizer_config.json").write_text("{}")
    assert "has no chat template" in error(dsc("plan", str(recipe_file), f"model.source={folder}"))
    assert "package 'no-such-package' is not installed" in error(
        dsc("plan", str(recipe_file), "model.source=package:no-such-package")
    )
    assert "not found" in error(dsc("plan", str(recipe_file), "model.source=./nowhere"))


def test_a_full_disk_keeps_what_is_done_and_no_marker_claims_more(dsc, recipe_file: Path, server: str):
    context = resolve.resolve_recipe(str(recipe_file), [f"serving.endpoints=[{server}]"], dsc.work / "runs")
    context.run.folder.mkdir(parents=True)
    os.symlink("/dev/full", context.run["turns.jsonl"])  # every write there is answered with ENOSPC
    message = error(sample(dsc, recipe_file, server))
    assert "no space left on the disk" in message and "turns.jsonl" in message
    assert context.run["prompts.done.json"].exists() and not context.run["sampling.done.json"].exists()
    context.run["turns.jsonl"].unlink()
    assert sample(dsc, recipe_file, server).returncode == 0


def test_an_endpoint_that_refuses(dsc, recipe_file: Path):
    message = error(sample(dsc, recipe_file, "http://127.0.0.1:1/v1"))
    assert "endpoint http://127.0.0.1:1/v1 can't be used" in message and "refused" in message


def test_a_missing_token_is_told_before_anything_runs(dsc, recipe_file: Path):
    message = error(dsc("run", str(recipe_file), "publish.to=hub"))
    assert "no token" in message and "HF_TOKEN" in message and "publish.to=local" in message


def test_a_plan_lists_a_missing_token_with_all_other_problems(dsc, recipe_file: Path):
    done = dsc("plan", str(recipe_file), "publish.to=hub", "generation.max_new_tokens=3000", "chain.system=Be {foo}.")
    message = error(done)
    assert "publish: no token for" in message and "don't fit a context" in message
    assert "chain.system {foo} is sent as it is: a system text has no placeholders" in " ".join(done.stderr.split())


def test_a_plan_tells_how_much_goes_up(dsc, recipe_file: Path):
    told = " ".join(dsc("plan", str(recipe_file), "publish.to=local", "publish.base=b", code=0).stdout.split())
    assert "model local/b" in told and "GB together" in told and "of it the base model" in told


def test_somebody_elses_name_and_somebody_elses_repo(dsc, recipe_file: Path, home: Path):
    from huggingface_hub import HfApi

    from dsc_hub.local_hub.server import running

    assert "'acme' is somebody else's" in error(dsc("run", str(recipe_file), "publish.to=local", "publish.owner=acme"))
    with running(home / "hub") as address:
        api = HfApi(endpoint=address.endpoint, token=address.token)
        api.create_repo("local/mine", repo_type="dataset", private=True, exist_ok=True)
        api.upload_file(path_or_fileobj=b"precious", path_in_repo="data.txt", repo_id="local/mine", repo_type="dataset")
        api.create_repo("local/open", repo_type="dataset", private=False, exist_ok=True)
    message = error(dsc("run", str(recipe_file), "publish.to=local", "publish.dataset=mine"))
    assert "dataset 'local/mine' exists and was not published by dsc" in message
    message = error(dsc("plan", str(recipe_file), "publish.to=local", "publish.dataset=open"))
    assert "exists and is public, but the recipe publishes privately" in message


def test_a_stage_alone_says_what_must_come_before(dsc, recipe_file: Path):
    assert "the stage 'prompts'" in error(dsc("distill", str(recipe_file))) and "dsc sample" in error(
        dsc("distill", str(recipe_file))
    )


def test_unknown_verbs_and_options_exit_with_2(dsc):
    assert dsc("frobnicate").returncode == 2 and dsc("try", "quickstart", "-n", "0").returncode == 2


def test_settings_of_the_trainer_are_checked_before_anything_runs(dsc, recipe_file: Path, server: str):
    message = error(sample(dsc, recipe_file, server, "distill.sft.lerning_rate=1", "distill.lora.rank=4"))
    assert (
        "distill.sft.lerning_rate: unknown key; did you mean 'learning_rate'?" in message
        and "distill.lora.rank: unknown key; did you mean 'r'?" in message
    )


# -- what a first user stumbles over


def test_a_key_given_as_an_option_gets_the_way_to_set_it(dsc):
    told = dsc("plan", "quickstart", "--chain.steps", "2", code=2).stderr
    assert "No such option '--chain.steps'" in told and "chain.steps=VALUE" in told


def test_a_mistyped_path_gets_a_suggestion(dsc):
    dsc("recipes", "copy", "quickstart", "mine", code=0)
    assert "Did you mean 'mine/recipe.yaml'?" in dsc("plan", "./mine/recpe.yaml", code=2).stderr
    assert "Did you mean 'mine'?" in dsc("plan", "mind", code=2).stderr


def test_a_folder_given_as_prompts_is_called_one(dsc, recipe_file):
    (recipe_file.parent / "folder").mkdir()
    told = dsc("plan", str(recipe_file), "prompts.path=folder", "prompts.templates=[]", "prompts.values=null", code=2)
    assert "folder is a folder, expected a file" in told.stderr


def test_a_key_that_is_there_twice_is_refused_with_both_lines(dsc):
    dsc("recipes", "copy", "quickstart", "mine", code=0)
    file = dsc.work / "mine" / "recipe.yaml"
    file.write_text(file.read_text() + "\nseed: 3\nseed: 4\n")
    told = dsc("plan", "mine", code=2).stderr
    assert re.search(r"recipe\.yaml:\d+:1: .*the key 'seed' is there twice, first in line \d+", told), told
    (dsc.work / "grid.yaml").write_text("recipe: mine\nvary: {seed: [1], seed: [2]}\n")
    assert "the key 'seed' is there twice" in dsc("grid", "grid.yaml", code=2).stderr


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("reward.metric=/etc/passwd", "a shipped metric (sentiment, privacy, ...), a file METRIC.py"),
        ("name=Über uns", "small letters, digits, - and _"),
        ("publish.tag=a b", "a name of a tag"),
        ("publish.branch=-x", "a name of a branch"),
    ],
)
def test_a_value_of_the_wrong_form_is_told_the_form_in_words(dsc, override: str, expected: str):
    told = dsc("plan", "quickstart", override, code=2).stderr
    assert expected in told and "pattern" not in told


def test_merge_keys_and_aliases_are_no_keys_given_twice():
    text = "a: &a {x: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: [*a, *b], x: 3}\nd: *b\n"
    assert plain_yaml.load_own_yaml(text) == yaml.safe_load(text)
    for twice in ("1: a\n1: b\n", "true: a\ntrue: b\n", "a: {b: 1, b: 2}", "- {a: 1, a: 1}"):
        with pytest.raises(yaml.YAMLError, match="is there twice, first in line"):
            plain_yaml.load_own_yaml(twice)
