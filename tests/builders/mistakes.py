"""Mistakes that people make on the command line, and what they are told.

Nothing here imports torch: a test looks whether the program has done so.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4}
OTHER_MODELS: dict[str, tuple[dict[str, object], str]] = {
    "bert": ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "an encoder, which"),
    "distilbert": ({"model_type": "distilbert"}, "an encoder, which does not"),
    "t5": ({"model_type": "t5"}, "an encoder-decoder, of which only the decoder makes text"),
    "clip": ({"model_type": "clip"}, "a model of images, which does not continue text"),
    "decider": ({"model_type": "decision_transformer"}, "no language model that transformers"),
    "bart": ({"model_type": "bart", "is_encoder_decoder": True}, "an encoder-decoder"),
    "mamba": ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
              "a state space model, which has no feed-forward network to edit"),
    "reward": ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
               "a classifier or reward model, which gives scores and no text"),
    "embedding": ({"model_type": "qwen3", "architectures": ["Qwen3Model"]},
                  "a model without a head that makes text, as for embeddings"),
    "vit": ({"model_type": "vit", "architectures": ["ViTForImageClassification"]},
            "a model of images, which does not continue text"),
    "wav2vec2": ({"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"]},
                 "a model of speech or sound, which does not continue text"),
    "whisper": ({"model_type": "whisper", "is_encoder_decoder": True,
                 "architectures": ["WhisperForConditionalGeneration"]},
                "a model of speech or sound, which does not continue text"),
    "draft": ({"model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]},
              "a draft or assistant model, which only proposes tokens"),
    "nonesuch": ({"model_type": "nonesuch"}, "found 'nonesuch'; upgrade transformers, or check"),
    "typeless": ({}, "config.json: model_type: expected the name of a model"),
}  # fmt: skip
"""Name -> a config of what cannot be edited, and what is said of it."""


@dataclass(frozen=True)
class Mistake:
    """A command line that is wrong.

    Attributes:
        args: of ``gloss``; ``{}`` stands for the folder of ``make_places``.
        code: that it must exit with.
        says: each of them stands on standard error.
        variables: of the environment.
        without: modules that are not installed.
        lines: of errors, that are ours.
    """

    args: str
    code: int
    says: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    lines: int = 1

    def typed(self, folder: Path) -> list[str]:
        """The arguments in a folder."""
        return [part.replace("{}", str(folder)) for part in self.args.split()]


def convert(more: str, code: int, *says: str, **fields: object) -> Mistake:
    """A conversion of a good source into a good place, but for what is added."""
    return Mistake(f"convert {{}}/model {{}}/out {more}", code, says, **fields)  # type: ignore[arg-type]


def source(name: str, code: int, *says: str) -> Mistake:
    """A conversion of a bad source."""
    return Mistake(f"convert {name} {{}}/out", code, says)


MISTAKES = {
    # what click finds
    "unknown option": convert("--forse", 2, "No such option '--forse'", "Did you mean", "--force",
                              lines=0),
    "unknown command": Mistake("conver {}/model {}/out", 2, ("Did you mean 'convert'",), lines=0),
    "no destination": Mistake("convert {}/model", 2, ("Missing argument 'SOURCE'",), lines=0),
    "a whole number": convert("--batch-size many", 2, "'--batch-size': 'many' is not a valid int"),
    "a choice": convert("--rounding nearst", 2, "is not one of", "did you mean nearest?"),
    "a method's option": convert("--rank 2", 2, "'--rank': it is an option of the method, give "
                                 "-o rank=2.", lines=0),
    "with underscores": convert("--protect_own=2", 2, "give -o protect_own=2.", lines=0),
    "with dashes": convert("--edit-layers 2-3", 2, "give -o edit_layers=2-3.", lines=0),
    "of another method": convert("--learning-rate 1", 2, "give -o learning_rate=1 with --method "
                                 "dinm.", lines=0),
    # names and options of methods
    "a method": convert("--method magic", 2, "--method: expected destein or", "found magic"),
    "a misspelt method": convert("--method glos", 2, "did you mean gloss?"),
    "one of several methods": convert("--method gloss+destien", 2, "did you mean destein?"),
    "the same method twice": convert("--method gloss+gloss", 2, "expected different methods"),
    "a key": convert("-o rnk=2", 2, "-o rnk: method gloss", "did you mean rank?"),
    "a key of another": convert("-o alpha=2", 2, "it is an option of destein and gloss-paper"),
    "no value": convert("-o rank", 2, "-o: expected KEY=VALUE, found rank"),
    "no number": convert("-o rank=two", 2, "-o rank: expected a whole number, found two"),
    "too small": convert("-o rank=0", 2, "-o rank: expected at least 1, found 0"),
    "layers": convert("-o layers=0-9", 2, "-o layers: expected layers from 0 to 3, found 0-9"),
    "factors": convert("-o factors=2", 2, "-o factors: expected a number from 0 to 1"),
    "a choice of a method": convert("-o bias=projct", 2, "did you mean project?"),
    "a ranking": convert("--method gloss-paper -o ranking=casual", 2, "did you mean causal?"),
    "an output": convert("--output adaptr", 2, "--output: expected", "did you mean adapter?"),
    "a gate": convert("--max-leakag 0.1", 2, "Did you mean '--max-leakage'", lines=0),
    "a variable": convert("", 2, "the environment variable GLOSS_BATCH_SIZE: 'many'",
                          variables={"GLOSS_BATCH_SIZE": "many"}),
    "a gate's variable": convert("", 2, "GLOSS_MAX_LEAKAG is not the variable of any option; did "
                                 "you mean GLOSS_MAX_LEAKAGE?",
                                 variables={"GLOSS_MAX_LEAKAG": "0.1"}),
    "bounds": convert("--guard-draws 0", 2, "--guard-draws: expected at least 1, found 0"),
    "a device": convert("--device tpu", 2, "--device: expected auto, map, cpu, cuda or cuda:n"),
    "no effect": convert("--system profs", 2, "--system has no effect without --evaluate"),
    "no effect with an adapter": convert("--output adapter --workers 2", 2, "--workers has no "
                                         "effect with --output adapter"),
    "no measurement": convert("--max-evaluated-perplexity-ratio 2", 2, "has no measurement"),
    "a repo": convert("--base-model no:repo", 2, "--base-model: expected a repo id"),
    "a repo to publish": convert("--push-to-hub no:repo", 2, "--push-to-hub: expected a repo id"),
    "a local source": convert("--no-keep-source", 2, "expected a source on the Hub"),
    # files
    "no pairs": convert("--pairs {}/none.tsv", 5, "pairs file", "none.tsv does not exist"),
    "columns": convert("--pairs {}/columns.tsv", 5, "a first line with the columns toxic and"),
    "fields": convert("--pairs {}/fields.jsonl", 5, "name the two fields of each row 'toxic'"),
    "ending": convert("--pairs {}/pairs.txt", 5, "expected .jsonl, .tsv, .csv, found .txt"),
    "few pairs": convert("--num-pairs 3", 2, "--num-pairs: expected at least 16, found 3"),
    "prose": convert("--neutral {}/none.txt", 5, "neutral text", "No such file"),
    "words": convert("--word-list {}/none.txt", 5, "word list", "No such file"),
    "prompts": convert("--prompts {}/none.txt", 5, "prompts file", "does not exist"),
    "a line of prompts": convert("--prompts {}/fields.jsonl", 5, "fields.jsonl, line 1"),
    "instances": convert("--method dinm --instances {}/none.json", 5, "instances file"),
    "unused prompts": convert("--self-prompts {}/pairs.txt", 2, "--self-prompts: expected --pairs"),
    "calibration": convert("--calibration {}/model", 2, "--method fusion -o form=paper"),
    "activations": convert("--activations {}/none", 2, "'--activations': File", "does not exist"),
    "no recipe": convert("--recipe {}/none.toml", 2, "'--recipe': File", "does not exist"),
    "a recipe": convert("--recipe {}/bad.toml", 2, "unknown key num_pair; did you mean num_pairs?",
                        "bad.toml: batch_size: expected a whole number", lines=2),
    "no manifest": convert("--like {}/model", 2, "--like gloss_manifest.json cannot be read"),
    "a key to sign with": convert("--sign {}/none.pem", 2, "--sign none.pem cannot be read"),
    "a text to measure": convert("--evaluate --text {}/none.txt", 2, "'--text': File"),
    # packages
    "matplotlib": convert("--plots {}/pictures", 2, "--plots needs the package matplotlib; pip "
                          "install 'gloss-convert[plot]'", without=("matplotlib",)),
    "model-signing": convert("--sign {}/pairs.txt", 2, "--sign needs the package model-signing; "
                             "pip install 'gloss-convert[sign]'", without=("model_signing",)),
    "detoxify": convert("--evaluate --scorer detoxify", 2, "--scorer detoxify needs the package "
                        "detoxify; pip install 'gloss-convert[detoxify]'", without=("detoxify",)),
    "scorer": convert("--evaluate --scorer profanty", 2, "did you mean profanity?"),
    "lm-eval": convert("--evaluate --ability mmlu", 2, "--ability needs the package lm-eval",
                       without=("lm_eval",)),
    "accelerate": convert("--device map", 2, "--device map needs the package accelerate",
                          without=("accelerate",)),
    "gguf": Mistake("convert {}/model.gguf {}/out", 2, ("needs the package gguf; pip install "
                    "'gloss-convert[gguf]'",), without=("gguf",)),
    # sources
    "no source": source("{}/none", 3, "none does not exist; check the path"),
    "a config alone": Mistake("convert {}/empty {}/out", 4, ("empty has no tokenizer",
                              "config.json is empty"), lines=2),
    "a file": source("{}/pairs.txt", 3, "pairs.txt is a file", "give the folder that it is in"),
    "no tokenizer": source("{}/mute", 4, "mute has no tokenizer"),
    "no JSON": source("{}/broken", 4, "config.json cannot be read as JSON"),
    "no weights": source("{}/weightless", 4, "weightless has no weights that can be read"),
    "a subfolder": convert("--subfolder none", 3, "has no folder none; check --subfolder"),
    "a diffusion pipeline": source("{}/diffusion", 4, "a diffusion pipeline, as its model_index"),
    "sentence embeddings": source("{}/sentences", 4, "a model of sentence embeddings, as its"),
    "an adapter": source("{}/lora", 4, "lora is an adapter, not a model; give the model that it"),
    **{f"a {name}": source(f"{{}}/{name}", 4, says) for name, (_, says) in OTHER_MODELS.items()},
    # destinations
    "a full folder": Mistake("convert {}/model {}", 7, ("contains the input",)),
    "inside the source": Mistake("convert {}/model {}/model/out", 7, ("lies inside it",)),
    "a file in the way": Mistake("convert {}/model {}/pairs.txt", 7, ("pairs.txt is a file",)),
    # other commands
    "plan": Mistake("plan {}/mute -o rnk=2", 4, ("no tokenizer", "did you mean rank?"), lines=2),
    "calibrate": Mistake("calibrate {}/bert {}/out", 4, ("an encoder",)),
    "a system": Mistake("evaluate {}/model --system glos", 2, ("did you mean gloss?",)),
    "costs": Mistake("evaluate {}/model --system gloss --costs 1,x", 2, ("--costs",)),
    "results": Mistake("evaluate {}/model --results {}/none/x.json", 7, ("--results",)),
    # what has been converted
    "no manifest to verify": Mistake("verify {}/model", 8, ("model has no gloss_manifest.json",)),
    "a key and a source": Mistake("verify {}/model --key {}/none.pem --source {}/none", 2, (
                                  "--key none.pem cannot be read", "none does not exist"), lines=2),
    "nothing to push": Mistake("push {}/model no:repo", 8, ("model is not published, for it is not "
                               "whole", "REPO: expected a repo id"), lines=2),
    "nothing to replay": Mistake("replay {}/model {}/out --pairs builtin", 2, (
                                 "--pairs has no effect without --refit",
                                 "there is no manifest gloss_manifest.json"), lines=2),
    "nothing to compare": Mistake("diff {}/none {}/nowhere", 3, ("A: ", "B: ", "/nowhere does not "
                                  "exist; check the path"), lines=2),
    "different kinds": Mistake("diff {}/model/config.json {}/model", 2, (
                               "a manifest and a checkpoint cannot be compared",)),
    "models and a page": Mistake("compare {}/none {}/out --output x.pdf --scorer magc", 2, (
                                 "--output x.pdf: expected .html", "none does not exist",
                                 "EDITED: ", "--scorer: expected"), lines=4),
    # searches
    "optuna": convert("--search 2", 2, "--search needs the package optuna; pip install "
                      "'gloss-convert[search]'", without=("optuna",)),
    "no trials": convert("--search 0", 2, "--search: expected at least 1, found 0"),
    "no search": convert("--search-prompts none", 2, "--search-prompts has no effect without "
                         "--search; add --search N"),
    "a search that is evaluated": convert(
        "--search 2 --method gloss,destein -o alpha=0.1 --evaluate", 2,
        "--evaluate: expected a single --method"),
    "prompts of a search": Mistake("search {}/model --search-prompts {}/none.txt", 5,
                                   ("prompts file",)),
    "a method of a search": Mistake("search {}/model --method gloss,destien", 2,
                                    ("found destien", "did you mean destein?")),
    "the same in a search": Mistake("search {}/model --method gloss,gloss", 2,
                                    ("expected different methods, found gloss,gloss",)),
    "an option of none": Mistake("search {}/model --method gloss,destein -o rnk=2", 2,
                                 ("did you mean rank?",)),
    "a search for defence": Mistake("search {}/model --method dinm", 2,
                                    ("found --method dinm, which is judged by refusals",)),
    "a search of one edit": Mistake("search {}/model --method gloss+destein", 2,
                                    ("expected methods by themselves, with , between them",)),
    "a search beside": Mistake("search {}/model --method fusion -o form=paper", 2,
                               ("which runs another model beside it; choose form=folded",)),
    "a streamed search": convert("--search 2 --forward streamed", 2, "a search tries many edits",
                                 "found --forward streamed; give --forward resident"),
    "results of a search": Mistake("search {}/model --results {}/none/x.json", 7, ("--results",)),
    "a search all together": Mistake(
        "search {}/mute --method dinm,gloss+destien --forward streamed --trials 0", 2,
        ("--trials: expected at least 1", "--forward streamed", "methods by themselves",
         "judged by refusals", "mute has no tokenizer", "did you mean destein?"), lines=6,
    ),
    "a method to explain": Mistake("methods destien", 2, ("did you mean destein?",)),
    # all together
    "all together": Mistake(
        "convert {}/mute {}/pairs.txt --batch-size many --guard-draws 0 --method glos "
        "--output both --pairs {}/columns.tsv --neutral {}/none.txt --device tpu "
        "--sign {}/none.pem", 2,
        ("'many' is not", "--guard-draws", "mute has no tokenizer", "did you mean gloss?",
         "--output: expected", "the columns toxic and neutral", "none.txt cannot be read",
         "--device", "--sign none.pem", "pairs.txt is a file"), lines=10,
    ),
}  # fmt: skip
"""Name -> a mistake. The exit code is that of the first thing that is wrong."""


def make_places(folder: Path) -> None:
    """Write the files that the mistakes name; of weights there is nothing but a name."""
    for name, files in _folders().items():
        for file, text in files.items():
            (folder / name).mkdir(exist_ok=True, parents=True)
            (folder / name / file).write_text(text)
    (folder / "columns.tsv").write_text("bad\tgood\na\tb\n")
    (folder / "fields.jsonl").write_text('{"a": "b"}\n' * 20)
    (folder / "pairs.txt").write_text("a\n")
    (folder / "bad.toml").write_text('num_pair = 3\nbatch_size = "x"\n')
    (folder / "model.gguf").write_text("GGUF")


def _folders() -> dict[str, dict[str, str]]:
    config, weights = json.dumps(CONFIG), {"model.safetensors": "x"}
    tokenizer = {"tokenizer.json": "{}"}
    return {
        "model": {"config.json": config, **tokenizer, **weights},
        "mute": {"config.json": config, **weights},
        "broken": {"config.json": "{", **tokenizer, **weights},
        "weightless": {"config.json": config, **tokenizer},
        "empty": {"config.json": "", **weights},
        "diffusion": {"model_index.json": "{}"},
        "sentences": {"modules.json": "[]", "config.json": config, **weights},
        "lora": {"adapter_config.json": "{}", "adapter_model.safetensors": "x"},
        **{
            name: {"config.json": json.dumps(made), **tokenizer, **weights}
            for name, (made, _) in OTHER_MODELS.items()
        },
    }
