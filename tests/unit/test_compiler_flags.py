"""What jaxlib 0.10.2 computes wrongly on a CPU is right after our import."""

import os
import subprocess
import sys

import pytest

# Of the row (i, 0, 0) under the identity: the sum of squares is i^2.
LAST_ROW = """
import jax
import jax.numpy as jnp
n = 32_769
rows = jnp.zeros((n, 3)).at[:, 0].set(jnp.arange(n))
matrix = jnp.eye(3)
sums = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(rows)
print(float(sums[-1]))
"""
FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def run(code, **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env = inherited | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.check_output([sys.executable, "-c", code], env=env, text=True)


@pytest.mark.parametrize("imports", ["grpo_jax", "jax, grpo_jax"])
def test_a_long_sum_of_squares(imports):
    assert float(run(f"import {imports}\n{LAST_ROW}")) == 32_768**2


def test_the_import_starts_no_backend_and_keeps_the_users_flags():
    code = (
        "import os, grpo_jax, jax; from jax._src import xla_bridge;"
        "print(xla_bridge.backends_are_initialized(), os.environ['XLA_FLAGS'])"
    )
    given = f"--xla_force_host_platform_device_count=2 {FLAG}=dot"
    assert run(code, XLA_FLAGS=given).split() == ["False", *given.split()]
