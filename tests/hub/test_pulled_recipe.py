"""A recipe that was pulled is data: it can't say where things go, which servers and keys are used, nor reach a file of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsc_hub.config import recipe
from dsc_hub.errors import ConfigError, DscError, HubError
from dsc_hub.hub.account import login
from dsc_hub.hub.pull import pull_repo
from dsc_hub.local_hub.server import Address
from dsc_hub.pipeline import preflight, resolve
from dsc_hub.pipeline.import_reference import import_rows
from dsc_hub.publish import upload
from dsc_hub.report import cards
from dsc_hub.system import hashing
from tests import small_run
from tests.conftest import FILMS, RECIPE
from tests.hub import at_hub
from tests.pipeline.test_import_reference import ROWS

REPO = "local/shared"


@pytest.fixture(autouse=True)
def here(address: Address, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    at_hub.point(monkeypatch, address, tmp_path / "cache")


def shared(address: Address, text: str | bytes, **files: str) -> None:
    """Somebody's dataset repo with this recipe in it."""
    api = login(None, address.endpoint, address.token).api
    api.create_repo(REPO, repo_type="dataset", private=True, exist_ok=True)
    for name, content in {"recipe.yaml": text, "films.txt": FILMS, **files}.items():
        data = content if isinstance(content, bytes) else content.encode()
        api.upload_file(path_or_fileobj=data, path_in_repo=name, repo_id=REPO, repo_type="dataset")


def changed(path: str, value: Any) -> str:
    data = yaml.safe_load(RECIPE)
    node, (*parents, last) = data, path.split(".")
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    return yaml.safe_dump(data)


def test_a_plain_one_is_taken_with_its_prompts_and_overrides(address: Address):
    shared(address, RECIPE)
    path, found = resolve.load_recipe(f"hub:{REPO}", ["chain.steps=1", "publish.private=false"])
    assert (path.parent / "films.txt").read_text() == FILMS
    assert found.chain.steps == 1 and found.publish.private is False  # said on this command line


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("serving.endpoints", ["http://evil.example/v1"], "serving.endpoints: servers and keys"),
        ("serving.api_key_env", "BIG_API_KEY", "serving.api_key_env: servers and keys"),
        ("serving.api_key_env", "AWS_SECRET_ACCESS_KEY", "serving.api_key_env: should name a variable"),
        ("serving.served_model", "other", "serving.served_model"),
        ("model.source", "/etc", "model.source: '/etc' is a local folder"),
        ("model.source", "~/models/mine", "is a local folder"),
        ("reward", {"scorer": "/home/me/scorer"}, "reward.scorer: '/home/me/scorer' is a local folder"),
        ("prompts.values", "/etc/passwd", "prompts.values: '/etc/passwd' is not a file beside the recipe"),
        ("prompts.values", "../../secret.txt", "is not a file beside the recipe"),
        ("prompts.values", "a/b.txt", "is not a file beside the recipe"),
        ("prompts.values", ".netrc", "is not a file beside the recipe"),
        ("publish.private", False, "publish.private: where it goes and who may see it is for you to say"),
        ("publish.owner", "evil", "publish.owner"),
        ("publish.overwrite", True, "publish.overwrite"),
        ("publish.branch", "other", "publish.branch"),
        ("publish.collection", "Look at me", "publish.collection"),
        ("distill.sft", {"output_dir": "/home/me"}, "sft.output_dir is set by dsc itself"),
        ("distill.sft", {"push_to_hub": True, "hub_model_id": "evil/x"}, "set by dsc itself"),
        ("distill.sft", {"report_to": "wandb"}, "sft.report_to is set by dsc itself"),
        ("distill.sft", {"deepspeed": "evil.json"}, "sft.deepspeed is set by dsc itself"),
        ("distill.sft", {"model_init_kwargs": {"trust_remote_code": True}}, "set by dsc itself"),
        ("distill.sft", {"accelerator_config": "/dev/zero"}, "distill.sft.accelerator_config: not a setting"),
        ("distill.sft", {"resume_from_checkpoint": "/home/me/x"}, "distill.sft.resume_from_checkpoint: not a setting"),
        ("distill.sft", {"lr_scheduler_type": "/dev/zero"}, "distill.sft.lr_scheduler_type: expected numbers, names"),
        ("distill.sft", {"max_steps": {"a": 1}}, "distill.sft.max_steps: expected numbers, names"),
        ("distill.lora", {"target_modules": "(a|a)*b"}, "distill.lora.target_modules: expected numbers, names"),
        ("distill.lora", {"target_modules": [["q_proj"]]}, "distill.lora.target_modules: expected numbers, names"),
        ("distill.lora", {"rank_pattern": {"(a|a)*b": 4}}, "distill.lora.rank_pattern: not a setting"),
        ("distill.quantization", {"bnb_4bit_quant_type": "../x"}, "quantization.bnb_4bit_quant_type: expected"),
        ("generation.extra", {"tools": [{"type": "function"}]}, "generation.extra.tools: not a setting"),
        ("generation.extra", {"chat_template": "{{ 1 }}"}, "generation.extra.chat_template: not a setting"),
        ("generation.extra", {"guided_regex": "(a|a)*b"}, "generation.extra.guided_regex: not a setting"),
        ("generation.extra", {"models": ["dear"]}, "generation.extra.models: not a setting"),
        ("generation.extra", {"kv_transfer_params": {"remote_host": "h"}}, "extra.kv_transfer_params: not a setting"),
        ("generation.extra", {"stop": ["x" * 300]}, "generation.extra.stop: expected numbers, names"),
        ("generation.extra", {"chat_template_kwargs": {"a": {"b": 1}}}, "chat_template_kwargs: expected numbers"),
        ("reward", {"scorer": "long/../" + "./" * 130 + "models/clf"}, "reward.scorer: 'long/"),
        ("model.source", "a/b/c", "model.source: 'a/b/c' is no name"),
        (
            "reward",
            {"metric": "judge", "scorer": "guard", "options": {"model": "m", "votes": 100_000}},
            "reward.options.votes: at most 16",
        ),
        (
            "generation.extra",
            {"chat_template_kwargs": {"chat_template": "x"}},
            "chat_template_kwargs.chat_template is no setting",
        ),
        ("generation.extra", {"chat_template_kwargs": {"documents": "x"}}, "chat_template_kwargs: not a setting"),
        ("generation.extra", {"chat_template_kwargs": {"a": "{% for %}"}}, "chat_template_kwargs: expected numbers"),
        ("metric_code", "hub:evil/metric", "metric_code: unknown key"),
        ("reward", {"metric": "evil.py"}, "reward.metric: 'evil.py' is code"),
        ("second_scorer", {"metric": "sub/evil.py"}, "second_scorer.metric: 'sub/evil.py' is code"),
        ("reward", {"plus": [{"metric": "evil.py"}]}, "reward.plus.0.metric: 'evil.py' is code"),
        ("reward", {"metric": "../evil/metric.py/"}, "reward.metric"),
        ("reward", {"options": {"endpoint": "http://evil.example"}}, "reward.options.endpoint: servers and keys"),
        (
            "chain.critic",
            {"model": "m", "endpoint": "http://evil.example/v1"},
            "chain.critic.endpoint: servers and keys",
        ),
        ("chain.critic", {"model": "m", "api_key_env": "BIG_API_KEY"}, "chain.critic.api_key_env: servers and keys"),
        ("reward", {"options": {"api_key_env": "HF_TOKEN"}}, "reward.options.api_key_env: servers and keys"),
    ],
)
def test_what_is_not_its_business_is_refused(address: Address, path: str, value: Any, told: str):
    shared(address, changed(path, value))
    with pytest.raises(ConfigError) as e:
        resolve.load_recipe(f"hub:{REPO}", [])
    assert told in str(e.value)


def test_what_it_passes_on_may_be_numbers_and_names(address: Address):
    data = yaml.safe_load(RECIPE)
    data["generation"] = {
        "extra": {"top_k": 40, "stop": ["\n\nUser:"], "chat_template_kwargs": {"enable_thinking": False}}
    }
    data["distill"] = {
        "sft": {"learning_rate": 1e-4, "lr_scheduler_type": "cosine", "packing": False},
        "lora": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
        "quantization": {"bnb_4bit_compute_dtype": "bfloat16"},
    }
    shared(address, yaml.safe_dump(data))
    assert resolve.load_recipe(f"hub:{REPO}", [])[1].generation.extra["top_k"] == 40


@pytest.mark.parametrize(
    ("path", "value", "override"),
    [
        ("serving.endpoints", ["http://evil.example/v1"], "serving.endpoints=[]"),
        ("chain.critic", {"model": "m", "endpoint": "http://evil.example/v1"}, "chain.critic=null"),
        ("reward", {"metric": "evil.py"}, "reward.metric=sentiment"),
        ("distill.sft", {"accelerator_config": "/dev/zero"}, "distill.sft={}"),
        ("publish.owner", "evil", "publish.owner=null"),
    ],
)
def test_what_is_refused_can_be_set_anew_as_the_error_says(address: Address, path: str, value: Any, override: str):
    shared(address, changed(path, value))
    with pytest.raises(ConfigError, match="give them as overrides"):
        resolve.load_recipe(f"hub:{REPO}", ["chain.steps=1"])
    found = resolve.load_recipe(f"hub:{REPO}", [override])[1].model_dump_json()
    assert "evil" not in found and "/dev/zero" not in found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: !!python/object/apply:os.system ['touch it-ran']\n" + RECIPE, "YAML tag"),
        ("seed: !!int ''\n" + RECIPE, "YAML tag"),
        ("%YAML 1.3\n---\nx: &a [1]\ny: *a\n" + RECIPE, "can't be read: not valid YAML"),
        ("x: &a [1, 2]\ny: [*a, *a, *a]\n" + RECIPE, "YAML aliases"),
        ("# " + "x" * 100_000 + "\n" + RECIPE, "at most 100,000 are read"),
        ("[" * 100_000, "nested more than 20 deep"),
        ("a: " + "{a: " * 30 + "\n" + RECIPE, "nested more than 20 deep"),
        (b"\xff\xfe", "not UTF-8"),
    ],
    ids=[
        "a tag that runs",
        "a tag",
        "another version",
        "aliases",
        "too large",
        "no end of brackets",
        "deep",
        "no text",
    ],
)
def test_a_text_that_is_no_plain_yaml_is_refused(address: Address, tmp_path: Path, monkeypatch, text, told: str):
    monkeypatch.chdir(tmp_path)
    shared(address, text)
    with pytest.raises(DscError) as e:
        resolve.load_recipe(f"hub:{REPO}", [])
    assert told in str(e.value) and not (tmp_path / "it-ran").exists()


def test_prompts_that_it_names_and_does_not_bring_are_told(address: Address):
    shared(address, changed("prompts.values", "others.txt"))
    with pytest.raises(HubError, match="names the prompt file 'others.txt' and doesn't hold it"):
        resolve.load_recipe(f"hub:{REPO}", [])


def test_the_token_goes_to_its_own_endpoint_alone(address: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two Hubs: what is asked of one never carries the token of the other."""
    from tests.hub.faults import running as recorded

    seen: list[str] = []
    with recorded(tmp_path / "other") as (other, faulty):
        app = faulty.app

        async def listening(scope: dict, receive: Any, send: Any) -> None:
            seen.extend(v.decode() for k, v in scope.get("headers", ()) if k == b"authorization")
            await app(scope, receive, send)

        faulty.app = listening
        login(None, other.endpoint, other.token)
        assert seen and all(other.token in header for header in seen)
        assert not any(address.token in header for header in seen)


def test_the_repos_it_names_are_known_as_not_chosen_here(address: Address, tmp_path: Path):
    shared(address, changed("publish", {"dataset": "precious", "base": "weights", "to": "local"}))

    def kinds(*overrides: str, reference: str = f"hub:{REPO}@main") -> set[str]:
        return set(resolve.resolve_recipe(reference, overrides, tmp_path / "runs").names_by)

    assert kinds() == kinds("publish.dataset=null") == {"dataset", "adapter", "base"}
    assert kinds("publish.dataset=mine") == kinds("publish.dataset=precious") == {"adapter", "base"}
    assert kinds("name=mine") == {"dataset", "base"}  # the adapter has no name of its own
    assert kinds("publish={adapter: mine, to: local}") == {"dataset"}
    assert kinds("publish={adapter: mine, to: local}", "name=mine") == set()
    folder = pull_repo(REPO, tmp_path / "pulled").folder
    context = resolve.resolve_recipe(str(folder / "recipe.yaml"), [], tmp_path / "runs")
    assert set(context.names_by) == {"dataset", "adapter", "base"}
    hub_job = resolve.resolve_recipe(f"hub:{REPO}", [], tmp_path / "runs")
    assert {s.sha256 for s in (*context.names_by.values(), *hub_job.names_by.values())} == {
        hashing.file_hash(folder / "recipe.yaml")
    }
    (tmp_path / "films.txt").write_text(FILMS)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert kinds(reference=str(tmp_path / "recipe.yaml")) == set()


def test_plan_and_publish_refuse_to_write_where_a_stranger_says(address: Address, tmp_path: Path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "films.txt").write_text(FILMS)
    (tmp_path / "recipe" / "recipe.yaml").write_text(RECIPE)
    run, r = small_run.make(tmp_path / "run", tmp_path / "recipe" / "recipe.yaml")
    account = login(None, address.endpoint, address.token)
    account.api.create_repo("local/little-dsc", repo_type="dataset", private=True)
    account.api.upload_file(
        path_or_fileobj=b"1", path_in_repo="years.csv", repo_id="local/little-dsc", repo_type="dataset"
    )
    shared(address, RECIPE)
    context = resolve.resolve_recipe(f"hub:{REPO}", ["publish.to=local"], tmp_path / "runs")
    with pytest.raises(ConfigError) as error:
        preflight.check_run(context, account)
    assert any(f"by a recipe of somebody else ({REPO})" in p for p in error.value.problems)
    with pytest.raises(HubError, match="by a recipe of somebody else"):
        upload.publish_run(
            run, account, tmp_path, tmp_path / "recipe", r.publish, lambda: cards.build_cards(run), context.names_by
        )
    assert "years.csv" in account.api.list_repo_files("local/little-dsc", repo_type="dataset")


def test_rows_imported_with_it_go_to_no_repo_that_it_names(address: Address, tmp_path: Path):
    shared(address, changed("publish", {"dataset": "precious", "adapter": "precious-lora", "to": "none"}))
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ROWS))
    context, _ = import_rows(rows, f"hub:{REPO}", ["publish.adapter=chosen"], tmp_path / "mine", tmp_path / "runs")
    assert recipe.repo_names(context.recipe) == {"dataset": "mine-dsc", "adapter": "chosen", "base": None}
