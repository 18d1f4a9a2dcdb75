"""Every public function of diagnostics, with and without jit: shapes, finite, equal."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from grpo_jax.diagnostics import (
    cosine_intervals,
    cosines,
    counterfactual,
    curvature,
    geometry,
    phases,
    probe,
    sketch,
)
from tests.variants import public_functions

P, G, K, D, H = 3, 8, 16, 5, 2  # prompts, samples, coordinates, parameters, parts
ON_THE_HOST = {"phase", "draw_cosines", "num_parts"}
RNG = np.random.default_rng(0)


def floats(*shape):
    return RNG.normal(size=shape).astype(np.float32)


PARAMS = {"a": floats(D), "b": floats(2, 3)}
DIRECTION = {"a": floats(D), "b": floats(2, 3)}
FEATURES = floats(P, G, D + 6)
REWARDS = np.float32(  # both halves of every group are informative
    [[1, 0, 1, 0, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 1, 0, 0, 0]]
)
SCORES = floats(P, G, D) + REWARDS[..., None]
GRAM = np.einsum("pgd,qhd->pgqh", SCORES, SCORES)
PARTS = 1 + 0.5 * floats(P, H, K)
KEY = jax.random.key(0)
ONES = np.ones(P, np.float32)


def log_probs(params, features=FEATURES):
    """[..., G]: normalised over the group, as if it were all completions."""
    theta = jnp.concatenate([params["a"], params["b"].ravel()])
    return jax.nn.log_softmax(jnp.tanh(features @ theta))


def probed(params, rewards):
    return probe.probe_prompt(
        lambda params, rows: log_probs(params, FEATURES[0])[rows],
        params,
        jnp.arange(G),
        rewards,
        partial(sketch.gradient_hash, key=KEY, width=K),
        answer=jnp.array([0]),
    )


def compared(params, weights):
    return counterfactual.counterfactual_updates(
        lambda w: jax.tree.map(lambda x: x * w.sum(), params),
        log_probs,
        params,
        REWARDS,
        {"unit": jnp.asarray(ONES), "other": weights},
    )


MATRIX = np.float32([[1, 0.5, -0.2], [0.5, 1, 0.1], [-0.2, 0.1, 1]])
SCALARS = cosines.CosineStatistics(*[()] * 5)
GEOMETRY = geometry.PromptGeometry(
    inner=(P, P), squared_norms=(P,), raw_squared_norms=(P,),
    expected_squared_norms=(P,), squared_inner=(P, P), cosines=(P, P), mean_cosine=(),
    std_cosine=(), attenuation=(), effective_prompts=(), noise_cosine=(),
    statistics=SCALARS, raw_statistics=SCALARS, chi=(), noise_floor=(),
    violating_fraction=(),
    m_bound=(P, P), m_median=(), m_p99=(), norm_ratio=(), sigma_ratio=(),
)  # fmt: skip

UNEQUAL = 1 - np.eye(P, dtype=np.float32)
TERMS = cosines.PairTerms((P, P), (P, P), (P, P))

# name, function, arguments, shapes of the result
CASES = [
    (
        "directional_derivatives",
        partial(curvature.directional_derivatives, log_probs),
        (PARAMS, DIRECTION),
        ((P, G),) * 3,
    ),
    ("prompt_slope", curvature.prompt_slope, (REWARDS, floats(P, G)), (P,)),
    (
        "prompt_curvature",
        curvature.prompt_curvature,
        (REWARDS, floats(P, G), floats(P, G)),
        (P,),
    ),
    (
        "gradient_sketch",
        partial(sketch.gradient_sketch, log_probs, num_directions=K),
        (PARAMS, KEY),
        (P, G, K),
    ),
    ("sketch_gram", sketch.sketch_gram, (floats(P, G, K),), (P, G, P, G)),
    ("exact_gram", partial(sketch.exact_gram, log_probs), (PARAMS,), (P, G, P, G)),
    ("gradient_hash", partial(sketch.gradient_hash, width=4), (PARAMS, KEY), (4,)),
    ("prompt_geometry", geometry.prompt_geometry, (REWARDS, GRAM), GEOMETRY),
    ("parts_geometry", geometry.parts_geometry, (REWARDS, PARTS), GEOMETRY),
    (
        "first_order_changes",
        geometry.first_order_changes,
        (MATRIX, ONES, ONES),
        ((P,), (P,)),
    ),
    ("part_weights", partial(geometry.part_weights, parts=H), (REWARDS,), (P, H, 4)),
    ("cosine_statistics", cosines.cosine_statistics, (MATRIX,), SCALARS),
    (
        "weighted_statistics",
        cosines.weighted_statistics,
        (MATRIX, np.ones((P, P), np.float32)),
        SCALARS,
    ),
    ("attenuations", cosines.attenuations, (0.8 * ONES, ONES), (P,)),
    (
        "pair_terms",
        cosines.pair_terms,
        (MATRIX, 0.8 * ONES, ONES, MATRIX**2),
        TERMS,
    ),
    (
        "debiased_statistics",
        cosines.debiased_statistics,
        (MATRIX, 0.8 * ONES, ONES, cosines.PairTerms(0.64 * UNEQUAL, MATRIX, MATRIX)),
        cosines.Debiased((), (), (), (), SCALARS, SCALARS),
    ),
    (
        "probe_prompt",
        probed,
        (PARAMS, REWARDS[0]),
        probe.Probe((H, K), (), (), (), (), (), (), (K,)),
    ),
    (
        "counterfactual_updates",
        compared,
        (PARAMS, floats(P)),
        counterfactual.Counterfactual((2,), (2, 2), (2,), (2, 2), (2, P), (2, P)),
    ),
    ("mean_sigma", phases.mean_sigma, (REWARDS,), ()),
]


class DiagnosticsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(CASES)
    def test(self, function, arguments, shapes):
        arguments = jax.tree.map(jnp.asarray, arguments)
        result = self.variant(function)(*arguments)
        jax.tree.map(chex.assert_shape, result, shapes)
        chex.assert_trees_all_close(result, function(*arguments), rtol=1e-4, atol=1e-5)
        if isinstance(result, geometry.PromptGeometry):  # the diagonal is no pair
            result = result._replace(m_bound=result.m_median)
        chex.assert_tree_all_finite(result)


def test_every_public_function_has_a_case():
    modules = (counterfactual, curvature, geometry, phases, probe, sketch)
    modules += (cosines, cosine_intervals)
    public = {name.rpartition(".")[2] for name in public_functions(*modules)}
    missing = public - ON_THE_HOST - {name for name, *_ in CASES}
    assert not missing, f"add to CASES: {', '.join(sorted(missing))}"
    assert public >= ON_THE_HOST
