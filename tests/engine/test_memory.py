"""What is asked of the machine's memory, beside what sweeps and attribution plan themselves."""

import sys

import jax
import pytest

from mijax import memory


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heaps")
def test_the_compilers_memory_is_freed_once_for_each_compilation_inside(monkeypatch):
    calls = []

    class Library:
        malloc_trim = staticmethod(calls.append)

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Library)
    monkeypatch.setattr(memory, "SLOW", 0.0)
    program = jax.jit(lambda x: x + 1)
    three, four = jax.numpy.zeros(3), jax.numpy.zeros(4)
    with memory.compiler_memory_freed():
        program(three)
        assert calls == [0]
        program(three)
        assert calls == [0]
    program(four)
    assert calls == [0]


def test_a_c_library_that_cannot_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    with memory.compiler_memory_freed():
        assert int(jax.jit(lambda x: x + 2)(1)) == 3
