"""What the comparison of speeds counts, and that a measured row is not run again."""

import json

import numpy as np
import pytest

import grpo_jax as gj
from experiments.benchmarks import real_model
from grpo_jax.models.config import num_parameters


@pytest.fixture
def config(tmp_path):
    """Of a tied model with 3 layers; no weights."""
    fields = dict(hidden_size=12, intermediate_size=20, num_hidden_layers=3)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=6)
    facts = fields | heads | dict(vocab_size=31)
    (tmp_path / "config.json").write_text(json.dumps(facts))
    return real_model.Config(tmp_path, output=tmp_path / "results", rounds=1)


def test_products_are_those_of_every_weight(config):
    maps, layers, head = real_model.model_maps(config.model)
    model = gj.ModelConfig(
        vocab_size=31, width=12, mlp_width=20, num_layers=3, num_heads=4,
        num_kv_heads=2, head_dim=6,
    )  # fmt: skip
    norms = (2 * 3 + 1) * 12
    for backward, each in ((False, 2), (True, 6)):
        products = real_model.Products(7, 7, backward)
        flop = products.flop(maps, layers, head[0] * head[1])
        assert flop == each * 7 * (num_parameters(model) - norms)


def test_a_rate_is_of_the_shapes_that_were_multiplied(config, monkeypatch):
    """Each call takes a second; one call a layer, and one of the unembedding."""
    seen = []
    monkeypatch.setattr(
        real_model.Used, "now", lambda: real_model.Used(0.0, float(len(seen)))
    )

    def multiply(xs, ws, backward):
        seen.append([(x @ w).shape for x, w in zip(xs, ws, strict=True)])

    products = real_model.Products(7, 2, False)
    found = real_model.rate(config.model, products, multiply, np.asarray)
    maps, layers, head = real_model.model_maps(config.model)
    assert seen[:4] == [[(7, b) for _, b in maps]] * 3 + [[(2, 31)]]
    assert found == products.flop(maps, layers, head[0] * head[1]) / 4


def test_a_measured_row_is_not_run_again(config, monkeypatch, capsys):
    asked = []

    def run(c, program):
        asked.append(program)
        used = real_model.Used(2.0, 4.0)
        products = real_model.Products(32, 32, False)
        steps = [real_model.Step(used, used)]
        both = {"sample": products, "update": products}
        rates = {"sample": 1e9, "update": 1e9}
        return real_model.row_of(program, real_model.Measured(steps, both, rates, {}))

    monkeypatch.setattr(real_model, "run_apart", run)
    real_model.main(config)
    real_model.main(config)
    assert asked == ["ours", "transformers", "trl"]
    [*_, line] = capsys.readouterr().out.splitlines()
    # 1,024 tokens, sampled in 2 s of a step of 4 s.
    assert line.startswith("| trl | 512 | 4.0 | 1 |") and line.endswith("| 256 |")
