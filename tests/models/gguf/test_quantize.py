"""K-quants by llama.cpp, with a stand-in for its binding: `make test-gguf` has the real one."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest

from yrunner.errors import ModelError
from yrunner.models.gguf.quantize import quantize, stored_types

STAND_IN = """
import ctypes, shutil, sys, time
from types import SimpleNamespace
LLAMA_FTYPE_MOSTLY_Q4_K_M, LLAMA_FTYPE_MOSTLY_Q6_K, LLAMA_FTYPE_MOSTLY_Q5_K_M = 15, 18, 17
said = None
class Parameters(ctypes.Structure):
    _fields_ = [("ftype", ctypes.c_int), ("nthread", ctypes.c_int)]
def llama_log_callback(function):
    return function
def llama_log_set(callback, _data):
    global said
    said = callback
def llama_model_quantize_default_params():
    return Parameters(0, 0)
def llama_model_quantize(source, target, parameters):
    chosen = parameters._obj
    for number in (1, 2):
        said(2, f"[{number:4}/   2] blk.{number}.attn_q.weight, type = f16\\n".encode(), None)
    if chosen.ftype == LLAMA_FTYPE_MOSTLY_Q6_K:
        said(4, b"llama_model_quantize: failed to quantize: no such tensor\\n", None)
        return 1
    if chosen.ftype == LLAMA_FTYPE_MOSTLY_Q5_K_M:
        time.sleep(60)
    with open(target, "wb") as file:
        file.write(open(source, "rb").read() + f" {chosen.ftype} {chosen.nthread}".encode())
    return 0
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Its types: q4_k_m works, q6_k fails, q5_k_m takes a minute."""
    package = tmp_path / "packages" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "llama_cpp.py").write_text(STAND_IN)
    before = os.environ.get("PYTHONPATH", "")
    root = Path(__file__).parents[3]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), str(root), before]))
    (tmp_path / "source").write_bytes(b"weights")
    return tmp_path


def test_llama_cpp_is_given_type_and_threads_and_reports_every_weight(stand_in):
    done = []
    quantize(stand_in / "source", stand_in / "target", "q4_k_m", threads=3, advance=done.append)
    assert (stand_in / "target").read_bytes() == b"weights 15 3"
    assert done == [1, 1]


def test_what_llama_cpp_says_of_a_failure_is_shown(stand_in):
    with pytest.raises(ModelError, match=r"not quantize to q6_k \(.*no such tensor\)\. Choose"):
        quantize(
            stand_in / "source", stand_in / "target", "q6_k", threads=1, advance=lambda _: None
        )


def test_an_interruption_leaves_no_process(stand_in):
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(stand_in / "source", stand_in / "target", "q5_k_m", threads=1, advance=interrupt)
    mine = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(stand_in / "target") not in mine


def tensor(kind, *shape):
    """As gguf's reader has it: the width of the rows comes first."""
    return SimpleNamespace(shape=shape, tensor_type=gguf.GGMLQuantizationType[kind])


def test_rows_that_k_quants_cannot_hold_are_counted_and_named():
    types = stored_types(
        {
            "blk.0.attn_q.weight": tensor("Q5_0", 576, 576),
            "blk.0.attn_v.weight": tensor("Q8_0", 576, 192),
            "blk.1.attn_q.weight": tensor("Q5_0", 576, 576),
            "blk.0.ffn_down.weight": tensor("Q6_K", 1536, 576),
            "blk.0.ffn_gate_inp.weight": tensor("F32", 576, 4),
            "blk.0.attn_norm.weight": tensor("F32", 576),
        }
    )
    assert types.matrices == {"Q5_0": 2, "Q8_0": 1, "Q6_K": 1, "F32": 1}
    assert types.fallback == {
        "Q5_0": ["blk.0.attn_q.weight", "blk.1.attn_q.weight"],
        "Q8_0": ["blk.0.attn_v.weight"],
    }
    assert types.fallback_in_words() == (
        "K-quants need rows of a multiple of 256 numbers; 3 of 5 matrices have rows of 576, and "
        "llama.cpp stores them in other types: 2 in Q5_0, 1 in Q8_0, such as blk.0.attn_q.weight"
    )
    assert stored_types({"a": tensor("Q4_K", 512, 8)}).fallback_in_words() == ""
