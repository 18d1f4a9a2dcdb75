"""A run that samples from llama.cpp's server, of the package xllamacpp, on loopback: a
real one, with float16 keys and values, and ends and seeds of its own."""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import numpy as np
import optax
import pytest

import grpo_jax as gj
from tests.e2e.test_train import digits_task, small_config

pytest.importorskip("xllamacpp", reason="needs llama.cpp's server: xllamacpp")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
MODEL = gj.ModelConfig(
    width=64, mlp_width=96, num_layers=2, head_dim=16, qk_bias=True
)  # a Qwen2, whose tensors GGUF keeps in their order

_PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_of(directory, file):
    """Writes the model of a directory, a Qwen2 of small size, as a GGUF file; its
    tokens get made-up names."""
    from gguf import GGUFWriter, TokenType
    from safetensors.numpy import load_file

    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    writer = GGUFWriter(file, "qwen2")
    writer.add_context_length(512)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    ends = config["eos_token_id"]
    end = ends[0] if isinstance(ends, list) else ends
    names = [chr(ord("a") + i) for i in range(config["vocab_size"])]
    kinds = [TokenType.NORMAL] * len(names)
    names[end], kinds[end] = "<end>", TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges(["x y"])
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)
    for name, x in load_file(directory / "model.safetensors").items():
        if name not in _OUTER:
            _, _, layer, *part, kind = name.split(".")
            name = f"blk.{layer}.{_PARTS['.'.join(part)]}.{kind}"
        writer.add_tensor(_OUTER.get(name, name), x.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_LLAMA = """
import sys, time
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_ctx, params.n_parallel, params.warmup = 2048, 4, False
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
sys.stdin.read()  # until the parent closes it, or ends
"""


class LlamaServer:
    """llama.cpp's server in a process of its own; restarted by `load`."""

    def __init__(self, port):
        self.url, self._port = f"http://127.0.0.1:{port}", port
        self._process, self.loads = None, 0

    def load(self, directory):
        """The reload hook of a sampler: a server that has no endpoint for it is
        started again."""
        self.close()
        file = directory / "model.gguf"
        gguf_of(directory, file)
        with open(directory / "server.log", "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _LLAMA, str(file), str(self._port)],
                stdin=subprocess.PIPE, stdout=log, stderr=log,
            )  # fmt: skip
        self.loads += 1
        for _ in range(300):
            assert self._process.poll() is None, (directory / "server.log").read_text()
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer,
            ):
                if answer.status == 200:
                    return
            time.sleep(0.1)
        raise AssertionError((directory / "server.log").read_text())

    def close(self):
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait(timeout=30)
            self._process = None


@pytest.fixture
def llama():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = LlamaServer(port)
    yield server
    server.close()


def test_a_run_through_llama_cpp(tmp_path, llama):
    """Its log-probs are the trainer's up to the rounding of keys and values; a policy
    that was not loaded would be off by the updates."""
    task = digits_task()
    sampler = gj.ServerSampler(
        llama.url, "policy", save=tmp_path / "served", reload=llama.load, retries=1,
        tokenizer=task.tokenizer, concurrency=4,
    )  # fmt: skip
    config = small_config(
        tmp_path / "run", model=MODEL, steps=4,
        evaluation=gj.EvaluationConfig(every=0, prompts=2),
    )  # fmt: skip
    run = gj.train(config, task=task, sampler=sampler, optimizer=optax.sgd(0.1))
    assert run.finished and llama.loads == 5  # the start and every step
    history = run.history
    assert 0 < history["mismatch/mean_abs"][1:].max() < 0.005
    assert history["mismatch/max_abs"][1:].max() < 0.02
    assert history["update/log_prob_change"][1:].max() > 0.02

    policy = run.policy()
    ids, mask = np.array([[0, 5, 6], [7, 8, 9]]), np.array([[0, 1, 1], [1, 1, 1]])
    how = dict(
        group_size=32, max_new_tokens=8, key=jax.random.key(0), eos_id=task.ends,
        pad_id=task.tokenizer.pad_token_id,
    )  # fmt: skip
    theirs = sampler(policy, ids, mask, **how)
    ours = gj.sample(policy, ids, mask, **how)
    logprobs = gj.completion_logprobs(policy, theirs)
    np.testing.assert_allclose(theirs.behaviour_logprobs, logprobs, atol=0.02)
    lengths = [np.asarray(x.completion_mask).sum(-1) for x in (theirs, ours)]
    assert min(lengths[0].min(), lengths[1].min()) < 8  # ends are sampled
    again = np.asarray(sampler(policy, ids, mask, **how).completions)
    # Its rounding may depend on what else is in its batch.
    assert (again == theirs.completions).all(-1).mean() > 0.9
