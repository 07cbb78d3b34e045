"""PyTorch as scripts/gpu_peer.py uses it, with shapes alone: what does not fit together is an error, and everything takes a millisecond."""

import os
import types

__version__ = "2.11.0+stand.in"
version = types.SimpleNamespace(cuda="13.0")
bfloat16 = "bfloat16"


class Tensor:
    def __init__(self, shape):
        self.shape = tuple(shape)

    def t(self):
        return Tensor(self.shape[::-1])


def randn(shape, *, device, dtype, requires_grad=False):
    assert device == "cuda" and dtype == bfloat16 and all(n > 0 for n in shape), shape
    return Tensor(shape)


def randn_like(x):
    return Tensor(x.shape)


def matmul(a, b):
    assert len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0], f"{a.shape} by {b.shape}"
    return Tensor((a.shape[0], b.shape[1]))


def scaled_dot_product_attention(q, k, v, is_causal, enable_gqa):
    assert is_causal and k.shape == v.shape and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:]), (q.shape, k.shape)
    assert q.shape[1] % k.shape[1] == 0 and enable_gqa == (q.shape[1] != k.shape[1]), (q.shape, k.shape)
    return Tensor(q.shape)


def grad(out, inputs, gradient, retain_graph):
    assert out.shape == gradient.shape and retain_graph and len(inputs) == 3
    return inputs


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def elapsed_time(self, end):
        return 1.0


cuda = types.SimpleNamespace(
    is_available=lambda: "blind" not in os.environ.get("STAND_IN", ""),
    get_device_name=lambda: "NVIDIA H200",
    synchronize=lambda: None,
    Event=Event,
)
nn = types.SimpleNamespace(functional=types.SimpleNamespace(scaled_dot_product_attention=scaled_dot_product_attention))
autograd = types.SimpleNamespace(grad=grad)
