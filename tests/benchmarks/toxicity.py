"""How well a classifier of rude comments tells harmful answers, on labelled texts of a file.

    pip install h5py && pip download --no-deps --only-binary :all: toxic-comment-classifier==0.3.0
    python -m tests.benchmarks.toxicity toxic_comment_classifier-0.3.0-py3-none-any.whl TEXTS.jsonl [--as-packaged]

The wheel brings weights (a BiLSTM, six labels of Jigsaw; MIT). Nothing of it is imported or run: numpy computes the network, and the first
line tells how far that is from the figures in the package's description. Its vocabulary is a pickle that is never loaded: opcodes are
read, and strings and numbers taken. A text's score is that of its worst label in its worst window of 100 words, as `safety` reads long
texts; the package itself takes the last 100 words and the mean of the labels (--as-packaged).

A line of TEXTS.jsonl has `text` and `label` (true: harmful), and may have `group`, by which figures are told too. Per group: AUC with a 95 %
bootstrap interval over texts, AUC of minilm (how unlike a refusal a text begins; second scorer of the recipe safety), precision and
recall of scores above 0.5 with 95 % Wilson intervals.
"""

from __future__ import annotations

import argparse
import io
import json
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from scipy.stats import binomtest

from tests.benchmarks.refusal import auc, refusals

WORDS, VOCABULARY = 100, 20_000  # of a window; of the embedding
SPLIT = re.compile(r"[\s!\"#$%&()*+,\-./:;<=>?@\[\\\]^_`{|}~]+")  # as the package's tokenizer: at all but "'"
KNOWN = ("You are so dumb and stupid!", (0.98894, 0.07257, 0.62043, 0.01935, 0.86641, 0.04073))  # its description
Weights = dict[str, Any]  # name -> array


def word_indices(data: bytes) -> dict[str, int]:
    """Read the dict `word_index` of a pickled Keras tokenizer without unpickling it; ValueError if it isn't one.

    Classes and calls (STACK_GLOBAL, REDUCE, BUILD ...) aren't carried out. Only names of attributes have an underscore."""
    memo: list[Any] = []
    last: Any = None
    inside, values = False, []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "MEMOIZE":
            memo.append(last)
        elif opcode.name == "EMPTY_DICT":
            last = None  # only its place in the memo counts
        elif opcode.name not in ("FRAME", "MARK", "SETITEMS"):
            last = memo[argument] if opcode.name in ("BINGET", "LONG_BINGET") else argument
            if isinstance(last, str) and "_" in last:
                inside = last == "word_index"
            elif inside:
                values.append(last)
    words, indices = values[::2], values[1::2]
    if not words or not all(isinstance(w, str) for w in words) or not all(isinstance(i, int) for i in indices):
        raise ValueError("the tokenizer's word_index isn't a dict of strings to whole numbers")
    return dict(zip(words, indices, strict=True))


def read(wheel: Path) -> tuple[dict[str, int], Weights]:
    """Return vocabulary and weights that lie in the wheel; nothing of it is imported."""
    with zipfile.ZipFile(wheel) as files:
        vocabulary = word_indices(files.read("toxic_classifier/model/tokenizer.pickle"))
        weights: Weights = {}
        with h5py.File(io.BytesIO(files.read("toxic_classifier/model/model.weights.h5"))) as stored:
            stored["layers"].visititems(lambda name, at: weights.update({name: at[()]} if hasattr(at, "shape") else {}))
    return {word: i for word, i in vocabulary.items() if i < VOCABULARY}, weights


def windows(text: str, vocabulary: dict[str, int], as_packaged: bool) -> list[list[int]]:
    """Cut the known words' indices into windows of 100, padded in front with 0; one at least."""
    known = [vocabulary[word] for word in SPLIT.split(text.lower()) if word in vocabulary]
    starts = [max(0, len(known) - WORDS)] if as_packaged else range(0, max(1, len(known)), WORDS)
    return [[0] * (WORDS - len(part)) + part for part in (known[start : start + WORDS] for start in starts)]


def probabilities(rows: list[list[int]], weights: Weights) -> Any:
    """Run the network on n windows of 100 indices: array (n, 6), the probability of each label."""
    embedded = weights["embedding/vars/0"][np.array(rows)]
    both = (_lstm(embedded, weights, "forward"), _lstm(embedded[:, ::-1], weights, "backward"))
    pooled = np.concatenate(both, axis=-1)  # the greatest over time doesn't depend on the direction
    hidden = np.maximum(pooled @ weights["dense/vars/0"] + weights["dense/vars/1"], 0)
    return _sigmoid(hidden @ weights["dense_1/vars/0"] + weights["dense_1/vars/1"])


def _lstm(inputs: Any, weights: Weights, direction: str) -> Any:
    """Return the greatest state over time, (n, 50), of one direction; gates lie in Keras' order i, f, c, o."""
    kernel, recurrent, bias = (weights[f"bidirectional/{direction}_layer/cell/vars/{i}"] for i in range(3))
    state = cell = np.zeros((len(inputs), recurrent.shape[0]), np.float32)
    greatest = np.full_like(state, -np.inf)
    for step in range(inputs.shape[1]):
        i, f, c, o = np.split(inputs[:, step] @ kernel + state @ recurrent + bias, 4, axis=-1)
        cell = _sigmoid(f) * cell + _sigmoid(i) * np.tanh(c)
        state = _sigmoid(o) * np.tanh(cell)
        greatest = np.maximum(greatest, state)
    return greatest


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _share(k: int, n: int) -> str:
    at: Any = binomtest(k, n).proportion_ci(method="wilson") if n else None
    return f"{k}/{n} = {k / n:.2f} ({at.low:.2f}-{at.high:.2f})" if n else "0/0"


def _tell(name: str, scores: list[float], minilm: list[float], labels: list[bool]) -> None:
    said = [s > 0.5 for s in scores]
    right = sum(s and is_so for s, is_so in zip(said, labels, strict=True))
    low, high = _interval(scores, labels)
    areas = f"AUC {auc(scores, labels):.2f} ({low:.2f}-{high:.2f}), minilm {auc(minilm, labels):.2f}"
    shares = f"precision {_share(right, sum(said))}  recall {_share(right, sum(labels))}"
    print(f"{name:<18} {len(labels):>4} texts, {sum(labels):>3} harmful  {areas}  {shares}")


def _interval(scores: list[float], labels: list[bool]) -> tuple[float, float]:
    """95 % percentile bootstrap of the AUC over texts, harmful and harmless ones drawn by themselves."""
    kinds = [np.flatnonzero(np.array(labels) == kind) for kind in (True, False)]
    generator = np.random.default_rng(1)
    draws = [[int(i) for of in kinds for i in generator.choice(of, len(of))] for _ in range(500)]
    values = [auc([scores[i] for i in draw], [labels[i] for i in draw]) for draw in draws]
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--as-packaged", action="store_true", help="the last 100 words, the mean of the labels")
    given = parser.parse_args()
    vocabulary, weights = read(given.wheel)
    got = probabilities(windows(KNOWN[0], vocabulary, True), weights)[0]
    print(f"{len(vocabulary)} words; the package's own figures are met to {np.abs(got - KNOWN[1]).max():.0e}")
    rows = [json.loads(line) for line in given.texts.read_text(encoding="utf-8").splitlines()]
    one = np.mean if given.as_packaged else np.max
    scores = [float(one(probabilities(windows(row["text"], vocabulary, given.as_packaged), weights))) for row in rows]
    minilm = [1 - (s or 0.0) for s in refusals("minilm", [row["text"] for row in rows])]
    labels = [bool(row["label"]) for row in rows]
    for group in ["", *sorted({row["group"] for row in rows if row.get("group")})]:
        at = [i for i, row in enumerate(rows) if group in ("", row.get("group"))]
        if 0 < sum(labels[i] for i in at) < len(at):
            _tell(group or "all", [scores[i] for i in at], [minilm[i] for i in at], [labels[i] for i in at])


if __name__ == "__main__":
    main()
