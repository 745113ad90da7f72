"""Each consumer as a function: a checkpoint, perhaps an adapter, and prompts in; log-probs out.

    python readers.py READER PROMPTS.json RESULT.npz FOLDER [ADAPTER]

It needs numpy and the package of that reader, and nothing of this project: a consumer may have an
environment of its own.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Prompts = Sequence[Sequence[int]]
LogProbs = list[NDArray[np.float32]]
"""Of each prompt (tokens, vocabulary): of the token that follows. NaN where it is not known."""


def transformers(folder: Path, adapter: Path | None, prompts: Prompts) -> LogProbs:
    """transformers of any version in float32; peft for the adapter."""
    import torch

    model = _model(folder, adapter)
    with torch.inference_mode():
        return [_log_softmax(model(torch.tensor([ids])).logits[0]) for ids in prompts]


def ctranslate2(folder: Path, adapter: Path | None, prompts: Prompts) -> LogProbs:
    """CTranslate2, by its own converter. It knows no adapter."""
    from ctranslate2 import Generator
    from ctranslate2.converters import TransformersConverter

    assert adapter is None
    made = str(folder.with_name(f"{folder.name}-ctranslate2"))
    TransformersConverter(str(folder)).convert(made, quantization="float32", force=True)
    generator = Generator(made, compute_type="float32")
    return [_log_softmax(generator.forward_batch([list(ids)]))[0] for ids in prompts]


def openvino(folder: Path, adapter: Path | None, prompts: Prompts) -> LogProbs:
    """OpenVINO, by its own trace of the model of transformers."""
    import torch
    from openvino import compile_model, convert_model

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = _model(folder, adapter)

        def forward(self, input_ids: torch.Tensor) -> Any:
            mask = torch.ones_like(input_ids)
            return self.model(input_ids, attention_mask=mask, use_cache=False).logits

    traced = convert_model(Logits(), example_input=torch.tensor([prompts[0]]))
    compiled = compile_model(traced, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [_log_softmax(compiled(np.array([ids]))[0])[0] for ids in prompts]


def vllm(folder: Path, adapter: Path | None, prompts: Prompts) -> LogProbs:
    """vLLM: of each position the 100 most probable tokens.

    Each position is a request of its own: with an adapter vLLM 0.32 has no ``prompt_logprobs``.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        str(folder), dtype="float32", enforce_eager=True, enable_lora=adapter is not None,
        max_logprobs=100, max_model_len=512, max_num_seqs=4,
    )  # fmt: skip
    asked = SamplingParams(max_tokens=1, temperature=0, logprobs=100)
    lora = LoRARequest("adapter", 1, str(adapter)) if adapter else None

    def next_tokens(beginnings: Prompts) -> list[dict[int, float]]:
        given = [{"prompt_token_ids": ids} for ids in beginnings]
        answers = engine.generate(given, asked, lora_request=lora)
        return [{k: v.logprob for k, v in a.outputs[0].logprobs[0].items()} for a in answers]

    return _by_beginning(next_tokens, prompts, engine.model_config.get_vocab_size())


def llama_cpp(folder: Path, adapter: Path | None, prompts: Prompts) -> LogProbs:
    """llama.cpp: the converters that lie in its environment, and its server; 100 tokens of each."""
    from xllamacpp import (
        CommonAdapterLoraInfo,
        CommonParams,
        Server,
        ggml_type,
        llama_flash_attn_type,
    )

    def converted(script: str, source: Path, *options: str) -> str:
        made = str(source.with_name(f"{source.name}.gguf"))
        command = [sys.executable, f"{sys.prefix}/llama.cpp/{script}.py", str(source), *options]
        subprocess.run([*command, "--outfile", made, "--outtype", "f32"], check=True)
        return made

    asked = CommonParams()
    asked.model.path = converted("convert_hf_to_gguf", folder)
    if adapter is not None:
        made = converted("convert_lora_to_gguf", adapter, "--base", str(folder))
        asked.lora_adapters = [CommonAdapterLoraInfo(made)]
    asked.n_ctx, asked.n_parallel, asked.warmup = 1024, 1, False
    asked.cache_type_k = asked.cache_type_v = ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds
    server = Server(asked)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]

    def next_token(ids: Sequence[int]) -> dict[int, float]:
        options = {"n_predict": 1, "n_probs": 100, "temperature": 0, "cache_prompt": True}
        answer = server.handle_completions({"prompt": list(ids), **options})
        (token,) = answer["choices"][0]["logprobs"]["content"]
        return {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}

    return _by_beginning(lambda beginnings: [*map(next_token, beginnings)], prompts, size)


def _model(folder: Path, adapter: Path | None) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, __version__

    dtype = "torch_dtype" if __version__.startswith("4.") else "dtype"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **{dtype: torch.float32})
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval()


def _log_softmax(logits: ArrayLike) -> NDArray[np.float32]:
    found = np.asarray(logits, dtype=np.float64)
    found = found - found.max(-1, keepdims=True)
    found -= np.log(np.exp(found).sum(-1, keepdims=True))
    return np.asarray(found, dtype=np.float32)


def _by_beginning(
    next_tokens: Callable[[Prompts], list[dict[int, float]]], prompts: Prompts, size: int
) -> LogProbs:
    """From an engine that says what comes after a prompt; of the first 60 positions of each."""
    result = []
    for ids in prompts:
        table = np.full((len(ids), size), np.nan, dtype=np.float32)
        beginnings = [ids[: n + 1] for n in range(min(len(ids), 60))]
        for row, known in zip(table, next_tokens(beginnings), strict=False):
            row[list(known)] = list(known.values())
        result.append(table)
    return result


READERS: dict[str, Callable[[Path, Path | None, Prompts], LogProbs]] = {
    reader.__name__: reader for reader in (transformers, ctranslate2, openvino, vllm, llama_cpp)
}

if __name__ == "__main__":
    name, asked, result, folder, *adapter = sys.argv[1:]
    prompts = json.loads(Path(asked).read_text())
    found = READERS[name](Path(folder), Path(adapter[0]) if adapter else None, prompts)
    np.savez(result, *found)
