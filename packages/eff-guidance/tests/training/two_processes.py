"""What two processes do together; run by test_two_processes.py with torchrun's environment variables."""

import gc
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from eff_guidance.alignment import HolisticAlignment, HolisticAlignmentConfig, TeacherTargets
from eff_guidance.memory_bank import RepulsiveAlignment, RepulsorConfig
from eff_guidance.training import FixedStepTrigger, GradientAngleTrigger
from torch import nn

WIDTH, TOKENS = 8, 4


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x).sin()


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def same(tensor):
    """Whether all processes hold the same numbers."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return all(torch.equal(parts[0], p) for p in parts)


def data(samples, seed=0):
    """Inputs, features, queries and keys of some samples of eight."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(8, TOKENS, WIDTH, generator=draw)
    y = torch.randn(8, TOKENS, 6, generator=draw)
    q, k = torch.randn(2, 8, 2, TOKENS, 4, generator=draw)
    return x[samples], TeacherTargets(y[samples], (q[samples],), (k[samples],), (0.5,), (2, 2))


CONFIG = HolisticAlignmentConfig(feature_layer=1, attention_pairs=((1, 0),), heads=2, teacher_dim=6, projector_dim=5)


def gradients(model, extra, samples, loss):
    """Gradients of the student and of the auxiliary's own weights, after one backward pass."""
    x, targets = data(samples)
    (model(x).square().mean() + loss(targets)).backward()
    extra.sync_gradients()
    inner = getattr(model, "module", model)
    return [p.grad.clone() for p in (*inner.parameters(), *extra.parameters())]


def alignment_is_that_of_one_process(rank):
    torch.manual_seed(1)
    student = nn.parallel.DistributedDataParallel(Student())
    aligned = HolisticAlignment(student, None, CONFIG, trigger=FixedStepTrigger(1))
    found = gradients(student, aligned, slice(4 * rank, 4 * rank + 4), lambda t: aligned.losses(targets=t).total)
    torch.manual_seed(1)
    alone = Student()
    reference = HolisticAlignment(alone, None, CONFIG)
    x, targets = data(slice(None))
    (alone(x).square().mean() + reference.losses(targets=targets).total).backward()
    wanted = [p.grad for p in (*alone.parameters(), *reference.parameters())]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))
    assert all(same(g) for g in found)
    # After the end nobody waits for gradients of the projector.
    assert not aligned.update(1)
    for _ in range(2):
        (student(x).square().mean() + aligned.losses().total).backward()
        aligned.sync_gradients()


def the_angle_stops_all_at_once(rank):
    """One process alone would go on, the other would stop; the mean stops both."""
    p = torch.ones(2, requires_grad=True)
    trigger = GradientAngleTrigger([p], start=0, timesteps=(0.5,), threshold=0.0)
    angle = 0.2 if rank == 0 else -0.6
    fired = trigger.update(0, lambda t: (p[0], angle * p[0] + (1 - angle**2) ** 0.5 * p[1]))
    assert fired
    assert abs(trigger.history[0][1] + 0.2) < 1e-6


def banks(rank):
    """Gathered banks are the same on all; with a smaller last batch, and with none, nobody waits for ever."""
    for gather in (True, False):
        torch.manual_seed(1)
        student = nn.parallel.DistributedDataParallel(Student())
        config = RepulsorConfig(dim=3, queue_size=12, gather=gather, warmup_steps=0, with_ids=True)
        repulsion = RepulsiveAlignment(student, config)
        sizes = []
        for count in ((3, 3), (3, 1), (2, 0)):
            samples = slice(4 * rank, 4 * rank + count[rank])
            if count[rank]:
                x, _ = data(samples)
                ids = torch.arange(8)[samples]
                (student(x).square().mean() + repulsion.loss(ids=ids).total).backward()
            else:  # DistributedDataParallel wants to be met by all
                (student(data(slice(0, 1))[0]).square().mean() * 0).backward()
                repulsion.zero_grad()
            repulsion.sync_gradients()
            assert same(repulsion.head[0].weight.grad)
            repulsion.step()
            sizes.append(int(repulsion.bank.filled))
        if gather:
            assert sizes == [6, 10, 12]
            assert same(repulsion.bank.queue.float())
            assert same(repulsion.bank.ids)
            assert repulsion.bank.ids[:10].tolist() == [0, 1, 2, 4, 5, 6, 0, 1, 2, 4]
        else:
            assert sizes == ([3, 6, 8] if rank == 0 else [3, 4, 4])
            assert not same(repulsion.bank.queue.float())


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mine = dist.get_rank()
    alignment_is_that_of_one_process(mine)
    the_angle_stops_all_at_once(mine)
    banks(mine)
    # A wrapped model is part of a cycle of references; one that outlives the threads of its group aborts the process.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.write("done\n")
