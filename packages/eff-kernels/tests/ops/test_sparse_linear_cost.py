import torch
from eff_kernels import BlockMap, block_map
from eff_kernels.ops.sparse_linear_attention import cost


def tensors(*sizes, batch=1, dtype=torch.float64, seed=0):
    """Random q, k, v from (heads, length, features) of each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *size, generator=generator, dtype=dtype) for size in sizes]


def test_cost_is_the_share_of_the_critical_blocks():
    q, k, v = torch.zeros(1, 8, 4096, 64), torch.zeros(1, 2, 4096, 64), torch.zeros(1, 2, 4096, 64)
    mask = torch.full((1, 8, 64, 64), -1, dtype=torch.int8)
    mask[..., :3] = 1
    found = cost(q, k, v, BlockMap(mask, 64, 64))
    assert found.dense == 4 * 8 * 4096 * 4096 * 64
    assert found.sparse / found.dense == 3 / 64
    assert found.linear == 2 * 64 * 65 * (8 + 2) * 4096
    more = cost(q, k, v, BlockMap(mask, 64, 64), "noncritical")
    assert more.linear - found.linear == 2 * 64 * 65 * 8 * 64 * 61
    q, k = torch.randn(1, 1, 6400, 4), torch.randn(1, 1, 6400, 4)
    found = cost(q, k, k, block_map(q, k, k_high=0.05))
    assert found.sparse == 0.05 * found.dense
    assert found.bytes == 5 * q.nbytes + 4 * 6400


def test_cost_counts_the_last_blocks_as_they_are():
    q, k = torch.zeros(1, 1, 10, 4), torch.zeros(1, 1, 7, 4)
    mask = torch.ones(1, 1, 3, 2, dtype=torch.int8)
    found = cost(q, k, k, BlockMap(mask, 4, 4))
    assert found.sparse == found.dense == 4 * 10 * 7 * 4
