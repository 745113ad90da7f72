"""Any sequence classifier of transformers, in a folder or on the Hub, as a scorer.

Its score is the probability of one label. The label need not mean toxicity:
``classifier:zjunlp/SafeEdit-Safety-Classifier#LABEL_1`` is the one of SafeEdit, whose label 1 is
unsafe.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np
import torch
from msgspec.structs import asdict
from numpy.typing import NDArray

from converter.errors import OptionError, SourceError
from converter.evaluation.scorers import Scorer
from converter.hub import repos as hub
from converter.hub.addresses import snapshot_of
from converter.manifest import Origin, ScorerOrigin
from converter.models.transformers_loader import Loading, from_files
from converter.runtime import progress
from converter.text import readable

_TOXIC = ("toxic", "toxicity", "unsafe", "label_1")
"""Names of the toxic label, the plainest first. The last is the default name of label 1, which
counts as toxic only if there are two labels.
"""

_BATCH = 32
"""Texts that are scored at once."""


def load(argument: str, device: str) -> Scorer:
    """Load a classifier; code that comes with it is not run.

    Args:
        argument: a folder or a Hub repo id with an optional ``@revision``, and an optional
            ``#LABEL``.

    Raises:
        OptionError: neither is given, or the toxic label is not clear.
        SourceError: the classifier cannot be reached or loaded.
    """
    name, _, label = argument.partition("#")
    if not name:
        raise OptionError(
            "--scorer classifier", expected="classifier:FOLDER or classifier:REPO_ID", found="none"
        )
    folder, found = _locate(name)
    model, tokenizer = _load(folder, name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    labels = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    index = find_label(labels, label)
    kind = model.config.problem_type
    if kind == "regression":
        raise OptionError(f"--scorer classifier:{name}", expected="a classifier", found=kind)
    independent = kind == "multi_label_classification" or len(labels) == 1
    model.to(device)

    def predict(texts: list[str]) -> NDArray[np.float64]:
        shares = _logits(model, tokenizer, texts)
        shares = shares.sigmoid() if independent else shares.softmax(-1)
        return cast(NDArray[np.float64], shares[:, index].numpy())

    return Scorer(
        title=f"{PurePosixPath(found.repo_id or name).name}, {labels[index]}",
        paper=f"https://huggingface.co/{found.repo_id}" if found.repo_id else "",
        origin=ScorerOrigin(**asdict(found), label=labels[index]),
        predict=predict,
    )


@torch.inference_mode()
def _logits(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """(N, labels) float64 on the CPU. Long texts are cut.

    The tokenizer adds the special tokens of the classifier's training. A tokenizer without a
    padding token gets its texts one by one.
    """
    positions: int = getattr(model.config, "max_position_embeddings", None) or 512
    # a tokenizer without a limit claims a huge one; RoBERTa counts its positions from 2
    known: int = tokenizer.model_max_length
    longest = known if known <= positions else positions - 2
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.empty(len(texts), model.config.num_labels, dtype=torch.float64)
    size = 1 if tokenizer.pad_token is None else _BATCH
    for start in progress.each(range(0, len(order), size), "classifying", "batch"):
        rows = order[start : start + size]
        coded = tokenizer(
            [texts[i] for i in rows],
            padding=size > 1,
            padding_side="right",
            truncation=True,
            max_length=longest,
            return_attention_mask=True,
            return_tensors="pt",
        )
        found[rows] = model(**coded.to(model.device)).logits.double().cpu()
    return found


def find_label(labels: Sequence[str], asked: str) -> int:
    """The place of the toxic label.

    It is the one that is ``asked`` for, in any case of letters; or else the only label, or one with
    a usual name.

    Raises:
        OptionError: there is none of that name.
    """
    names = [name.lower() for name in labels]
    wanted = (asked.lower(),) if asked else _TOXIC if len(names) == 2 else _TOXIC[:-1]
    for name in wanted:
        if name in names:
            return names.index(name)
    if len(names) == 1 and not asked:
        return 0
    raise OptionError(
        "--scorer classifier: the toxic label is not plain",
        expected=f"#LABEL with one of {', '.join(labels)}",
        found=asked or "none",
    )


def _locate(name: str) -> tuple[Path, Origin]:
    folder = Path(name)
    if folder.is_dir():
        if kept := snapshot_of(folder):
            return folder, Origin(repo_id=kept.repo_id, commit=kept.revision)
        return folder, Origin(name=readable(folder.resolve().name))
    repo = hub.resolve("model", name)
    top = [file for file in repo.sizes if "/" not in file]
    weights = [file for file in top if file.endswith(".safetensors")]
    weights = weights or [file for file in top if file.startswith("pytorch_model")]
    small = [file for file in top if PurePosixPath(file).suffix in (".json", ".model", ".txt")]
    return (
        repo.download({*weights, *small}, first=True),
        Origin(repo_id=repo.repo_id, commit=repo.commit),
    )


def _load(folder: Path, name: str) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    kind = "AutoModelForSequenceClassification"
    try:
        loaded = from_files(folder, kind, Loading(), "cpu", torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a third party's loader may raise anything on untrusted files
        raise SourceError(
            f"transformers cannot load the classifier {name}",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        ) from error
    model, info = cast(tuple[Any, dict[str, Any]], loaded)
    if missing := sorted(info["missing_keys"]):
        raise SourceError(
            f"{name} is not a sequence classifier",
            found=f"no {missing[0]}, which transformers would fill with random numbers",
        )
    return model.eval(), tokenizer
