"""Memory and time of the preconditioner's three forms, on one gradient of GRPO.

A policy of 2 M parameters (a token is drawn given the one before it), 16 prompts x 4
samples x 8 tokens, float32. Memory is what XLA allots to the compiled program beside
its arguments: temporaries and the gradient.

    python experiments/benchmarks/pull_back.py [--prompts 16] [--width 768]

It needs the light install only (jax, optax, numpy). Seconds on a CPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import grpo_jax as gj

GROUP, TOKENS, VOCAB = 4, 8, 1024
Params = dict[str, jax.Array]


def init(width: int) -> Params:
    shapes = {"embed": (VOCAB, width), "hidden": (width, width), "out": (width, VOCAB)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape) / width**0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def losses(params: Params, tokens: jax.Array, advantages: jax.Array) -> jax.Array:
    """[P] losses of tokens [P, G, T + 1] under advantages [P, G]."""
    hidden = jnp.tanh(params["embed"][tokens[..., :-1]] @ params["hidden"])
    logprobs = gj.token_logprobs(hidden, params["out"], tokens[..., 1:])
    return -(advantages * logprobs.mean(-1)).mean(-1)


def forms() -> dict[str, Callable[..., Any]]:
    """The gradient of the same loss, by (params, tokens, rewards), in every form."""
    tx = optax.chain(gj.scale_by_group_std(), gj.mean_over_prompts())
    pull_back = gj.weighted_value_and_grad(losses, gj.std_weights())
    in_parts = gj.weighted_value_and_grad(losses, gj.std_weights(), micro_batches=4)

    def definition(params: Params, tokens: jax.Array, rewards: jax.Array) -> Params:
        advantages = gj.centred_advantages(rewards)
        grads = jax.jacrev(losses)(params, tokens, advantages)
        return tx.update(grads, tx.init(params), rewards=rewards)[0]

    def whitened(params: Params, tokens: jax.Array, rewards: jax.Array) -> Params:
        advantages = gj.whitened_advantages(rewards)
        return jax.grad(lambda p: losses(p, tokens, advantages).mean())(params)

    def pulled(f: Any) -> Callable[..., Params]:
        def gradient(params: Params, tokens: jax.Array, rewards: jax.Array) -> Params:
            advantages = gj.centred_advantages(rewards)
            return f(params, tokens, advantages, rewards=rewards)[1]

        return gradient

    return {
        "jacrev and the chain of transforms": definition,
        "weighted_value_and_grad": pulled(pull_back),
        "weighted_value_and_grad, 4 micro-batches": pulled(in_parts),
        "whitened advantages": whitened,
    }


def main(prompts: int, width: int) -> dict[str, float]:
    """{form: MB of its program}; prints a table of them."""
    params = init(width)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (prompts, GROUP, TOKENS + 1)))
    rewards = jnp.asarray(rng.integers(0, 2, (prompts, GROUP)), jnp.float32)
    count = sum(x.size for x in params.values())
    print(f"{count:,} parameters ({count * 4 / 1e6:.1f} MB), {prompts} prompts")
    megabytes, first = {}, None
    for name, form in forms().items():
        program = jax.jit(form).lower(params, tokens, rewards).compile()
        memory = program.memory_analysis()
        megabytes[name] = memory.temp_size_in_bytes + memory.output_size_in_bytes
        megabytes[name] /= 1e6
        grads, seconds = jax.block_until_ready(program(params, tokens, rewards)), []
        for _ in range(5):
            began = time.perf_counter()
            jax.block_until_ready(program(params, tokens, rewards))
            seconds.append(time.perf_counter() - began)
        first = first or grads
        gap = max(float(jnp.abs(grads[k] - first[k]).max()) for k in grads)
        print(
            f"{name:42} {megabytes[name]:7.1f} MB {statistics.median(seconds):7.3f} s"
            f"   largest difference {gap:.0e}"
        )
    return megabytes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--width", type=int, default=768)
    arguments = parser.parse_args()
    main(arguments.prompts, arguments.width)
