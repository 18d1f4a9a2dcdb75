"""`grpo-jax plan` where not even one completion fits on a device."""

import dataclasses

import pytest

from grpo_jax import ModelConfig
from grpo_jax.planning.forecast import forecast_text
from grpo_jax.planning.memory import MemoryInputs
from grpo_jax.planning.remedies import changes, remedies, too_long
from grpo_jax.runs.config import MeshConfig

MODEL = ModelConfig(
    vocab_size=32_000, num_layers=4, width=512, mlp_width=1024, num_heads=8,
    num_kv_heads=4, head_dim=64, compute_dtype="bfloat16", remat="full",
)  # fmt: skip
LONG = MemoryInputs(
    model=MODEL, prompts=8, group_size=8, prompt_tokens=128, max_new_tokens=32_768,
    micro_batch_tokens=32_768, mesh=MeshConfig(data=4, fsdp=2),
)  # fmt: skip


def needs(x):
    return x.estimate().state + x.estimate().phases()["update"]


def test_nothing_to_say_where_one_completion_fits():
    assert too_long(LONG, needs(LONG)) is None


def test_nothing_to_say_where_the_parameters_do_not_fit():
    assert too_long(LONG, LONG.estimate().state) is None


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(fsdp=8)])
def test_more_devices_along_data_or_fsdp_do_not_help(mesh):
    limit = round(needs(LONG) * 0.6)
    text = too_long(dataclasses.replace(LONG, mesh=mesh), limit)
    assert "one completion of 32,768 tokens needs" in text
    assert "no mesh.data or mesh.fsdp splits a completion" in text


def test_what_it_names_helps():
    limit = round(needs(LONG) * 0.7)
    text = too_long(LONG, limit)
    assert "mesh.tensor 2 or sampling.max_new_tokens 16384" in text
    wider = dataclasses.replace(LONG, mesh=MeshConfig(data=4, fsdp=2, tensor=2))
    shorter = dataclasses.replace(LONG, max_new_tokens=16_384)
    assert needs(wider) <= limit and needs(shorter) <= limit
    # A smaller micro-batch is no remedy: it is one completion already.
    assert not any("micro_batch_tokens" in text for text in remedies(LONG, limit))


def test_a_reference_may_move_to_the_host():
    """If there is one, on the devices, and apart from the base of LoRA's factors."""
    inputs = dataclasses.replace(LONG, reference=True)
    host = dataclasses.replace(inputs, reference_memory="host")
    limit = host.estimate().peak
    assert limit < inputs.estimate().peak
    assert "reference_memory host" in remedies(inputs, limit)
    lora = dataclasses.replace(inputs, model=dataclasses.replace(MODEL, lora_rank=4))
    for others in (LONG, host, lora):
        assert not changes(others)["reference_memory"]
    # What `train` refuses together with it is no remedy.
    assert not changes(host)["objective.kl_coef"] + changes(host)["model.lora_rank"]


def test_it_names_recomputation_where_that_is_off():
    model = dataclasses.replace(MODEL, remat="none")
    text = too_long(dataclasses.replace(LONG, model=model), needs(LONG))
    assert text.endswith("model.remat full")


def test_the_plan_says_it_before_its_remedies():
    memory = {
        "bytes": LONG.estimate()._asdict(), "held": 0, "phases": {}, "peak": 2,
        "peak_in": "update", "device": 1, "share_of_device": 2.0, "fits": False,
        "completion": "too long", "advice": ["shorter"],
    }  # fmt: skip
    step = dict(
        micro_batches={}, prompts=1, group_size=1, completions=1, tokens=1,
        trained_prompt_bucket=1, completion_buckets=[], steps=1, updates=1,
    )  # fmt: skip
    result = {"run": "", "warnings": [], "memory": memory, "step": step}
    result["instrument"] = None
    result["informative"] = {"group_size": 1, "examples": {"0.5": {"1": 0.0}}}
    lines = forecast_text(result).splitlines()
    at = lines.index("  too long")
    assert "does not fit" in lines[at + 1] and lines[at + 2] == "    shorter"
