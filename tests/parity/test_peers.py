"""TRL's and Tunix's own code on the same arrays; no completion is empty there.

TRL's methods run in float64 on a stand-in for the trainer, Tunix's in its float32.
"""

from dataclasses import replace
from types import SimpleNamespace as Record
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax as gj

P, G, T, LENGTH = 3, 4, 7, 11  # LENGTH: TRL's constant denominator
NAMES = ("logprobs", "behaviour_logprobs", "reference_logprobs", "completion_mask")
TOKENS = {"aggregation": "batch_token_mean"}
SEQUENCE = {"importance_sampling_level": "sequence"}
TRL = {  # their settings, our row and changes to it, spread of the log-ratios
    "grpo": ({"beta": 0.04}, "grpo", {"kl_coef": 0.04}, 0.4),
    "delta": ({"delta": 1.5}, "grpo", {"ratio_cap": 1.5, "clip": (0.2, 0.28)}, 0.6),
    "dr_grpo": ({"loss_type": "dr_grpo"}, "dr_grpo", {}, 0.4),
    "dapo": ({"loss_type": "dapo"}, "dapo", TOKENS, 0.4),
    "bnpo": ({"loss_type": "bnpo"}, "grpo", TOKENS, 0.4),  # TRL's is a token mean
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, "cispo", {}, 2.0),
    "gspo": (SEQUENCE, "gspo", {}, 1e-3),
    "gspo_kl": (SEQUENCE | {"beta": 0.04}, "gspo_token", {"kl_coef": 0.04}, 1e-3),
}
DUAL = {"loss_agg_mode": "token-mean", "epsilon_c": 3.0}
TUNIX = {
    "grpo": ({"beta": 0.04}, "grpo", {"kl_coef": 0.04}, 0.4),
    "dapo": (DUAL, "dapo", {"dual_clip": 3.0} | TOKENS, 1.0),
    "dr_grpo": ({"loss_agg_mode": "sequence-mean-token-scale"}, "dr_grpo", {}, 0.4),
    "gspo_token": ({"loss_algo": "gspo-token"}, "gspo_token", {}, 1e-3),
}


def case(peer, settings, name, changes, spread):
    """(their settings, our objective by their conventions, arrays, advantages)."""
    std = gj.PEER_STD[peer]
    theirs = {"kl_coef": 0.0, "std_eps": std["eps"], "std_ddof": std["ddof"]}
    objective = replace(gj.OBJECTIVES[name], **theirs | changes)
    low, high = objective.clip
    edges = {"epsilon_low": low, "epsilon": low, "epsilon_high": high, "beta": 0.0}
    data = batch(spread)
    advantages = data["rewards"] - data["rewards"].mean(1, keepdims=True)
    if objective.scale == "std":
        advantages /= data["rewards"].std(1, keepdims=True, ddof=1) + std["eps"]
    return edges | settings, objective, data, advantages


def batch(spread):
    rng = np.random.default_rng(0)
    logprobs = -rng.exponential(1.0, (P, G, T))
    behaviour = logprobs - spread * rng.normal(size=(P, G, T))
    reference = logprobs - 0.5 * rng.normal(size=(P, G, T))
    mask = 1.0 * (np.arange(T) < rng.integers(1, T + 1, (P, G, 1)))
    rewards = rng.normal(size=(P, G)) * [[0.0], [1.0], [1.0]]  # the first group ties
    arrays = (logprobs, behaviour, reference, mask)
    return dict(zip(NAMES, arrays, strict=True), rewards=rewards)


def check(objective, data, theirs, atol, max_length=None):
    def loss(logprobs):
        arrays = {k: jnp.asarray(v) for k, v in data.items()} | {"logprobs": logprobs}
        return gj.policy_loss(objective, **arrays, max_length=max_length)

    step = jax.value_and_grad(loss, has_aux=True)
    (value, metrics), slope = step(jnp.asarray(data["logprobs"]))
    assert objective.surrogate == "cispo" or metrics["ratio/clipped"] > 0.02
    np.testing.assert_allclose(value, theirs[0], rtol=0, atol=atol)
    np.testing.assert_allclose(slope.reshape(-1, T), theirs[1], rtol=0, atol=atol)


def trl_loss(trainer, data, advantages, settings):
    """(value, gradient) of `trainer._compute_loss` in training mode."""
    torch = pytest.importorskip("torch")
    rows = (torch.tensor(data[name].reshape(-1, T)) for name in NAMES)
    logprobs, old, reference, mask = rows
    ids = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    inputs = dict.fromkeys(ids, mask) | {"advantages": torch.tensor(advantages.ravel())}
    inputs |= {"old_per_token_logps": old, "old_logps": (old * mask).sum(1)}
    inputs |= {"ref_per_token_logps": reference, "num_items_in_batch": mask.sum()}
    args = Record(delta=settings.get("delta"), steps_per_generation=1)
    args.use_bias_correction_kl = False
    off = ("aux_loss_enabled", "use_vllm", "_entropy_bonus_enabled")
    plain = dict.fromkeys(off, False) | {"off_policy_mask_threshold": None}
    plain |= {"loss_type": "grpo", "importance_sampling_level": "token", "args": args}
    plain |= {"max_completion_length": LENGTH, "top_entropy_quantile": 1.0}
    stub = MagicMock(current_gradient_accumulation_steps=1, **plain | settings)
    stub.accelerator.num_processes = 1
    stub.accelerator.gather.side_effect = lambda x: x
    stub.accelerator.reduce.side_effect = lambda x, reduction: x
    scores = (logprobs.requires_grad_(), torch.zeros_like(mask), None)
    stub._get_per_token_logps_and_entropies.return_value = scores
    (loss := trainer._compute_loss(stub, None, inputs)).backward()
    return loss.item(), logprobs.grad.numpy()


@pytest.mark.parametrize("name", TRL)
def test_trl_grpo(name, x64):
    peer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is missing")
    settings, objective, data, advantages = case("trl", *TRL[name])
    theirs = trl_loss(peer.GRPOTrainer, data, advantages, settings)
    check(objective, data, theirs, 1e-14, max_length=LENGTH)


def test_trl_rloo(x64):
    peer = pytest.importorskip("trl.trainer.rloo_trainer", reason="TRL is missing")
    data = batch(0.2)
    gap = data["behaviour_logprobs"] - data["reference_logprobs"]
    rewards = data["rewards"] - 0.05 * (gap * data["completion_mask"]).sum(-1)
    advantages = rewards - (rewards.sum(1, keepdims=True) - rewards) / (G - 1)
    edges = dict.fromkeys(("epsilon_low", "epsilon_high"), 0.2)
    theirs = trl_loss(peer.RLOOTrainer, data, advantages, edges)
    check(gj.OBJECTIVES["rloo_trl"], data, theirs, 1e-14)


@pytest.mark.parametrize("name", TUNIX)
def test_tunix_grpo(name, monkeypatch):
    peer = pytest.importorskip("tunix.rl.algo_core", reason="Tunix is missing")
    settings, objective, data, _ = case("tunix", *TUNIX[name])
    prefix = "" if objective.scale == "std" else "drgrpo_"
    estimator = getattr(peer, f"compute_{prefix}advantages")
    rows = (jnp.asarray(data[k].reshape(-1, T), jnp.float32) for k in NAMES)
    logprobs, old, reference, mask = rows
    example = MagicMock(completion_mask=mask, sampler_is_weights=None)
    example.advantages = jnp.asarray(estimator(data["rewards"].ravel(), G))
    example.old_per_token_logps, example.ref_per_token_logps = old, reference
    config = {"loss_algo": "grpo", "loss_agg_mode": "sequence-mean-token-mean"}
    config |= {"kl_loss_mode": "low_var_kl", "kl_clamp_value": None, "temperature": 1}
    options = Record(**config | settings)

    def loss(logprobs):
        scores = MagicMock(return_value=(logprobs, jnp.zeros((P * G, T, 2))))
        monkeypatch.setattr(peer.common, "compute_per_token_logps", scores)
        return peer.grpo_loss_fn(peer.nnx.Module(), example, options, 0, 1)[0]

    check(objective, data, jax.value_and_grad(loss)(logprobs), 5e-7)


def test_tunix_rloo(x64):
    peer = pytest.importorskip("tunix.rl.algo_core", reason="Tunix is missing")
    rewards = batch(1.0)["rewards"]
    theirs = peer.compute_rloo_advantages(rewards.ravel(), G).reshape(P, G)
    ours = gj.leave_one_out_advantages(rewards)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-14)
