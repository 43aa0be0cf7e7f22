"""Optional: weights in four bits, as the published AWQ checkpoints hold them. This file stands outside the
evening's reading order: nothing else asks for having read it.

In place of each of a decoder layer's seven matrices a checkpoint holds three tensors: `qweight` and `qzeros`,
numbers from 0 to 15, eight to an int32, and `scales`. From input channel k to output channel n the weight is

    weight[n, k] = (q[k, n] - zero[k // 128, n]) * scale[k // 128, n]

Read from the top: packed numbers, a layer that computes this as it stands, the same by torch's kernel, and
what puts them into a model. Embedding, head, norms and the vision tower stay as they are.

Source: AWQ (arXiv 2306.00978), in AutoAWQ's file format, version "gemm". docs/cards.md has the picture.

Shapes: K input channels, N output channels, G = K / 128 groups.
"""

from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 128                             # neighboring weights of an output channel share a scale and a zero
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)       # of an int32's eight numbers, lowest bits first: where is 0, 1, ...


def unpack(words: Tensor) -> Tensor:
    """The numbers from 0 to 15 that int32s (rows, N / 8) hold, in order: (rows, N) uint8."""
    pairs = words.view(torch.uint8)                                 # bytes, lowest first: (rows, N / 2)
    numbers = torch.stack((pairs & 15, pairs >> 4), dim=-1)         # (rows, N / 2, 2)
    eights = numbers.view(len(words), -1, 8)
    return eights[:, :, PLACES].flatten(1)


class Int4Linear(nn.Module):
    """nn.Linear with the tensors of a file, its weight made anew in each call: to read, and to check against.

    Its tensors are named and shaped as in the file, so that loading is as strict as for any other layer.
    """

    def __init__(self, like: nn.Linear):
        super().__init__()
        K = like.in_features
        N = like.out_features
        if K % GROUP or N % 8:
            raise ValueError(f"a matrix of {K} x {N}: four-bit weights come in groups of {GROUP} x 8; use "
                             "fewer ranks, or a checkpoint that is not quantized")

        # Input channels come first, the other way round than in nn.Linear.
        G = K // GROUP
        self.register_buffer("qweight", torch.empty(K, N // 8, dtype=torch.int32))
        self.register_buffer("qzeros", torch.empty(G, N // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.empty(G, N))
        self.bias = like.bias

    def weight(self) -> Tensor:
        """The matrix (N, K) that the tensors stand for."""
        q = unpack(self.qweight).unflatten(0, (-1, GROUP))      # (G, 128, N)
        zeros = unpack(self.qzeros)[:, None]                    # (G, 1, N)
        scales = self.scales[:, None]
        return ((q.to(scales.dtype) - zeros) * scales).flatten(0, 1).T

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.bias)


class PackedLinear(nn.Module):
    """The same by torch's kernel, which unpacks in registers: a token reads half a byte for a weight.

    The kernel's weight is (q - 8) * scale + shift, which is the same with shift = (8 - zero) * scale, and it
    wants q in an order of its own. Its names are private to torch, and the same since torch 2.5. On CUDA this
    has not run yet.
    """

    def __init__(self, linear: Int4Linear):
        super().__init__()
        self.bias = linear.bias

        # Scale and shift side by side: (G, N, 2).
        scales = linear.scales
        shifts = (8 - unpack(linear.qzeros).float()) * scales
        self.register_buffer("pairs", torch.stack((scales, shifts.to(scales.dtype)), dim=-1))

        # On CUDA a byte holds two numbers, the even input channel in its upper half.
        q = unpack(linear.qweight).T.contiguous()                                       # (N, K)
        if q.device.type == "cpu":
            self.multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
        else:
            self.multiply = torch.ops.aten._weight_int4pack_mm
            halves = q[:, ::2] << 4 | q[:, 1::2]
            packed = torch.ops.aten._convert_weight_to_int4pack(halves, 8)
        self.register_buffer("packed", packed)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)         # the kernel knows no batches
        y = self.multiply(rows, self.packed, GROUP, self.pairs).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def has_kernel(linear: Int4Linear) -> bool:
    """Whether torch's kernel takes this layer, on its device and in its dtype."""
    scales = linear.scales
    if scales.device.type == "cpu":
        return scales.shape[1] % 16 == 0
    if scales.device.type != "cuda" or scales.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(scales.device) >= (8, 0)


# ---------------------------------------------------------------------------- in a model

def as_published(model: nn.Module, names: Container[str]) -> None:
    """An Int4Linear on the meta device in place of every decoder matrix of which `names` has a .qweight."""
    for path, module in list(model.named_modules()):
        in_decoder = isinstance(module, nn.Linear) and path.startswith("model.layers.")
        if in_decoder and f"{path}.qweight" in names:
            with torch.device("meta"):
                model.set_submodule(path, Int4Linear(module))


def pack(model: nn.Module) -> None:
    """A PackedLinear in place of every Int4Linear, where torch has a kernel for it."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Int4Linear) and has_kernel(module):
            model.set_submodule(path, PackedLinear(module))
