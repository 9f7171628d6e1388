"""Side effects, each as an `evaluate` measurement: refusal, length, diversity, meta_talk, repetition, surprisal.

The surprisal (log perplexity) is that of a language model. Loaded with `evaluate.load(".../metrics/side_effects",
config_name=SCORER)`. Unlike the other metrics it needs dsc_hub installed: it uses the same functions as the tables of a
run.
"""

import importlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate

from dsc_hub.chain import hygiene
from dsc_hub.chain.text import distinct, repeated_share, words
from dsc_hub.metrics.safety.refusal import refuses

_DESCRIPTION = """\
One number about each text that says nothing of the wish.

refusal: 1 if it begins with a refusal, else 0; English (precision 0.86, recall 0.94 on 182 answers labelled by
reading).
length: words; in scripts that put no spaces between them (Chinese, Japanese, Thai and others) characters.
diversity: different pairs of neighbouring words (or such characters) over all of them, 0 to 1 (distinct-2); `across` is
that of all texts together.
meta_talk: 1 if it talks about the conversation ("here is my revised answer"), else 0; English (precision 1.00, recall
0.61 on 150 texts).
repetition: share of its 3-grams of words that occurred before in it, 0 to 1; of Chinese and Japanese its runs of 6
characters, of Thai and its like of 9.
any other name: a causal language model, mean surprise in nats a token (the logarithm of the perplexity; the first
token, which follows nothing, is left out).
Of refusal, meta_talk, repetition and surprise less is better, of length and diversity more. A text without words
(diversity: without a pair; surprise: without two tokens) is unscored (None), which is not zero.
"""
_KWARGS = """
Args:
    data: list of str, the texts.
    batch_size: int, texts at once for a model (the scores don't depend on it). Default 8.
Returns:
    scores: list of float or None, one a text, in order.
    reasons: list of str, why a text is unscored ("" where it is scored).
    mean: float or None, mean of the scored texts.
    across: float or None, of diversity: distinct-2 of all texts together.
    n_unscored: int.
"""
_CITATION = """\
@inproceedings{li2016diversity, title={A Diversity-Promoting Objective Function for Neural Conversation Models},
author={Li, Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill}, booktitle={NAACL},
year={2016}}
"""
SHARE = (0.0, 1.0)
Count = Callable[[str], float | None]
Surprise = Callable[[list[str], int], list[float | None]]  # texts, batch size -> nats per token
# Function of each scorer, its unit, whether higher is better, and its range.
SCORERS: dict[str, tuple[Count | None, str, bool, tuple[float, float | None]]] = {
    "refusal": (lambda text: float(refuses(text)), "refusals, 0 or 1", False, SHARE),
    "length": (lambda text: float(len(words(text))), "words", True, (0.0, None)),
    "diversity": (lambda text: distinct([text], 2), "share of different word pairs", True, SHARE),
    "meta_talk": (
        lambda text: float(hygiene.talks_about_the_conversation(text)),
        "talk about the conversation, 0 or 1",
        False,
        SHARE,
    ),
    "repetition": (
        lambda text: repeated_share(words(text), 3),
        "share of repeated 3-grams",
        False,
        SHARE,
    ),
}
_MOST_TOKENS = 1024  # longer texts are truncated


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS)
class SideEffects(evaluate.Measurement):  # type: ignore[misc]  # evaluate has no types
    def __init__(self, *args: Any, model_revision: str | None = None, **kwargs: Any) -> None:
        self._revision = model_revision
        super().__init__(*args, **kwargs)
        name = "length" if self.config_name == "default" else self.config_name
        surprise = (None, "nats a token", False, (0.0, None))
        self._count, self.unit, self.higher_is_better, self.bounds = SCORERS.get(name, surprise)

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features({"data": datasets.Value("string")}),
        )

    def _download_and_prepare(self, dl_manager: Any) -> None:
        if self.config_name not in (*SCORERS, "default"):
            self._surprise = _language_model(self.config_name, self._revision)

    def _compute(self, data: Sequence[str], batch_size: int = 8) -> dict[str, Any]:
        indices = [i for i, text in enumerate(data) if re.search(r"\w", text or "")]
        texts = [data[i] for i in indices]
        values = [self._count(text) for text in texts] if self._count else self._surprise(texts, batch_size)
        values_by_index = dict(zip(indices, values, strict=True))
        scores = [values_by_index.get(i) for i in range(len(data))]
        scored = [s for s in scores if s is not None]
        return {
            "scores": scores,
            "reasons": [
                "" if s is not None else "too short" if i in values_by_index else "no words"
                for i, s in enumerate(scores)
            ],
            "mean": sum(scored) / len(scored) if scored else None,
            "across": distinct(texts, 2) if self.config_name == "diversity" else None,
            "n_unscored": len(scores) - len(scored),
        }


def _language_model(name: str, revision: str | None) -> Surprise:
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    load_options = {"revision": revision, "trust_remote_code": False} if revision else {"trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **load_options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        name, use_safetensors=True, dtype=torch.float32, **load_options
    ).eval()

    def nats(windows: list[list[int]]) -> list[float | None]:
        """Return the mean surprisal of each row of token ids; None for a row with fewer than two tokens."""
        longest = max(map(len, windows))
        ids = torch.tensor([w + [0] * (longest - len(w)) for w in windows])
        mask = torch.tensor([[1] * len(w) + [0] * (longest - len(w)) for w in windows])
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        surprise = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        sums = (surprise * mask[:, 1:]).sum(1).tolist()
        return [s / (len(w) - 1) if len(w) > 1 else None for s, w in zip(sums, windows, strict=True)]

    def score(texts: list[str], batch_size: int) -> list[float | None]:
        windows = [w[:_MOST_TOKENS] for w in tokenizer(texts)["input_ids"]] if texts else []
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))  # texts of similar length together
        out: list[float | None] = [None] * len(windows)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for i, value in zip(batch, nats([windows[i] for i in batch]), strict=True):
                out[i] = value if value is None or math.isfinite(value) else None
        return out

    return score
