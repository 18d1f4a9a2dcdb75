"""Uses every public name of the maths, where jax, optax and numpy are all there is.

    python tests/unit/light_uses.py [--pretend]

`--pretend` hides every other package that is installed. Prints one line of JSON: the
names used, what each other public name says of packages that are missing, and the
packages outside these that were imported.
"""

import functools
import importlib.metadata
import inspect
import json
import sys

THREE = {"jax", "optax", "numpy"}


def with_dependencies(names):
    """The distributions named and all that they depend on, extras left out."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            needs = importlib.metadata.requires(name) or []
            for text in (need.partition(";") for need in needs):
                if "extra" not in text[2]:
                    letters = text[0].strip().lower().replace("_", "-")
                    end = next(
                        (i for i, c in enumerate(letters) if c in "<>=!~[ "), None
                    )
                    waiting.append(letters[:end])
    return found


def modules_of(distributions):
    """Their top-level modules."""
    normal = {name.replace("_", "-") for name in distributions}
    return {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if {owner.lower().replace("_", "-") for owner in owners} & normal
    }


LIGHT = modules_of(with_dependencies(THREE)) | {"grpo_jax"}
OTHERS = set(importlib.metadata.packages_distributions()) - LIGHT
OTHERS -= {name.partition(".")[0] for name in sys.modules}  # of Python's own start


class Hidden:
    """Finds no module of the other packages."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in OTHERS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if "--pretend" in sys.argv:
    sys.meta_path.insert(0, Hidden)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import grpo_jax as gj  # noqa: E402

jax.config.update("jax_disable_most_optimizations", True)
P, G, T, V, D, K = 3, 8, 4, 7, 5, 16
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


R = np.float32(RNG.integers(0, 2, (P, G)))
R[:, :2] = 0, 1  # no tied group
LOGPS, OLD = (-RNG.exponential(size=(P, G, T)).astype(np.float32) for _ in range(2))
MASK, IDS = np.ones((P, G, T), np.float32), RNG.integers(0, V, (P, G, T))

PARAMS, SCORES = normal(D), normal(P, G, D) + R[..., None]
FIRST, SECOND = normal(P, G), normal(P, G)
KEY = jax.random.key(0)


def log_probs(params):
    return jax.nn.log_softmax(SCORES @ params)


def losses(params, advantages):
    return -(advantages * log_probs(params)).mean(-1)


def update_of(*transforms):
    """The update of per-prompt gradients by these, and the mean over prompts."""
    tx = optax.chain(*transforms)
    grads = jax.jacrev(losses)(PARAMS, gj.centred_advantages(R))
    return tx.update(grads, tx.init(PARAMS), PARAMS, rewards=R)[0]


def weights(rule):
    return gj.apply_weights(rule, R, rule.init(), np.arange(P))[0]


def loss(function, name):
    return function(
        gj.OBJECTIVES[name],
        logprobs=LOGPS,
        behaviour_logprobs=OLD,
        rewards=R,
        completion_mask=MASK,
        reference_logprobs=OLD,
        entropy=-LOGPS,
        token_ids=IDS,
    )


@functools.cache
def geometry():
    return jax.jit(lambda: gj.prompt_geometry(R, gj.exact_gram(log_probs, PARAMS)))()


USES = {
    "inverse_std": lambda: gj.inverse_std(R),
    "centred_advantages": lambda: gj.centred_advantages(R),
    "leave_one_out_advantages": lambda: gj.leave_one_out_advantages(R),
    "whitened_advantages": lambda: gj.whitened_advantages(R),
    "expected_group_std": lambda: gj.expected_group_std(np.float32([0.2]), G),
    "overlong_punishment": lambda: gj.overlong_punishment(np.arange(9), 8, 4),
    "PromptWeights": lambda: weights(
        gj.PromptWeights(lambda: (), lambda rewards, s: (rewards.mean(1), s))
    ),
    "unit_weights": lambda: weights(gj.unit_weights()),
    "std_weights": lambda: weights(gj.std_weights()),
    "batch_std_weights": lambda: weights(gj.batch_std_weights()),
    "group_mean_weights": lambda: weights(gj.group_mean_weights()),
    "beta_weights": lambda: weights(gj.beta_weights()),
    "finite_group_weights": lambda: weights(gj.finite_group_weights()),
    "posterior_weights": lambda: weights(gj.posterior_weights(9)),
    "apply_weights": lambda: gj.apply_weights(gj.std_weights(), R, ())[0],
    "PEER_STD": lambda: weights(gj.std_weights(**gj.PEER_STD["trl"])),
    "scale_by_prompt_weights": lambda: update_of(
        gj.scale_by_prompt_weights(gj.std_weights()), gj.mean_over_prompts()
    ),
    "scale_by_group_std": lambda: update_of(
        gj.scale_by_group_std(), gj.mean_over_prompts()
    ),
    "mean_over_prompts": lambda: update_of(gj.mean_over_prompts()),
    "weighted_value_and_grad": lambda: jax.jit(
        gj.weighted_value_and_grad(losses, gj.std_weights())
    )(PARAMS, gj.centred_advantages(R), rewards=R),
    "token_logprobs": lambda: gj.token_logprobs(normal(P, G, T, D), normal(D, V), IDS),
    "Objective": lambda: isinstance(gj.OBJECTIVES["grpo"], gj.Objective),
    "OBJECTIVES": lambda: [
        loss(gj.per_prompt_losses, name) for name in ("gspo", "gtpo", "dppo_kl", "espo")
    ],
    "per_prompt_losses": lambda: loss(gj.per_prompt_losses, "dapo"),
    "policy_loss": lambda: loss(gj.policy_loss, "grpo"),
    "conflict_weights": lambda: gj.conflict_weights(
        IDS, gj.centred_advantages(R), MASK
    ),
    "nthr_weights": lambda: gj.nthr_weights(
        normal(P, G, T, D), normal(D, V), IDS, R, MASK
    ),
    "overlong_weights": lambda: gj.overlong_weights(IDS, MASK, 1),
    "truncated_importance_weights": lambda: gj.truncated_importance_weights(LOGPS, OLD),
    "dense_step_weights": lambda: gj.dense_step_weights(-LOGPS, MASK),
    "relative_ratio": lambda: gj.relative_ratio(LOGPS - OLD, 0.5),
    "directional_derivatives": lambda: gj.directional_derivatives(
        log_probs, PARAMS, jnp.ones(D)
    ),
    "prompt_slope": lambda: gj.prompt_slope(R, FIRST),
    "prompt_curvature": lambda: gj.prompt_curvature(R, FIRST, SECOND),
    "Counterfactual": lambda: gj.Counterfactual(
        *np.ones((6, 1), np.float32)
    ).predicted_change(),
    "counterfactual_updates": lambda: gj.counterfactual_updates(
        lambda w: w.sum() * PARAMS, log_probs, PARAMS, R, {"unit": jnp.ones(P)}
    ),
    "gradient_sketch": lambda: gj.gradient_sketch(log_probs, PARAMS, KEY, K),
    "sketch_gram": lambda: gj.sketch_gram(normal(P, G, K)),
    "exact_gram": lambda: gj.exact_gram(log_probs, PARAMS),
    "gradient_hash": lambda: gj.gradient_hash(PARAMS, KEY, 4),
    "PromptGeometry": lambda: isinstance(geometry(), gj.PromptGeometry),
    "prompt_geometry": lambda: gj.prompt_geometry(R, gj.exact_gram(log_probs, PARAMS)),
    "parts_geometry": lambda: gj.parts_geometry(R, 1 + normal(P, 2, K)),
    "Phase": lambda: isinstance(gj.phase(geometry(), R), gj.Phase),
    "Thresholds": lambda: gj.phase(geometry(), R, gj.Thresholds()),
    "phase": lambda: gj.phase(geometry(), R).label,
}
ON_THE_HOST = {"Phase", "PromptGeometry", "Thresholds", "phase"}


def main():
    maths = {
        name
        for home, names in gj._HOMES.items()
        if home.split(".")[1] in gj._MATHS
        for name in names
    }
    assert maths == USES.keys(), maths ^ USES.keys()
    for name, use in USES.items():
        leaves = jax.tree.leaves((use if name in ON_THE_HOST else jax.jit(use))())
        arrays = [x for x in leaves if hasattr(x, "dtype")]
        assert leaves, name
        assert not arrays or any(np.isfinite(x).all() for x in arrays), name
    assert {name for name, _ in inspect.getmembers(gj)} == maths  # `help(gj)` too
    imported = {name.partition(".")[0] for name in sys.modules} & OTHERS
    others = {}
    for name in sorted(set(gj.__all__) - maths):
        try:
            getattr(gj, name)
        except ModuleNotFoundError as error:
            others[name] = str(error)
    print(json.dumps({"used": [*USES], "others": others, "imported": [*imported]}))


if __name__ == "__main__":
    main()
