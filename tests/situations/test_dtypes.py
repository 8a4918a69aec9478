"""A dtype that parameters cannot have is an error when it is asked for, not another dtype, nor a file that cannot be read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mijax as mj
from tests.reference.tiny_models import STORED
from tests.situations import refused
from tests.situations.models import CONFIG, model

pytestmark = pytest.mark.usefixtures("as_a_user")
WRONG = ["int32", bool, "complex64", jnp.float8_e4m3fn, "float8_e5m2", np.longdouble, None, "float33", object]


@pytest.mark.parametrize("dtype", WRONG, ids=str)
def test_load_another_dtype(dtype):
    with refused(TypeError, "dtype must be one of float64, float32, float16, bfloat16, given"):
        mj.load(STORED / "gpt2", dtype=dtype)


@pytest.mark.parametrize("dtype", ["float64", float, np.float64], ids=str)
def test_load_float64_of_which_jax_makes_float32(dtype):
    with refused(ValueError, r"dtype float64 needs jax.config.update\(.jax_enable_x64., True\)"):
        mj.load(STORED / "gpt2", dtype=dtype)
    with jax.enable_x64(True):
        assert {x.dtype.name for x in jax.tree.leaves(mj.load(STORED / "gpt2", dtype=dtype)[0])} == {"float64"}


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_save_what_load_does_not_read(dtype, tmp_path):
    small = jax.tree.map(lambda x: x.astype(dtype), model(CONFIG))
    with refused(ValueError, f"W_E has dtype {jnp.dtype(dtype).name}, expected float64, float32, float16, bfloat16"):
        mj.save(small, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_save_numbers_of_another_byte_order(tmp_path):
    other = jax.tree.map(lambda x: np.asarray(x).astype(">f4"), model(CONFIG))
    mj.save(other, tmp_path / "saved")
    same = jax.tree.map(lambda x, y: bool((np.asarray(x) == y).all()), mj.load(tmp_path / "saved")[0], other)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("dtype", WRONG, ids=str)
def test_make_a_model_of_another_dtype(dtype):
    with refused(TypeError, "dtype must be one of float64, float32, float16, bfloat16, given"):
        mj.init(CONFIG, jax.random.key(0), dtype)


def test_make_a_model_of_float64_of_which_jax_makes_float32():
    with refused(ValueError, "dtype float64 needs"):
        mj.init(CONFIG, jax.random.key(0), "float64")


@pytest.mark.parametrize("key", [0, np.int32(0), None, jax.random.split(jax.random.key(0))], ids=str)
def test_make_a_model_without_a_random_key(key):
    with refused(TypeError, r"key must be one random key, jax.random.key\(0\) say, given"):
        mj.init(CONFIG, key)
