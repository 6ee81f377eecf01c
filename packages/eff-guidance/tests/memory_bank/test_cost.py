"""What the repulsion costs beside blocks of SiT-B/2's size at a batch of 256, counted on tensors without data."""

import torch
from eff_guidance.memory_bank import bank_repulsion_loss
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that comes out of any operation."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = () if func is torch.ops.aten.detach.default else out  # which is the bank itself
        for t in made if isinstance(made, tuple | list) else (made,):
            if isinstance(t, torch.Tensor):
                self.found = max(self.found, t.numel() * t.element_size())
        return out


def test_under_two_percent_of_a_step_and_memory_of_bank_and_chunk():
    batch, tokens, width, depth, size, dim = 256, 256, 768, 12, 65_536, 128
    # Products with the weights of the blocks alone (12 width^2 each), forward and twice as much backward.
    step = 3 * 2 * batch * tokens * depth * 12 * width**2
    head = 3 * 2 * batch * (width * width + width * dim)
    with FakeTensorMode():
        z = torch.zeros(batch, dim, requires_grad=True)
        bank, valid = torch.zeros(size, dim, dtype=torch.bfloat16), torch.ones(size, dtype=torch.bool)
        with FlopCounterMode(display=False) as added, Largest() as largest:
            bank_repulsion_loss(z, bank, valid=valid).backward()
    assert 2 * batch * size * dim < added.get_total_flops() < 0.02 * step - head
    assert 0 < largest.found <= batch * 8192 * 4  # a chunk of scores; all of them would be 67 MB
