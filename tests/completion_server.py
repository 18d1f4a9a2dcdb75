"""An HTTP server on a loopback port that speaks the completions protocol, for tests.

It samples with `gj.sample` from a policy that it loads from a directory, so that its
log-probs are the trainer's.
"""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np

import grpo_jax as gj

PROMPT_TOKENS = 32  # prompts are padded to this: one program for all


class CompletionServer:
    """Serves a policy; use as a context.

    Args:
        policy: What to sample from, until `load`.
        form: How token ids are named: "token_ids", "content" or "spelled".
        spoil: Of (body, answer), what is answered instead: JSON, bytes as they are, or
            an HTTP error's code. May sleep.
        raw: Report log-probs of temperature 1, whatever the temperature.
        stops: Whether it stops at `stop_token_ids`.

    Attributes:
        url: Its address.
        requests: (body, headers) of each request.
        loaded: Directories that were loaded.
    """

    def __init__(
        self, policy=None, *, form="token_ids", spoil=None, raw=False, stops=True
    ):
        self.policy, self.form, self.spoil = policy, form, spoil
        self.raw, self.stops = raw, stops
        self.requests, self.loaded = [], []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):  # noqa: N802
                length = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(length))
                with contextlib.suppress(ConnectionError):  # it timed out and left
                    self._answer(outer._respond(self.path, body, dict(self.headers)))

            def _answer(self, answer):
                code = answer if isinstance(answer, int) else 200
                if isinstance(answer, int):
                    answer = {"error": {"message": "boom"}}
                if not isinstance(answer, bytes):
                    answer = json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *arguments):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 256

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Stops listening; requests are refused from now on."""
        self._server.shutdown()
        self._server.server_close()

    def load(self, directory):
        """The reload hook of a sampler."""
        self.policy = gj.load_pretrained(directory)
        self.loaded.append(Path(directory))

    def _respond(self, path, body, headers):
        if path == "/update_weights_from_disk":  # as SGLang has it
            self.load(body["model_path"])
            return {"success": True}
        if path == "/reset_prefix_cache":  # as vLLM has it
            return b""
        self.requests.append((body, headers))
        if path != "/v1/completions":
            return 404
        with self._lock:
            answer = self._completion(body)
        return answer if self.spoil is None else self.spoil(body, answer)

    def _completion(self, body):
        prompt, ends = body["prompt"], body["stop_token_ids"] if self.stops else []
        ids = np.zeros((1, PROMPT_TOKENS), np.int32)
        ids[0, : len(prompt)] = prompt
        mask = (np.arange(PROMPT_TOKENS) < len(prompt)).astype(np.int32)[None]
        rollouts = gj.sample(
            self.policy, ids, mask, group_size=1, max_new_tokens=body["max_tokens"],
            key=jax.random.key(body["seed"]), temperature=body["temperature"],
            eos_id=ends or -1, pad_id=0,
        )  # fmt: skip
        if self.raw:
            logprobs = gj.completion_logprobs(self.policy, rollouts)
        else:
            logprobs = rollouts.behaviour_logprobs
        n = int(rollouts.completion_mask.sum())
        tokens = np.asarray(rollouts.completions)[0, 0, :n].tolist()
        logprobs = np.asarray(logprobs)[0, 0, :n].tolist()
        ended = tokens[-1] in ends
        choice = {"index": 0, "finish_reason": "stop" if ended else "length"}
        names = [f"token_id:{i}" for i in tokens]
        pairs = list(zip(tokens, logprobs, strict=True))
        choice |= {
            "token_ids": {
                "token_ids": tokens,
                "logprobs": {"tokens": names, "token_logprobs": logprobs},
            },
            "spelled": {"logprobs": {"tokens": names, "token_logprobs": logprobs}},
            "content": {
                "logprobs": {"content": [{"id": i, "logprob": x} for i, x in pairs]}
            },
        }[self.form]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": n}
        return {"object": "text_completion", "choices": [choice], "usage": usage}
