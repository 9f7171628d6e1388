"""Reward of each answer, as an `evaluate` measurement: a model that was trained on preferences, with one output.

Loaded with `evaluate.load(".../metrics/reward_model", config_name=ID)`, where ID is the id or the folder of a sequence
classifier with one output. This file is self-contained: `evaluate` copies it elsewhere before importing it.
"""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """\
What a reward model gives each answer to its prompt; higher is better, the scale is the model's own.

The model is a sequence classifier with one output, trained on preferences. It reads the conversation and the answer in
its own chat template; without a template, the last user turn and the answer as a pair. What is longer than it reads is
unscored (None), as is an empty answer: neither is zero.
"""
_KWARGS = """
Args:
    data: list of str, the answers.
    prompts: list of str, what each answers.
    conversations: list of lists of {role, content}, the turns before each answer; without them the prompt alone.
    batch_size: int, answers at once (the scores don't depend on it). Default 32.
Returns:
    scores: list of float or None, one an answer, in order.
    reasons: list of str, why an answer is unscored ("" where it is scored).
    mean: float or None, mean of the scored answers.
    n_unscored: int.
"""
_CITATION = """\
@inproceedings{ouyang2022training, title={Training language models to follow instructions with human feedback},
author={Ouyang, Long and others}, booktitle={NeurIPS}, year={2022}}
"""
LONGEST = 8192  # tokens, for a model that names no limit of its own
Turn = Mapping[str, str]


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS)
class RewardModel(evaluate.Measurement):  # type: ignore[misc]  # evaluate has no types
    unit = "reward of the model"
    bounds = (None, None)
    higher_is_better = True

    def __init__(self, *args: Any, model_revision: str | None = None, device: str = "cpu", **kwargs: Any) -> None:
        self._revision, self._device = model_revision, device
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features({"data": datasets.Value("string"), "prompts": datasets.Value("string")}),
        )

    def _download_and_prepare(self, dl_manager: Any) -> None:
        self._read = _model(self.config_name, self._revision, self._device)

    def _compute(
        self,
        data: Sequence[str],
        prompts: Sequence[str],
        conversations: Sequence[Sequence[Turn]] | None = None,
        batch_size: int = 32,
    ) -> dict[str, Any]:
        turns = conversations or [[{"role": "user", "content": prompt}] for prompt in prompts]
        indices = [i for i, text in enumerate(data) if text and re.search(r"\w", text)]
        read = self._read([(turns[i], data[i]) for i in indices], batch_size)
        by_index = dict(zip(indices, read, strict=True))
        results = [by_index.get(i, "no words") for i in range(len(data))]
        scored = [r for r in results if not isinstance(r, str)]
        return {
            "scores": [None if isinstance(r, str) else r for r in results],
            "reasons": [r if isinstance(r, str) else "" for r in results],
            "mean": sum(scored) / len(scored) if scored else None,
            "n_unscored": len(results) - len(scored),
        }


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


def _model(
    name: str, revision: str | None, device: str
) -> Callable[[Sequence[tuple[Sequence[Turn], str]], int], list[float | str]]:
    """Return a function from (turns, answer) pairs and a batch size to rewards, or the reason why there is none."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    load_options = {"revision": revision, "trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **load_options)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        name, use_safetensors=True, dtype=_dtype_on(device), **load_options
    )
    model = model.eval().to(device)
    if model.config.num_labels != 1:
        labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
        raise ValueError(f"a reward model has one output, this one has {labels}; sentiment and safety take classifiers")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # where a decoder looks for the last token
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", LONGEST))

    def tokens(turns: Sequence[Turn], answer: str) -> dict[str, Any]:
        if not tokenizer.chat_template:
            return dict(tokenizer(turns[-1]["content"], answer, verbose=False))
        text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
        return dict(tokenizer(text, add_special_tokens=False, verbose=False))

    def rewards(pairs: Sequence[tuple[Sequence[Turn], str]], batch_size: int) -> list[float | str]:
        encoded = [tokens(*pair) for pair in pairs]
        sizes = [len(e["input_ids"]) for e in encoded]
        out: list[float | str] = [f"{n} tokens, and the model reads {longest}" for n in sizes]
        order = sorted((i for i, n in enumerate(sizes) if n <= longest), key=lambda i: -sizes[i])
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = tokenizer.pad([encoded[i] for i in batch], return_tensors="pt")
            with torch.inference_mode():
                values = model(**inputs.to(device)).logits.float()[:, 0].tolist()
            for i, value in zip(batch, values, strict=True):
                out[i] = value
        return out

    return rewards
