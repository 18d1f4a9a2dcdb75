import jax
import numpy as np
import pytest

from grpo_jax.diagnostics.cosines import cosine_statistics


# Pairs (0.5, -0.05, 0.15): mean 0.2, mean of |cos| 0.7/3, two of three positive.
def test_cosine_statistics():
    cosines = np.float32([[1, 0.5, -0.05], [0.5, 1, 0.15], [-0.05, 0.15, 1]])
    statistics = jax.jit(cosine_statistics)(cosines)
    np.testing.assert_allclose(statistics.mean, 0.2, rtol=1e-5)
    np.testing.assert_allclose(statistics.std, np.std([0.5, -0.05, 0.15]), rtol=1e-5)
    np.testing.assert_allclose(statistics.mean_abs, 0.7 / 3, rtol=1e-5)
    np.testing.assert_allclose(statistics.positive_fraction, 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(statistics.small_fraction, 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4,)])
def test_cosines_must_be_square_and_of_two_prompts(shape):
    with pytest.raises(ValueError, match=r"cosines must be \[P >= 2, P\], got \("):
        cosine_statistics(np.zeros(shape, np.float32))
