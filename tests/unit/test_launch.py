"""The recipes of experiments/launch: one command, of flags that exist."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from grpo_jax.runs.config import TrainConfig

yaml = pytest.importorskip("yaml")

LAUNCH = Path(__file__).parents[2] / "experiments" / "launch"
RECIPES = ("slurm.sh", "tpu_pod.sh", "kubernetes.yaml", "two_processes.sh")


def text_of(name):
    text = (LAUNCH / name).read_text()
    if not name.endswith(".yaml"):
        return text
    documents = list(yaml.safe_load_all(text))
    assert [d["kind"] for d in documents] == ["Service", "Job"]
    return documents[1]["spec"]["template"]["spec"]["containers"][0]["args"][0]


def command(name):
    """The words of a recipe's `grpo-jax train`, its variables not expanded."""
    lines = text_of(name).replace("\\\n", " ").splitlines()
    commands = [line for line in lines if re.match(r"\s*(exec )?grpo-jax train", line)]
    (line,) = commands or [x for x in lines if x.startswith("srun")]
    words = shlex.split(line.rstrip(" &"))
    return words[words.index("grpo-jax") :]


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_command_in_every_recipe(name):
    words = command(name)
    assert words[-2:] == ["${resume[@]}", "$@"]
    flags = dict(zip(words[2:-2:2], words[3:-2:2], strict=True))
    addresses = {k: v for k, v in flags.items() if k.startswith("--distributed.")}
    expected = {
        "--run-dir": "$RUN", "--mesh.data": "2", "--mesh.fsdp": "4",
        "--mesh.tensor": "1",
    }  # fmt: skip
    rest = {k: v for k, v in flags.items() if k not in addresses}
    assert rest == expected
    needs_addresses = name in ("kubernetes.yaml", "two_processes.sh")
    assert len(addresses) == (3 if needs_addresses else 0)


@pytest.mark.parametrize("name", RECIPES)
def test_every_flag_exists(name):
    values = {"$process": "1", "$JOB_COMPLETION_INDEX": "1", "${resume[@]}": "--resume"}
    words = [values.get(word, word) for word in command(name)[2:] if word != "$@"]
    config = tyro.cli(TrainConfig, args=words)
    assert config.resume and config.run_dir == "$RUN"
    mesh = config.mesh
    assert mesh.data * mesh.fsdp * mesh.tensor == 8
    if config.distributed.processes is not None:
        assert config.distributed.process == 1


def test_the_job_finds_its_first_pod():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    host, port = command("kubernetes.yaml")[
        command("kubernetes.yaml").index("--distributed.coordinator") + 1
    ].split(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(port) == service["spec"]["ports"][0]["port"]
    count = command("kubernetes.yaml").index("--distributed.processes") + 1
    assert int(command("kubernetes.yaml")[count]) == spec["completions"]
    assert spec["parallelism"] == spec["completions"]
