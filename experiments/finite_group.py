"""What dividing by a group's std estimates: E[std of G rewards], not sigma.

Paper: Ge et al. 2026, arXiv:2601.23135, where the weight of a prompt is 1 / sigma
exactly; a group of G only estimates it. Also Shao et al. 2024, arXiv:2402.03300.
Claim (ours): for binary rewards the mean normalised gradient is E[std of G rewards]
times Delta = grad logit p. At G = 2 and 3 that is REINFORCE rescaled, sample by sample;
for p well below 1 / G the weight saturates at sqrt(G - 1) times REINFORCE's.

    python experiments/finite_group.py [--smoke] [--plot-only] [--results DIR]

Setting: the weight by all K^G groups (K = 3), by the binomial count of successes, and
from 200,000 sampled groups for each of 8 pass rates and G = 2 to 64. Training: 96
prompts that share no parameter, pass rates .01 to .5 at the start, 150 steps of 192
samples whatever G is (192 / G prompts a step), plain steps. REINFORCE is leave-one-out;
`sigma` divides that by the true sigma. Step size per prompt on a grid of half octaves
from 2^-2 to 2^8, chosen on 8 seeds, reported on 24 others: mean +- 95%, t over seeds.
Hardware and time: one CPU core, 2 minutes (--smoke: 40 s, mostly compilation).

Expected: every weight as claimed; std no better than REINFORCE at small G.
Got (2026-11-21): as claimed.
* Weight: all groups, G = 2 to 6, along and across Delta: to 5e-15. Sampled, 56 cells:
  chi2 73 along Delta and 83 across it, where 58 is expected (50 chunks a cell). The
  second has p = .02, by chance: 80 other keys, p from .1 on, both components, give .96
  a cell at G = 2 and 1.06 at 8.
* G = 2, 3: std's advantages are leave-one-out's times sqrt(G - 1), to 2e-16. From G = 4
  on they are no rescale.
* Weight over REINFORCE's at G = 2, 3, 4, 8, 16, 32, 64: as p goes to 0 1, 1.41, 1.73,
  2.65, 3.87, 5.57, 7.94 = sqrt(G - 1), where 1 / sigma is 32 at p = .001 already.
  Against its own value at p = 1/2, what a change of step size cannot mimic, it is 1, 1,
  1.07, 1.43, 2.00, 2.83, 4.00 at most: about sqrt(G) / 2. Half of the ideal is reached
  at p = .146, .096, .042, .0195, .0095, .0047 for G = 3 to 64: from 8 on about .3 / G.
* ddof 1 multiplies every weight by sqrt((G - 1) / G) exactly: a step size. eps takes
  8e-6 of a weight at most (1e-6), 8e-4 (1e-4), 2 to 7% (1e-2; more the larger G is).
* Training, std less REINFORCE in mean pass rate: 0 at G = 2 and 3 (every run the same
  to 4e-15, with steps sqrt(G - 1) apart), .0003 +- .0014 (4), .0008 +- .0015 (8),
  .0042 +- .0031 (16), .0137 +- .0052 (32), .049 +- .012 (64). Best G for both: about 8
  (.990, .991).
* The true 1 / sigma less REINFORCE: -.014 +- .005 (G = 2), -.014 +- .004 (3),
  -.007 +- .003 (4), -.008 +- .003 (8), -.004 +- .004 (16), .007 +- .006 (32),
  .039 +- .009 (64); its mean is below std's at every G. Presumably for the weight that
  it gives a hard prompt's lucky success: what std estimates here is no handicap.
* G = 64 depends on the end of the grid (std's best step is there). At a step of 2^14
  one informative group settles a prompt for good: .944 for all three, above .937 (std)
  and .888 (REINFORCE) tuned. At G = 2 to 16 such steps lose .04 to .35.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro
from common import paired_gain, tune_then_test, write_config, write_rows
from loglinear_prompts import first_is_right, offsets_for, stacked, unit_features
from scipy import stats

import grpo_jax as gj
from grpo_jax import loglinear
from grpo_jax.intervals import t_interval
from grpo_jax.loglinear import LogLinear
from grpo_jax.runs.lines import read_lines

METHODS = ("reinforce", "std", "sigma")  # sigma: leave-one-out / the true sigma


@dataclasses.dataclass(frozen=True)
class Config:
    results: Path = Path("results/finite_group")  # where the three files go
    smoke: bool = False  # fewer of everything
    plot_only: bool = False  # redraw plot.png from metrics.jsonl
    group_sizes: tuple[int, ...] = (2, 3, 4, 8, 16, 32, 64)
    pass_rates: tuple[float, ...] = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 0.5, 0.9)
    responses: int = 3  # per prompt; the first is right
    block: int = 4  # parameters
    enumerated: tuple[int, ...] = (2, 3, 4, 5, 6)  # group sizes with all K^G groups
    sampled_groups: int = 200_000  # per pass rate and group size
    chunk: int = 4000  # of them at a time
    epsilons: tuple[float, ...] = (1e-6, 1e-4, 1e-2)  # added to the std
    num_prompts: int = 96  # of the training, each with parameters of its own
    train_pass_rates: tuple[float, float] = (0.01, 0.5)  # log-spaced at the start
    hard: float = 0.03  # prompts that start below it are reported on their own
    train_responses: int = 6
    train_group_sizes: tuple[int, ...] = (2, 3, 4, 8, 16, 32, 64)  # divide samples
    samples: int = 192  # per step: samples / G prompts, G samples each
    steps: int = 150
    log2_step: tuple[int, int] = (-2, 8)  # ends of the grid of step sizes, by halves
    huge_log2_step: int = 14  # one informative group settles its prompt for good
    tuning_seeds: int = 8  # choose the step size
    test_seeds: int = 24  # others, at the chosen one


# ---- the effective weight: E[normalised gradient] = weight * Delta


def make_prompts(c: Config) -> LogLinear:
    """A prompt per pass rate, all with the same features."""
    x = np.random.default_rng(0).normal(size=(c.responses, c.block))
    count = len(c.pass_rates)
    features = np.broadcast_to(x, (count, *x.shape))
    rewards = first_is_right(count, c.responses)
    offsets = offsets_for(np.array(c.pass_rates), c.responses)
    return LogLinear(*map(jnp.asarray, (features, rewards, offsets)))


def weights_over_counts(
    p: np.ndarray, group: int, ddof: int = 0, eps: float = 0.0
) -> np.ndarray:
    """E[k / G (1 - k / G) inverse_std] over the number k of successes; p: [P]."""
    k = np.arange(group + 1)
    rewards = jnp.asarray(np.arange(group) < k[:, None], float)
    scale = np.asarray(gj.inverse_std(rewards, eps=eps, ddof=ddof))
    mass = stats.binom.pmf(k, group, np.asarray(p)[:, None])
    return mass @ (k / group * (1 - k / group) * scale)


def enumerate_groups(c: Config, prompts: LogLinear, group: int) -> dict:
    """The row of one group size, from the gradients of all K^G groups of responses."""
    now = loglinear.exact(prompts, jnp.zeros(c.block))
    delta = np.asarray(loglinear.deltas(prompts, jnp.zeros(c.block)))
    y = np.array(list(itertools.product(range(c.responses), repeat=group)))
    rewards = jnp.asarray(y == 0, float)
    std = np.asarray(gj.whitened_advantages(rewards, eps=0.0))
    loo = np.asarray(gj.leave_one_out_advantages(rewards))
    gradients = np.einsum("rg,rgd->rd", std, prompts.features[0][y]) / group
    chances = np.prod(np.asarray(now.probabilities)[:, y], -1)  # [P, K^G]
    means = chances @ gradients
    expected = np.asarray(gj.expected_group_std(now.pass_rates, group))
    error = np.abs(means - expected[:, None] * delta).max(1)
    return {
        "group_size": group,
        "error": float((error / np.abs(means).max(1)).max()),
        "not_a_rescale": float(np.abs(std - math.sqrt(group - 1) * loo).max()),
    }


@functools.partial(jax.jit, static_argnums=(0, 2))
def sampled_gradients(
    c: Config, prompts: LogLinear, group: int, key: jax.Array
) -> jax.Array:
    """Mean normalised gradient [chunks, P, 2] of sampled groups, along Delta (in its
    units) and across it (in units of |Delta|, in the span of the features)."""
    theta = jnp.zeros(c.block)
    delta = loglinear.deltas(prompts, theta)[0]
    across = prompts.features[0, 1] - prompts.features[0, 2]  # two wrong ones
    across -= delta * (across @ delta) / (delta @ delta)
    across *= jnp.linalg.norm(delta) / jnp.linalg.norm(across)
    axes = jnp.stack([delta, across]) / (delta @ delta)
    cdf = jnp.cumsum(loglinear.exact(prompts, theta).probabilities, -1)

    def chunk_means(key):
        u = jax.random.uniform(key, (len(cdf), c.chunk, group))
        y = (u[..., None] > cdf[:, None, None, :-1]).sum(-1)
        rewards = (y == 0).astype(float).reshape(-1, group)
        a = gj.whitened_advantages(rewards, eps=0.0).reshape(y.shape)
        along = (prompts.features[0] @ axes.T)[y]  # [P, chunk, G, 2]
        return (a[..., None] * along).mean((1, 2))

    keys = jax.random.split(key, c.sampled_groups // c.chunk)
    return jax.lax.map(chunk_means, keys)


def weight_row(c: Config, prompts: LogLinear, group: int) -> dict:
    """The weights of one group size over REINFORCE's, sigma^2."""
    p, fine = np.array(c.pass_rates), np.geomspace(1e-5, 0.5, 2000)

    def relative(p):
        return np.asarray(gj.expected_group_std(p, group)) / (p * (1 - p))

    key = jax.random.fold_in(jax.random.key(0), group)
    chunks = np.asarray(sampled_gradients(c, prompts, group, key))
    chunks = chunks / (p * (1 - p))[:, None]
    mean, se = chunks.mean(0), chunks.std(0, ddof=1) / np.sqrt(len(chunks))
    z = (mean - np.stack([relative(p), 0 * p], 1)) / se
    counted = weights_over_counts(p, group)
    ddof = weights_over_counts(p, group, ddof=1) / counted
    curve = relative(fine)
    below_half = fine[curve * np.sqrt(fine * (1 - fine)) < 0.5]
    saturated, middle = relative(np.array([1e-9, 0.5]))
    eps_loss = {
        str(eps): float((1 - weights_over_counts(p, group, eps=eps) / counted).max())
        for eps in c.epsilons
    }
    return {
        "kind": "weight",
        "group_size": group,
        "pass_rates": p.tolist(),
        "expected": relative(p).tolist(),
        "measured": mean[:, 0].tolist(),
        "se": se[:, 0].tolist(),
        "chi2": (z**2).sum(0).tolist(),  # along Delta, across it
        "counted_error": float(abs(counted / p / (1 - p) / relative(p) - 1).max()),
        "ddof_1_over_0": [float(ddof.min()), float(ddof.max())],
        "eps_loss": eps_loss,  # largest relative change
        "half_of_ideal": float(below_half[-1]),  # up to this pass rate
        "saturation": float(saturated),  # as p goes to 0
        "amplification": float(saturated / middle),  # against p = 1/2
        "curve": [fine[19::20].tolist(), curve[19::20].tolist()],
    }


def weight_rows(c: Config) -> Iterator[dict]:
    prompts = make_prompts(c)
    for group in c.enumerated:
        yield {"kind": "enumerated"} | enumerate_groups(c, prompts, group)
    for group in c.group_sizes:
        yield weight_row(c, prompts, group)


# ---- training


def make_policy(c: Config, seed: int) -> LogLinear:
    """Prompts that share no parameter: theta is [P, block], so no interference."""
    n, k = c.num_prompts, c.train_responses
    x = unit_features(np.random.default_rng(seed), (n, k, c.block))
    offsets = offsets_for(np.geomspace(*c.train_pass_rates, n), k)
    return LogLinear(x, first_is_right(n, k), offsets)


def advantages(method: str, rewards: jax.Array, sigma: jax.Array) -> jax.Array:
    """Advantages [B, G] of rewards [B, G]; sigma [B] is each prompt's true one."""
    if method == "std":
        return gj.whitened_advantages(rewards, eps=0.0)
    if method == "reinforce":
        return gj.leave_one_out_advantages(rewards)
    if method == "sigma":
        return gj.leave_one_out_advantages(rewards) / sigma[:, None]
    raise ValueError(f"method must be one of {METHODS}, got {method}.")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def train(
    c: Config,
    method: str,
    group: int,
    policies: LogLinear,
    sizes: np.ndarray,
    keys: jax.Array,
) -> jax.Array:
    """Pass rates [E, S, P] after training each of S policies at E step sizes."""
    batch = c.samples // group
    pass_rates = jax.vmap(
        lambda x, r, o, theta: loglinear.exact(
            LogLinear(x[None], r[None], o[None]), theta
        ).pass_rates[0]
    )

    def run(size, policy, key):
        def one(theta, key):
            key_x, key_y = jax.random.split(key)
            x = jax.random.permutation(key_x, c.num_prompts)[:batch]
            features, rewards, offsets = (a[x] for a in policy)
            logits = jnp.einsum("bkd,bd->bk", features, theta[x]) + offsets
            y = jax.random.categorical(key_y, logits, shape=(group, batch)).T
            p = (jax.nn.softmax(logits) * rewards).sum(-1)
            sigma = jnp.sqrt(jnp.maximum(p * (1 - p), 1e-30))
            a = advantages(method, jnp.take_along_axis(rewards, y, 1), sigma)
            chosen = jax.nn.one_hot(y, c.train_responses)
            # The advantages of a group sum to 0, so the mean score drops out.
            gradient = jnp.einsum("bg,bgk,bkd->bd", a, chosen, features) / group
            return theta.at[x].add(size * gradient), None

        theta = jnp.zeros((c.num_prompts, c.block))
        theta, _ = jax.lax.scan(one, theta, jax.random.split(key, c.steps))
        return pass_rates(*policy, theta)

    return jax.vmap(jax.vmap(run, (None, 0, 0)), (0, None, None))(sizes, policies, keys)


def training_rows(c: Config) -> Iterator[dict]:
    log2 = np.arange(c.log2_step[0], c.log2_step[1] + 0.25, 0.5)
    sizes = 2.0 ** np.append(log2, c.huge_log2_step)
    seeds, test = c.tuning_seeds + c.test_seeds, slice(c.tuning_seeds, None)
    policies = stacked([make_policy(c, seed) for seed in range(seeds)])
    hard = np.geomspace(*c.train_pass_rates, c.num_prompts) < c.hard
    for group in c.train_group_sizes:
        keys = jax.random.split(jax.random.key(group), seeds)
        row = {"kind": "training", "group_size": group}
        finals, every = {}, {}
        for method in METHODS:
            every[method] = np.asarray(train(c, method, group, policies, sizes, keys))
            means = every[method].mean(-1)
            best, finals[method] = tune_then_test(means[:-1], c.tuning_seeds)
            row[method] = t_interval(finals[method])
            of_hard = every[method][best, test][:, hard].mean(1)
            row[f"{method}_hard"] = t_interval(of_hard)
            row[f"{method}_huge"] = t_interval(means[-1, test])
            row[f"{method}_log2_step"] = float(log2[best])
        for method in METHODS[1:]:
            gain = paired_gain(finals[method], finals["reinforce"])
            row[f"{method}_less_reinforce"] = gain
        # The same seeds, REINFORCE with steps sqrt(G - 1) times larger.
        same = math.sqrt(group - 1) * sizes
        rescaled = np.asarray(train(c, "reinforce", group, policies, same, keys))
        row["rescaled_difference"] = float(abs(every["std"] - rescaled)[:-1].max())
        yield row


def plot(results: Path) -> None:
    plt.switch_backend("Agg")
    rows = read_lines(results / "metrics.jsonl")
    weights = [r for r in rows if r["kind"] == "weight"]
    training = [r for r in rows if r["kind"] == "training"]
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    weight, ideal, final, gain = axes.ravel()
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(weights)))
    for row, color in zip(weights, colors, strict=True):
        p, curve = map(np.array, row["curve"])
        line = dict(color=color, label=f"G = {row['group_size']}")
        weight.plot(p, curve, lw=1.5, **line)
        ideal.plot(p, curve * np.sqrt(p * (1 - p)), lw=1.5, **line)
        at, measured, se = (np.array(row[k]) for k in ("pass_rates", "measured", "se"))
        shown = at <= 0.5
        dots = dict(fmt=".", color=color, capsize=2)
        weight.errorbar(at[shown], measured[shown], 1.96 * se[shown], **dots)
    weight.plot(p, 1 / np.sqrt(p * (1 - p)), "k--", lw=1, label="1 / sigma")
    weight.set(title="Effective weight over REINFORCE's; points: sampled, 95%")
    weight.set(yscale="log", ylabel="E[std of G rewards] / sigma^2", ylim=(0.8, 40))
    ideal.set(title="Share of the ideal that a group's std delivers", ylim=(0, 1.05))
    ideal.set(ylabel="E[std of G rewards] / sigma")
    for axis in (weight, ideal):
        axis.set(xscale="log", xlabel="pass rate p", xlim=(1e-5, 0.6))
    sizes = [r["group_size"] for r in training]
    for i, method in enumerate(METHODS):
        label = {"sigma": "true 1 / sigma"}.get(method, method)
        line = dict(color=f"C{i}", capsize=3, lw=1.2)
        x = np.array(sizes) * 1.04 ** (i - 1)
        mean, half = np.transpose([r[method] for r in training])
        final.errorbar(x, mean, half, fmt=".-", label=label, **line)
        if i:
            mean, half = np.transpose([r[f"{method}_less_reinforce"] for r in training])
            gain.errorbar(x, mean, half, fmt=".-", label=label, **line)
    gain.axhline(0, color="k", lw=0.8)
    final.set(title="Training at fixed samples, tuned steps", ylabel="mean pass rate")
    gain.set(title="Paired gain over REINFORCE, 95%", ylabel="difference of pass rates")
    for axis in (final, gain):
        axis.set(xscale="log", xlabel="group size G", xticks=sizes, xticklabels=sizes)
        axis.minorticks_off()
    for axis in axes.ravel():
        axis.grid(alpha=0.3)
        axis.legend(loc="best", frameon=False, fontsize=9)
    figure.savefig(results / "plot.png", dpi=110)
    plt.close(figure)


def main(c: Config) -> None:
    if c.smoke:
        few = dict(group_sizes=(2, 3, 16), enumerated=(2, 3, 4), sampled_groups=20_000)
        few |= dict(chunk=2000, pass_rates=(0.03, 0.5), train_group_sizes=(2, 3, 16))
        few |= dict(steps=30, log2_step=(3, 5), tuning_seeds=2, test_seeds=3)
        c = dataclasses.replace(c, **few)
    if any(
        c.samples % g or c.samples // g > c.num_prompts for g in c.train_group_sizes
    ):
        raise ValueError(
            "train_group_sizes must split samples into at most num_prompts groups, "
            f"got {c.train_group_sizes}, {c.samples}, {c.num_prompts}; change one."
        )
    if not c.plot_only:
        write_config(c.results, c)
        with jax.enable_x64(True):
            rows = itertools.chain(weight_rows(c), training_rows(c))
            write_rows(c.results / "metrics.jsonl", rows)
    plot(c.results)


if __name__ == "__main__":
    main(tyro.cli(Config))
