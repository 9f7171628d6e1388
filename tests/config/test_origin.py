"""What was downloaded stays somebody else's until it is adopted, however it is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from dsc_hub.config import origin, recipe, untrusted
from dsc_hub.config.recipe import Recipe
from dsc_hub.config.sampling import ScorerConfig
from dsc_hub.config.serving import ServingConfig
from dsc_hub.errors import ConfigError, MetricError
from dsc_hub.metrics.registry import identify_scorer
from dsc_hub.pipeline import grid, resolve
from dsc_hub.system.addresses import checked_address, checked_key_name, host, is_open
from tests import fixture_run
from tests.conftest import FILMS, RECIPE

THIEF = {"chain": {"critic": {"model": "m", "endpoint": "http://evil.example/v1", "api_key_env": "OPENAI_API_KEY"}}}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, models_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "models").symlink_to(models_cache)
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def written(folder: Path, more: dict | None = None) -> Path:
    """A recipe with its prompts in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = yaml.safe_load(RECIPE)
    for section, keys in (more or {}).items():
        data[section] |= keys
    (folder / "films.txt").write_text(FILMS)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data))
    return folder / "recipe.yaml"


def by_pull(folder: Path) -> None:
    origin.mark(folder, "evil/shared@abc")


def by_client(folder: Path) -> None:
    kept = folder / ".cache" / "huggingface" / "download"
    kept.mkdir(parents=True)
    (kept / "recipe.yaml.metadata").write_text("x")


def by_clone(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"files": {"recipe.yaml": {"sha256": "0"}}}))


def with_a_broken_mark(folder: Path) -> None:
    (folder / origin.MARK).write_text("[" * 5000)


def test_of_a_project_that_somebody_downloads_into_only_what_came_is_somebody_else_s(tmp_path: Path):
    mine, theirs = written(tmp_path, THIEF), tmp_path / "theirs.yaml"
    theirs.write_text(mine.read_text())
    kept = tmp_path / ".cache" / "huggingface" / "download"
    kept.mkdir(parents=True)
    (kept / "theirs.yaml.metadata").write_text("x")
    assert origin.of_another(mine) is None and origin.of_another(theirs)


def test_an_app_s_manifest_above_is_no_sign(tmp_path: Path):
    path = written(tmp_path / "app" / "mine", THIEF)
    for text in ('{"files": 3}', '{"files": ["recipe.yaml"]}', "[]", "x"):
        (tmp_path / "app" / "manifest.json").write_text(text)
        assert origin.of_another(path) is None


WAYS = [by_pull, by_client, by_clone, with_a_broken_mark]


@pytest.mark.parametrize("way", WAYS)
def test_a_downloaded_recipe_is_refused_what_a_pulled_one_is_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way
):
    path = written(tmp_path / "shared", THIEF)
    way(path.parent)
    (tmp_path / "link.yaml").symlink_to(path)
    (tmp_path / "folder").symlink_to(path.parent)
    (path.parent / "sub").mkdir()
    monkeypatch.chdir(path.parent / "sub")
    names = [path, path.parent, tmp_path / "link.yaml", tmp_path / "folder", "..", "../recipe.yaml"]
    for name in names:
        with pytest.raises(ConfigError, match=r"chain\.critic\.endpoint: servers and keys") as e:
            resolve.load_recipe(str(name), [])
        assert "dsc recipes adopt" in str(e.value), name


@pytest.mark.parametrize("cache", ["hf/hub", "elsewhere", "datasets"])
def test_in_the_cache_of_the_hub_s_client_nothing_is_one_s_own(tmp_path: Path, cache: str):
    blob = written(tmp_path / cache / "datasets--evil--shared" / "blobs", THIEF)
    snapshot = blob.parent.parent / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "recipe.yaml").symlink_to(blob)
    for path in (blob, snapshot / "recipe.yaml"):
        with pytest.raises(ConfigError, match="servers and keys"):
            resolve.load_recipe(str(path), [])
    with pytest.raises(ConfigError, match="cache of a Hub"):
        origin.adopt(snapshot)


def test_one_s_own_recipe_may_name_servers(tmp_path: Path):
    path = written(tmp_path / "mine", THIEF)
    (path.parent / "manifest.json").write_text('{"name": "an app"}')  # some other tool's
    assert resolve.load_recipe(str(path), [])[1].chain.critic is not None


@pytest.mark.parametrize("way", WAYS)
def test_what_was_adopted_is_one_s_own_and_what_comes_after_it_is_not(tmp_path: Path, way):
    path = written(tmp_path / "shared", THIEF)
    way(path.parent)
    origin.adopt(path.parent)
    assert origin.of_another(path) is None
    assert resolve.load_recipe(str(path), [])[1].chain.critic is not None
    with pytest.raises(ConfigError, match="your own already"):
        origin.adopt(path.parent)
    origin.mark(path.parent, "evil/other@def")  # another download into the same place
    assert origin.of_another(path) == "evil/other@def"


def test_a_folder_can_not_say_of_itself_that_it_was_adopted(tmp_path: Path):
    mine, theirs = written(tmp_path / "a", THIEF), written(tmp_path / "b", THIEF)
    by_pull(mine.parent)
    origin.adopt(mine.parent)
    (theirs.parent / origin.MARK).write_text((mine.parent / origin.MARK).read_text())
    (theirs.parent / "adopted.json").write_text((tmp_path / "home" / origin.ADOPTED).read_text())
    assert origin.of_another(theirs) == "evil/shared@abc"


def test_adopting_writes_through_no_link(tmp_path: Path):
    path, precious = written(tmp_path / "shared", THIEF), tmp_path / "precious"
    by_clone(path.parent)
    precious.write_text("mine")
    (path.parent / origin.MARK).symlink_to(precious)
    origin.adopt(path.parent)
    assert precious.read_text() == "mine" and origin.of_another(path) is None


def test_a_part_is_not_adopted_and_nothing_beside_it(tmp_path: Path):
    one, other = written(tmp_path / "project" / "a", THIEF), written(tmp_path / "project" / "b", THIEF)
    by_pull(tmp_path / "project")
    with pytest.raises(ConfigError, match="a part of the downloaded folder .*/project"):
        origin.adopt(one.parent)
    assert origin.of_another(one) and origin.of_another(other)


def test_what_adopting_shows(tmp_path: Path):
    folder = written(tmp_path / "shared").parent
    (folder / "gpu.yaml").write_text(written(tmp_path / "other", THIEF).read_text())
    (folder / "grid.yaml").write_text("recipe: gpu.yaml\nvary: {serving.endpoints: [[http://evil.example/v1]]}")
    (folder / "bomb.yaml").write_text("a: &a [1]\nb: *a")
    (folder / "cheer.py").write_text("x = 1")
    (folder / "p.txt").symlink_to(tmp_path / "secret")
    lines = "\n".join(untrusted.reach_of(folder))
    assert "gpu.yaml  asks http://evil.example/v1 with the key in OPENAI_API_KEY" in lines
    assert "grid.yaml  is no recipe" in lines and "bomb.yaml  is no recipe" in lines and "cheer.py  is code" in lines
    assert f"p.txt  is a link to {tmp_path / 'secret'}" in lines


def test_where_it_came_from_can_not_drive_the_terminal(tmp_path: Path):
    path = written(tmp_path / "shared", THIEF)
    origin.mark(path.parent, "x\x1b[3A\r\x1b[J\nasks nobody")
    where = origin.of_another(path)
    assert where and where.isprintable() and len(where) <= 100


def test_a_slip_in_a_downloaded_recipe_is_no_reason_to_adopt_it(tmp_path: Path):
    path = written(tmp_path / "shared")
    by_pull(path.parent)
    path.write_text(path.read_text() + "\nchian: {steps: 1}\n")
    with pytest.raises(ConfigError, match="chian: unknown key") as e:
        resolve.load_recipe(str(path), [])
    assert "adopt" not in str(e.value)


def test_a_downloaded_run_is_asked_nothing_at_its_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from dsc_hub.cli import chat
    from dsc_hub.inference import external
    from dsc_hub.runs.run import Run
    from dsc_hub.system.files import write_json

    written(tmp_path / "lora", {})
    data = yaml.safe_load(RECIPE) | {"serving": {"endpoints": ["https://evil.example/v1"]}}
    write_json(tmp_path / "lora" / "run.json", fixture_run.facts() | {"recipe": data})
    (tmp_path / "lora" / "adapter").mkdir()
    (tmp_path / "lora" / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "lora" / "distill.done.json").write_text("{}")
    by_pull(tmp_path / "lora")
    monkeypatch.setattr(external, "external", lambda section: pytest.fail("it was asked"))
    with pytest.raises(ConfigError, match="serving.endpoints: servers and keys"):
        chat.start_chat(Run(tmp_path / "lora"))


def test_a_downloaded_recipe_reads_no_file_through_a_link(tmp_path: Path):
    path = written(tmp_path / "shared")
    by_clone(path.parent)
    resolve.load_recipe(str(path), [])
    (tmp_path / "secret.txt").write_text("hush")
    (path.parent / "films.txt").unlink()
    (path.parent / "films.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ConfigError, match="'films.txt' is a link out"):
        resolve.load_recipe(str(path), [])


def test_a_downloaded_grid_is_refused(tmp_path: Path):
    path = written(tmp_path / "shared").parent / "grid.yaml"
    path.write_text("recipe: recipe.yaml\nvary: {serving.endpoints: [[http://evil.example/v1]]}")
    grid.read_grid(path)
    by_pull(path.parent)
    with pytest.raises(ConfigError, match="downloaded from evil/shared@abc, is refused"):
        grid.read_grid(path)


def test_adopting_shows_what_a_recipe_reaches_and_asks(dsc, tmp_path: Path):
    path = written(dsc.work / "shared", THIEF | {"publish": {"to": "hub", "private": False}})
    by_pull(path.parent)
    asked = dsc("recipes", "adopt", "shared", code=2)  # stdin is at its end: no answer is no
    for told in ("asks http://evil.example/v1 with the key in OPENAI_API_KEY", "PUBLICLY to hub", "reads films.txt"):
        assert told in asked.stderr
    assert "servers and keys" in dsc("plan", "shared", code=2).stderr
    assert "shared is yours" in dsc("recipes", "adopt", "shared", "--yes", code=0).stdout
    assert "servers and keys" not in dsc("plan", "shared", code=2).stderr


def test_plan_says_which_key_goes_where_before_it_is_sent(dsc, recipe_file: Path):
    done = dsc(
        "plan",
        str(recipe_file),
        "serving.endpoints=[http://10.255.255.1:9/v1]",
        "serving.api_key_env=BIG_API_KEY",
        BIG_API_KEY="sk-hush",
        http_proxy="http://127.0.0.1:1",  # nothing leaves this machine
    )
    assert done.returncode == 2
    first, second, *rest = done.stderr.splitlines()
    assert first == "serving.endpoints  asks 10.255.255.1:9 with the key in BIG_API_KEY"
    assert "unencrypted" in second and "can't be used" in " ".join(rest) and "sk-hush" not in done.stderr


@pytest.mark.parametrize(
    "name",
    "AWS_SECRET_ACCESS_KEY AWS_API_KEY HF_TOKEN HF_API_TOKEN HUGGINGFACE_API_KEY GITHUB_API_TOKEN WANDB_API_KEY PATH HOME "
    "HUGGINGFACEHUB_API_TOKEN CF_API_TOKEN HEROKU_API_KEY GOOGLE_APPLICATION_CREDENTIALS DB_PASSWORD openai_api_key API_KEY_FILE NPM_API_TOKEN".split()
    + ["", "A_API_KEY\n"],
)
def test_only_a_model_server_s_key_may_be_named(name: str):
    with pytest.raises(ValueError, match="model server's key"):
        checked_key_name(name)
    with pytest.raises(ValueError, match="model server's key"):
        ServingConfig(api_key_env=name)
    with pytest.raises(MetricError, match="option api_key_env"):
        options = {"endpoint": "http://a/v1", "model": "m", "api_key_env": name}
        identify_scorer(ScorerConfig(metric="judge", scorer="guard", options=options))


def test_usual_names_of_keys_are_taken():
    for name in (
        "OPENAI_API_KEY API_KEY VLLM_API_KEY AZURE_OPENAI_API_KEY TOGETHER_API_KEY LITELLM_API_KEY MY_API_TOKEN".split()
    ):
        assert checked_key_name(name) == name


@pytest.mark.parametrize(
    "address",
    ["http://user:pw@host/v1", "http://user@host/v1", "file:///etc/passwd", "ftp://host/v1", "host:8000/v1", "http://",
     "http://host:port/v1", "http://[::1/v1", "http://a b/v1", "http://a/v1\r\nX: y", "data:,x"],
)  # fmt: skip
def test_no_address_but_of_a_web_server(address: str):
    with pytest.raises(ValueError, match="address"):
        checked_address(address)
    with pytest.raises(MetricError, match="option endpoint"):
        identify_scorer(ScorerConfig(metric="judge", scorer="guard", options={"endpoint": address, "model": "m"}))
    with pytest.raises(ConfigError, match=r"serving\.endpoints"):
        resolve.load_recipe("quickstart", [f"serving.endpoints={json.dumps([address])}"])


def test_where_a_key_would_cross_a_network_unencrypted():
    assert is_open("http://10.0.0.1:8000/v1") and is_open("http://gpu/v1")
    assert not any(
        map(is_open, ("https://gpu/v1", "http://127.0.0.1:1/v1", "http://localhost/v1", "http://[::1]:80/v1"))
    )
    assert (host("http://a:80/v1"), host("https://b/v1")) == ("a:80", "b")


def test_every_server_of_a_recipe_is_known(tmp_path: Path):
    judge = {"endpoint": "http://judge/v1", "model": "m", "api_key_env": "JUDGE_API_KEY"}
    data = yaml.safe_load(RECIPE)
    data["chain"]["critic"] = {"model": "m", "endpoint": "http://critic/v1"}
    data |= {"serving": {"endpoints": ["http://base/v1"]}}
    data |= {"second_scorer": {"metric": "judge", "scorer": "guard", "options": judge}}
    data |= {
        "reward": {"plus": [{"metric": "judge", "scorer": "guard", "options": {**judge, "endpoint": "http://term/v1"}}]}
    }
    found = {(s.address, s.key_name) for s in recipe.servers(Recipe.model_validate(data))}
    assert found == {
        ("http://base/v1", "OPENAI_API_KEY"),
        ("http://critic/v1", "OPENAI_API_KEY"),
        ("http://judge/v1", "JUDGE_API_KEY"),
        ("http://term/v1", "JUDGE_API_KEY"),
    }


def test_no_object_shows_a_key():
    from dsc_hub.inference.servers import Endpoint
    from dsc_hub.inference.vllm import VllmServer

    assert "hush" not in repr(Endpoint("http://a/v1", "m", "hush"))
    engine = VllmServer.__new__(VllmServer)
    engine.api_key = "hush"
    assert "hush" not in repr(engine) and os.environ.get("HF_TOKEN") is None


def test_a_folder_that_all_can_read_is_said_once_it_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from dsc_hub.system import machine, progress

    above = tmp_path / "shared"
    (above / "runs").mkdir(parents=True)
    assert tmp_path.stat().st_mode & 0o005 == 0  # pytest's folders are the user's alone, and so is what lies in them
    (above / "runs").chmod(0o755)
    assert not machine.is_open_to_all(above / "runs") and not machine.is_open_to_all(tmp_path / "none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "parents", property(lambda p: (above,)))
        above.chmod(0o711)
        assert machine.is_open_to_all(above / "runs") and not machine.is_open_to_all(above)
        progress.say_if_open(above / "runs")
        above.chmod(0o700)
        progress.say_if_open(above / "runs")
    said = capsys.readouterr().err
    assert said.count("can be read by all users") == 1 and f"chmod go= {above / 'runs'}" in said.replace("\n", "")
