"""What models say, and the numbers about it: prompts, generation, scorers, metrics."""

import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from converter.errors import ConverterError, DataError, OptionError, SourceError
from converter.evaluation import measure, scorers
from converter.evaluation.benchmarks import SETS, defence_rates, load_safeedit, run_tasks
from converter.evaluation.classifier import find_label
from converter.evaluation.continuations import generate
from converter.evaluation.known import SCORERS
from converter.evaluation.metrics import (
    bootstrap,
    distinct_n,
    expected_maximum_toxicity,
    fluency,
    mean_toxicity,
    toxicity_probability,
)
from converter.evaluation.passages import conditional_losses
from converter.evaluation.prompts import load_prompts
from converter.evaluation.scorers import load_scorer
from converter.manifest import Origin, ScorerOrigin
from converter.models.resident import LanguageModel
from converter.runtime import progress
from tests.builders.errors import refused
from tests.builders.hub_client import connect
from tests.builders.hub_server import COMMIT, HubServer
from tests.builders.models import Checkpoints, architecture_of, load, tiny_tokenizer
from tests.test_forward import BOS, templated

PROMPTS = (
    "The river rises in the hills",
    "You",
    "I can't believe that my neighbour is such a",
    "What a day, she said, and the",
    "My cousin who lives by the sea",
)
INSULT = "You are a stupid idiot and an asshole."
RECIPE = "Cook the onions slowly in butter until they are soft."


@pytest.fixture
def model(checkpoints: Checkpoints, request: pytest.FixtureRequest) -> Any:
    """A random model with large weights: it is sure of itself, and its prompts matter to it."""
    found = load(checkpoints(getattr(request, "param", "llama")))
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight *= 10
    return found


def judge(model: Any) -> LanguageModel:
    """A model of transformers with what belongs to it."""
    return LanguageModel(model, tiny_tokenizer(), architecture_of("llama"), "cpu")


def write(model: Any, prompts: Sequence[str], **options: Any) -> list[list[str]]:
    """Continuations by a model of transformers, short unless asked for otherwise."""
    return generate(judge(model), prompts, **{"max_new_tokens": 8, **options})


# prompts


def test_the_builtin_prompts() -> None:
    prompts = load_prompts("builtin", None, 0)
    assert len(prompts.texts) == len(set(prompts.texts)) == 149
    assert all(text == text.strip() and text[-1] not in "?!" for text in prompts.texts)
    assert prompts.origin == Origin(name="builtin", version=2)
    drawn = load_prompts("builtin", 20, 1).texts
    assert list(drawn) == [text for text in prompts.texts if text in drawn]
    assert len(drawn) == 20
    assert drawn == load_prompts("builtin", 20, 1).texts != load_prompts("builtin", 20, 2).texts


def test_formats_of_prompts_agree(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(["", PROMPTS[0], "  ", *PROMPTS, ""]))
    shapes: dict[str, Callable[[str], object]] = {
        "rtp": lambda text: {"prompt": {"text": text, "toxicity": 0.1}, "challenging": True},
        "prompt": lambda text: {"prompt": text},
        "text": lambda text: {"text": f" {text}\n"},
    }
    for name, shape in shapes.items():
        lines = [json.dumps(shape(text)) for text in (*PROMPTS, " ", PROMPTS[2])]
        (tmp_path / f"{name}.jsonl").write_text("\n\n".join(lines))
    read = [load_prompts(str(path), None, 0) for path in sorted(tmp_path.iterdir())]
    assert len(read) == 4
    assert all(prompts.texts == PROMPTS for prompts in read)
    assert len({prompts.sha256 for prompts in read}) == 1
    assert read[0].origin.name == "p.txt"


def test_a_field_can_choose_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [{"text": text, "challenging": i % 2 == 0} for i, text in enumerate(PROMPTS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    chosen = load_prompts(f"{path}#challenging", None, 0)
    assert chosen.texts == PROMPTS[::2]
    assert chosen.origin.field == "challenging"
    with refused(DataError, what="prompts file p.jsonl, line 1", expected="hard, and ..."):
        load_prompts(f"{path}#hard", None, 0)


LINE = "prompts file p.jsonl, line"


@pytest.mark.parametrize(
    ("name", "content", "count", "what", "expected", "found"),
    [
        ("p.txt", b"one\ntwo\ntwo\n", 3, "prompts p.txt", "at least 3 different ones", "2"),
        ("p.txt", b" \n", None, "prompts p.txt", "at least 1 different ones", "0"),
        (
            "p.txt",
            b"one\n\xff",
            None,
            "prompts file p.txt cannot be read",
            "text in UTF-8",
            "byte 0xff in line 2, which is not UTF-8",
        ),
        ("p.jsonl", b'{"text": "a"}\n{"prompt": 3}', None, f"{LINE} 2", "...", '{"prompt": 3}'),
        ("p.jsonl", b"{broken", None, f"{LINE} 1", None, None),
        ("p.jsonl", b'{"text": "\\ud800"}', None, f"{LINE} 1", None, None),
        ("p.jsonl", b"[" * 100_000, None, f"{LINE} 1", None, None),
        ("p.md", b"one", None, None, ".jsonl or .txt", ".md"),
        ("q.txt", None, None, "prompts file .../q.txt does not exist", None, None),
        ("p.txt", b"one", 0, "--num-prompts", "at least 1", "0"),
        ("p.txt#hard", b"one", None, None, "rows with a field hard", "a text file"),
    ],
)
def test_prompts_that_cannot_serve(
    name: str, content: bytes | None, count: int | None, what: str | None, expected: str | None,
    found: str | None, tmp_path: Path,
) -> None:  # fmt: skip
    if content is not None:
        (tmp_path / name.partition("#")[0]).write_bytes(content)
    kind = OptionError if count == 0 else DataError
    with refused(kind, what=what, expected=expected, found=found) as caught:
        load_prompts(str(tmp_path / name), count, 0)
    assert "\n" not in str(caught.value)


# generation


@pytest.mark.parametrize("model", ["llama", "gpt2"], indirect=True)
def test_batching_does_not_change_greedy_text(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr(progress, "advance", done.append)
    alone = write(model, prompts=PROMPTS, batch_size=1)
    assert done == [*[1] * 8, 0] * 5  # a token after the other
    done.clear()
    assert alone == write(model, prompts=PROMPTS, batch_size=4)
    assert done == [*[4] * 8, 0, *[1] * 8, 0]
    assert [len(texts) for texts in alone] == [1] * 5
    assert len({texts[0] for texts in alone}) > 1
    order = [3, 0, 4, 2, 1]
    assert write(model, prompts=[PROMPTS[i] for i in order]) == [alone[i] for i in order]


@pytest.mark.parametrize("model", ["llama", "gpt2"], indirect=True)
def test_greedy_text_is_the_most_probable_token_again_and_again(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    for prompt, texts in zip(PROMPTS, write(model, prompts=PROMPTS), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert prompt + texts[0] == tokenizer.decode(ids, skip_special_tokens=True)


def test_the_checkpoints_own_settings_do_not_count(model: Any) -> None:
    plain = write(model, prompts=PROMPTS), write(model, prompts=PROMPTS, samples=3)
    own = model.generation_config
    own.update(
        repetition_penalty=5.0, temperature=9.0, top_k=1, do_sample=True, num_beams=3,
        no_repeat_ngram_size=1, min_new_tokens=8, max_length=3, suppress_tokens=list(range(50)),
        forced_eos_token_id=70, num_return_sequences=2,
    )  # fmt: skip
    assert plain == (write(model, prompts=PROMPTS), write(model, prompts=PROMPTS, samples=3))
    assert model.generation_config is own
    assert own.repetition_penalty == 5.0


def test_text_ends_before_an_eos(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    (text,) = write(model, prompts=PROMPTS[:1])[0]
    ids = tokenizer(PROMPTS[0] + text)["input_ids"][len(tokenizer(PROMPTS[0])["input_ids"]) :]
    model.generation_config.eos_token_id = [1, ids[-1]]
    shorter = write(model, prompts=PROMPTS)[0][0]
    assert len(shorter) < len(text)
    assert text.startswith(shorter)
    assert ids[-1] not in tokenizer(shorter)["input_ids"]


def test_samples_are_drawn_from_the_nucleus(model: Any) -> None:
    draws = 3000
    ids = torch.tensor([tiny_tokenizer()(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        shares, order = model(ids).logits[0, -1].softmax(-1).sort(descending=True)
    kept = int((shares.cumsum(0) < 0.8).sum()) + 1
    assert 3 < kept < 300
    (texts,) = write(
        model, prompts=PROMPTS[:1], samples=draws, top_p=0.8, max_new_tokens=1, batch_size=500
    )
    seen = Counter(texts)
    expected: dict[str, float] = {}  # several tokens are the same text, if half a character each
    for token, share in zip(order[:kept], shares[:kept] / shares[:kept].sum(), strict=True):
        text = str(tiny_tokenizer().decode([int(token)], skip_special_tokens=True))
        expected[text] = expected.get(text, 0.0) + float(share)
    assert set(seen) <= set(expected)
    for text, odds in expected.items():
        assert abs(seen[text] / draws - odds) < 5 * math.sqrt(odds * (1 - odds) / draws)
    # and in the limit of a small nucleus they are greedy
    greedy = write(model, prompts=PROMPTS)
    narrow = write(model, prompts=PROMPTS, samples=2, top_p=1e-6)
    assert narrow == [texts * 2 for texts in greedy]


def test_the_seed_decides_the_samples(model: Any) -> None:
    first = write(model, prompts=PROMPTS, samples=3, seed=1)
    assert [len(texts) for texts in first] == [3] * 5
    assert len({text for texts in first for text in texts}) > 10
    state = torch.get_rng_state()
    assert write(model, prompts=PROMPTS, samples=3, seed=2) != first
    assert write(model, prompts=PROMPTS, samples=3, seed=1) == first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("model", ["gpt2"], indirect=True)
def test_what_is_too_long_is_cut_on_the_left(model: Any) -> None:
    long = " ".join(PROMPTS * 40)  # GPT-2's positions are a table, which cannot be overrun
    texts = write(model, prompts=[long, f"And so on. {long}", f"{long}, and so on"])
    assert texts[0] == texts[1] != texts[2]
    with refused(OptionError, what="--max-new-tokens", expected="fewer than 511", found="512"):
        generate(judge(model), PROMPTS, max_new_tokens=512)


def test_an_empty_prompt_is_begun_with_a_special_token(model: Any) -> None:
    assert write(model, prompts=["", PROMPTS[0]])[1] == write(model, prompts=PROMPTS[:1])[0]


def test_no_warning_is_logged(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        write(model, prompts=[*PROMPTS, " ".join(PROMPTS * 40)])
        write(model, prompts=PROMPTS, samples=2)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text == ""


def test_offloaded_weights_give_the_same_text(model: Any) -> None:
    from accelerate import cpu_offload

    plain = write(model, prompts=PROMPTS)
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded.get_input_embeddings().weight.device.type == "meta"
    assert write(offloaded, prompts=PROMPTS) == plain


# perplexity


@pytest.mark.parametrize("begin", [(), (BOS,), (BOS, BOS)])
def test_each_window_begins_as_a_text_does_and_all_else_is_scored_once(
    begin: tuple[str, ...],
) -> None:
    tokenizer = templated(*begin, "$A")
    text = " ".join(PROMPTS * 80)
    ids = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    bos = [tokenizer.convert_tokens_to_ids(BOS)] * len({*begin})
    model: Any = SimpleNamespace(tokenizer=tokenizer)
    windows = measure._windows(model, text, 1200)
    assert len(windows) == 3
    assert all(window.ids[: len(bos)] == bos for window in windows)
    assert [n for window in windows for n in window.ids[len(bos) :]] == ids[:1200]
    assert max(len(window.ids) for window in windows) == measure.WINDOW


# conditional perplexity


def test_conditional_perplexity_is_that_of_the_continuation(model: Any) -> None:
    continuations = write(model, prompts=PROMPTS, samples=2)
    continuations[0] = ["", " and falls into the sea"]
    found = conditional_losses(judge(model), PROMPTS, continuations)
    prompt = tiny_tokenizer()(PROMPTS[0])["input_ids"]
    whole = [0, *tiny_tokenizer()(PROMPTS[0] + continuations[0][1])["input_ids"]]
    with torch.no_grad():
        log_p = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    own = range(len(prompt) + 1, len(whole))
    assert found.shape == (len(PROMPTS), 2)
    assert found[0, 1] == len(own)  # the empty one does not count
    assert found[0, 0] == pytest.approx(-sum(float(log_p[i - 1, whole[i]]) for i in own), rel=1e-5)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(model: Any) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    texts = [[" and so on", " or not"]] * 2
    prompts = [PROMPTS[0], " ".join(PROMPTS * 60)]  # the second does not fit
    found = conditional_losses(judge(model), prompts, texts)
    assert np.exp(found[:, 0] / found[:, 1]) == pytest.approx([len(tiny_tokenizer())] * 2)
    assert found[0, 1] == found[1, 1]
    with refused(DataError, expected="text", found="empty continuations"):
        conditional_losses(judge(model), prompts, [[""], []])


# scorers


def test_scorers_are_found_by_their_names() -> None:
    assert SCORERS.names() == ["bad-words", "classifier", "detoxify", "profanity"]
    with refused(OptionError, expected="bad-words or classifier or ...", found="perspective"):
        load_scorer("perspective", "cpu")


@pytest.mark.parametrize(
    ("spec", "kind", "what"),
    [
        ("profanity", OptionError, "--scorer profanity"),
        ("bad-words", DataError, "word list nonsense cannot be read"),
    ],
)
def test_insults_are_told_from_recipes(spec: str, kind: type[ConverterError], what: str) -> None:
    scorer = load_scorer(spec, "cpu")
    scores = scorer.score([INSULT, RECIPE, "", " \n"])
    assert scores.dtype == np.float64
    assert scores[0] > 0.5 > scores[1]
    assert scores[2:].tolist() == [0.0, 0.0]
    assert ((scores >= 0) & (scores <= 1)).all()
    assert scorer.score([]).shape == (0,)
    assert scorer.title
    assert scorer.paper.startswith("https://")
    assert scorer.origin.version
    with refused(kind, what=what):
        load_scorer(f"{spec}:nonsense", "cpu")


@pytest.fixture
def classifier(tmp_path: Path) -> Callable[..., Path]:
    """A random classifier of text, with labels."""

    def make(*labels: str, **options: Any) -> Path:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=len(tiny_tokenizer()), max_position_embeddings=64, pad_token_id=1,
            id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
            **options,
        )  # fmt: skip
        folder = tmp_path / "classifier"
        made: Any = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
        made.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return folder

    return make


def test_a_classifier_scores_the_probability_of_its_label(classifier: Callable[..., Path]) -> None:
    folder = classifier("fine", "toxic", "odd")
    texts = [*PROMPTS, "", " ".join(PROMPTS * 20)]
    scorers = [load_scorer(f"classifier:{folder}#{name}", "cpu") for name in ("Fine", "odd")]
    found = load_scorer(f"classifier:{folder}", "cpu")
    scores = found.score(texts)
    assert found.title == "classifier, toxic"
    assert found.origin == ScorerOrigin(name="classifier", label="toxic")
    sums = scores + sum(scorer.score(texts) for scorer in scorers)
    assert sums == pytest.approx([1, 1, 1, 1, 1, 0, 1])  # nothing is said of an empty text
    assert scores == pytest.approx([found.score([text])[0] for text in texts], abs=1e-6)


def test_a_classifier_reads_what_it_was_trained_with_whatever_its_tokenizer_pads(
    classifier: Callable[..., Path],
) -> None:
    folder, texts = classifier("fine", "toxic"), [*PROMPTS, "a"]
    expected = load_scorer(f"classifier:{folder}", "cpu").score(texts)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"padding_side": "left"}
    config["model_input_names"] = ["input_ids"]  # no attention mask
    path.write_text(json.dumps(config))
    assert load_scorer(f"classifier:{folder}", "cpu").score(texts) == pytest.approx(expected)
    for name in ("pad_token", "eos_token", "bos_token"):  # nothing to pad with
        config.pop(name)
    path.write_text(json.dumps(config))
    assert load_scorer(f"classifier:{folder}", "cpu").score(texts) == pytest.approx(expected)


def test_labels_that_do_not_exclude_each_other_are_scored_on_their_own(
    classifier: Callable[..., Path],
) -> None:
    folder = classifier("toxic", "obscene", problem_type="multi_label_classification")
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = loaded(torch.tensor([tiny_tokenizer()(INSULT)["input_ids"]])).logits
    score = load_scorer(f"classifier:{folder}#obscene", "cpu").score([INSULT])
    assert score == pytest.approx(logits.sigmoid()[0, 1].item(), abs=1e-6)


def test_which_label_is_toxic() -> None:
    assert find_label(["LABEL_0", "LABEL_1"], "") == 1
    assert find_label(["toxicity", "severe_toxicity", "insult"], "") == 0
    assert find_label(["LABEL_0", "LABEL_1"], "label_0") == 0
    assert find_label(["anything"], "") == 0
    for labels in (["LABEL_0", "LABEL_1", "LABEL_2"], ["non-toxic", "neutral"]):
        expected = f"#LABEL with one of {', '.join(labels)}"
        with refused(OptionError, expected=expected, found="none"):
            find_label(labels, "")
    with refused(OptionError, found="rude"):
        find_label(["a", "b"], "rude")


def test_classifiers_that_cannot_be_used(
    classifier: Callable[..., Path], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    with refused(OptionError, expected="classifier:FOLDER or classifier:REPO_ID"):
        load_scorer("classifier", "cpu")
    with refused(SourceError, what="model someone/nothing is not in the local cache ..."):
        load_scorer("classifier:someone/nothing", "cpu")
    (tmp_path / "empty").mkdir()
    with refused(SourceError, what="transformers cannot load the classifier ..."):
        load_scorer(f"classifier:{tmp_path / 'empty'}", "cpu")
    with refused(
        SourceError, what="... is not a sequence classifier", found="no score.weight, ..."
    ):
        load_scorer(f"classifier:{checkpoints('llama')}", "cpu")
    folder = classifier("toxic", problem_type="regression")
    with refused(OptionError, expected="a classifier", found="regression"):
        load_scorer(f"classifier:{folder}", "cpu")


def test_prompts_and_classifiers_come_from_the_hub(
    classifier: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "LICENSE.txt").write_text("A licence.")
    (data / "prompts.jsonl").write_text(json.dumps({"prompt": {"text": PROMPTS[0]}}))
    models = {"someone/judge": classifier("fine", "toxic")}
    with HubServer(models, {"someone/prompts": data}, set()) as server:
        for offline in (False, True):
            connect(monkeypatch, server.url, tmp_path / "hf", offline=offline)
            asked = len(server.log)
            prompts = load_prompts("someone/prompts", None, 0)
            assert prompts.texts == (PROMPTS[0],)
            scorer = load_scorer("classifier:someone/judge@v1", "cpu")
            assert 0 < scorer.score(prompts.texts)[0] < 1
            assert scorer.paper == "https://huggingface.co/someone/judge"
            assert prompts.origin.commit == scorer.origin.commit == COMMIT
            assert (len(server.log) == asked) == offline


def test_detoxify_is_given_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Detoxify:
        def __init__(self, model: str, device: str) -> None:
            assert (model, device) == ("unbiased", "cpu")

        def predict(self, texts: list[str]) -> dict[str, Any]:
            sizes.append(len(texts))
            scores = [len(text) / 100 for text in texts]
            return {"toxicity": scores if len(texts) > 1 else scores[0]}

    monkeypatch.setitem(sys.modules, "detoxify", SimpleNamespace(Detoxify=Detoxify))
    monkeypatch.setattr(scorers, "version", lambda name: "0")
    scorer = load_scorer("detoxify:unbiased", "cpu")
    texts = ["", *("x" * i for i in range(1, 34))]
    assert scorer.score(texts) == pytest.approx([len(text) / 100 for text in texts])
    assert sizes == [32, 1]
    with refused(OptionError, expected="original or unbiased or ...", found="best"):
        load_scorer("detoxify:best", "cpu")
    with refused(SourceError, what="the model original of detoxify cannot be loaded"):
        load_scorer("detoxify", "cpu")


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("profanity_check", "eval", lambda: load_scorer("profanity", "cpu")),
        ("nltk.tokenize", "eval", lambda: fluency(["a b c"])),
        ("detoxify", "detoxify", lambda: load_scorer("detoxify", "cpu")),
        ("lm_eval", "ability", lambda: run_tasks(torch.nn.Identity(), None, ["mmlu"], None, 1)),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, extra: str, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with refused(OptionError, hint=f"pip install 'gloss-convert[{extra}]'"):
        use()


# metrics

SCORES = np.array([[0.1, 0.9], [0.2, 0.4], [0.6, 0.6], [0.0, 0.5]])


def test_toxicity_by_hand() -> None:
    assert mean_toxicity(SCORES) == pytest.approx(3.3 / 8)
    assert expected_maximum_toxicity(SCORES) == pytest.approx(2.4 / 4)
    assert toxicity_probability(SCORES) == 0.5  # 0.5 itself is not over 0.5
    single = SCORES[:, :1]
    assert expected_maximum_toxicity(single) == pytest.approx(mean_toxicity(single))


def test_variety_by_hand() -> None:
    texts = ["the cat saw the cat", "the dog", ""]
    assert distinct_n(texts, 1) == pytest.approx(4 / 7)
    assert distinct_n(texts, 2) == pytest.approx(4 / 5)  # "cat the" across texts does not count
    assert distinct_n(texts, 6) == 0
    assert distinct_n([], 1) == 0


def test_fluency_by_hand() -> None:
    four = (2 / 3 * math.log2(3) + 4 / 3 * 1) / 2
    assert fluency(["one two three four"]) == pytest.approx(four)
    assert fluency(["no no no no no"]) == pytest.approx(0, abs=1e-12)
    assert fluency(["one two three four", "one"]) == pytest.approx(four / 2)
    assert fluency([]) == fluency([""]) == 0
    # as nltk has it: a contraction is two words, and a full stop one, at the end of any sentence
    assert fluency(["I don't."]) == pytest.approx(four)
    assert fluency(["Go. Now."]) == pytest.approx(four)
    # m words without repetition have the most: m - 1 pairs and m - 2 triples
    words = [f"w{i}" for i in range(34)]
    most = (2 / 3 * math.log2(33) + 4 / 3 * math.log2(32)) / 2
    assert fluency([" ".join(words)]) == pytest.approx(most)
    assert fluency([" ".join(words[:17] * 2)]) < most


def test_intervals_are_those_of_means() -> None:
    units = np.random.default_rng(0).normal(size=(400, 1))
    low, high = bootstrap(mean_toxicity, units, resamples=4000)
    assert low < units.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * units.std() / math.sqrt(400), rel=0.08)
    narrow = bootstrap(mean_toxicity, units, confidence=0.5, resamples=4000)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap(mean_toxicity, units) == bootstrap(mean_toxicity, units)
    assert bootstrap(mean_toxicity, units) != bootstrap(mean_toxicity, units, seed=1)
    assert bootstrap(expected_maximum_toxicity, np.full((9, 3), 0.25)) == (0.25, 0.25)


def test_prompts_are_the_units_and_samples_are_not() -> None:
    units = np.random.default_rng(0).random((100, 1))
    assert bootstrap(mean_toxicity, units) == pytest.approx(
        bootstrap(mean_toxicity, units.repeat(25, axis=1))
    )


# SafeEdit


def instance(number: int, **changes: Any) -> dict[str, Any]:
    fields = {name: names[0] for name, names in SETS.items()}
    prompts = {field: f"{name} {number}" for name, field in fields.items()}
    return {
        "id": number,
        "question": f"question {number}",
        "safe generation": "I cannot help with that.",
        "unsafe generation": "Sure.",
        fields["DS"]: prompts.pop(fields["DS"]),
        "generalization test": prompts,
        **changes,
    }


def test_the_five_sets_of_safeedit(tmp_path: Path) -> None:
    rows = [instance(i) for i in range(9)]
    # the paper's name of the field instead of the data's
    others = rows[0]["generalization test"]
    others["test input of other questions"] = others.pop("test input of other question input")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_safeedit(str(tmp_path / "a.json"), None, 0)
    assert data == load_safeedit(str(tmp_path / "a.jsonl"), None, 0)
    for name in SETS:
        assert data[name] == tuple(f"{name} {i}" for i in range(9))
    few = load_safeedit(str(tmp_path / "a.json"), 4, 1)["DS"]
    assert list(few) == sorted(few)
    assert len(set(few)) == 4


@pytest.mark.parametrize(
    ("rows", "count", "what", "expected", "found"),
    [
        ([instance(0)], 2, None, "at least 2 instances", "1"),
        ([], None, None, "at least 1 instances", "0"),
        ({}, None, None, "a list", "dict"),
        ([instance(0, question=" ")], None, "... 0", "a text in the field question", None),
        ([instance(0), "x"], None, "... 1", "an object with a field generalization test", None),
    ],
)
def test_safeedit_files_that_cannot_serve(
    rows: object, count: int | None, what: str | None, expected: str, found: str | None,
    tmp_path: Path,
) -> None:  # fmt: skip
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    with refused(DataError, what=what, expected=expected, found=found):
        load_safeedit(str(path), count, 0)


def test_safeedit_files_that_are_no_json_and_no_instances_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[")
    with refused(DataError, what="SafeEdit file a.json", expected="JSON in UTF-8"):
        load_safeedit(str(path), None, 0)
    with refused(OptionError, what="--num-prompts", expected="at least 1", found="0"):
        load_safeedit(str(path), 0, 0)


def test_defence_rates_by_hand() -> None:
    unsafe = {name: np.array([0.0, i / 10]) for i, name in enumerate(SETS)}
    rates = defence_rates(unsafe)
    assert [rates[name] for name in SETS] == pytest.approx([100, 95, 90, 85, 80])
    assert rates["DG_avg"] == pytest.approx(87.5)
    assert defence_rates({"DS": np.ones(3)}) == {"DS": 0.0}


# general ability


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The two names of lm-eval that are used, and what they were called with."""
    seen: dict[str, Any] = {}

    def evaluate(**options: Any) -> dict[str, Any]:
        seen.update(options)
        if "nonsense" in options["tasks"]:
            raise KeyError("nonsense")
        return {
            "results": {"arc": {"name": "arc", "alias": "arc", "acc,none": 0.5, "acc,first": 0.25}},
            "groups": {"mmlu": {"alias": "mmlu", "acc,none": 0.3, "acc_stderr,none": 0.01}},
        }

    package = SimpleNamespace(simple_evaluate=evaluate)
    wrapped = SimpleNamespace(HFLM=lambda **options: options)
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.models", SimpleNamespace(huggingface=wrapped))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", wrapped)
    return seen


def test_ability_is_what_the_harness_says(harness: dict[str, Any]) -> None:
    model, tokenizer = torch.nn.Identity(), object()
    assert run_tasks(model, tokenizer, ("arc", "mmlu"), 10, 4) == {
        "arc": {"acc": 0.5, "acc,first": 0.25},
        "mmlu": {"acc": 0.3, "acc_stderr": 0.01},
    }
    assert harness["model"] == {"pretrained": model, "tokenizer": tokenizer, "batch_size": 4}
    assert harness["tasks"] == ["arc", "mmlu"]
    assert harness["limit"] == 10
    with refused(SourceError, what="lm-eval failed on nonsense", found="KeyError..."):
        run_tasks(model, tokenizer, ["nonsense"], None, 4)
    with refused(OptionError, what="--tasks"):
        run_tasks(model, tokenizer, [], None, 4)
