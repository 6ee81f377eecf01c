"""The ring: what it holds after any pushes, and its state."""

import copy

import pytest
import torch
from eff_guidance.memory_bank import MemoryBank
from hypothesis import given, settings
from hypothesis import strategies as st


def rows(first, count, dim=2):
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(count, dim).clone()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(0, 23), min_size=1, max_size=8))
def test_it_holds_the_last_ones_in_ring_order(size, pushes):
    """For batches that divide the size, that do not, that are larger, and that are empty."""
    bank, done = MemoryBank(size, 2, torch.float32, with_ids=True), 0
    for count in pushes:
        bank.enqueue(rows(done, count), torch.arange(done, done + count))
        done += count
        kept = range(max(0, done - size), done)
        assert int(bank.filled) == len(kept)
        assert int(bank.ptr) == done % size
        assert [bank.queue[n % size, 0].item() for n in kept] == list(kept)
        assert [bank.ids[n % size].item() for n in kept] == list(kept)
        assert bank.by_age()[:, 0].tolist() == list(kept)
        assert bank.keys().shape == (len(kept), 2)
        assert bank.valid().tolist() == [i < len(kept) for i in range(size)]


def test_a_restored_bank_goes_on_identically():
    bank = MemoryBank(5, 2, torch.bfloat16)
    bank.enqueue(rows(0, 7))
    twin = MemoryBank(5, 2, torch.bfloat16)
    twin.load_state_dict(bank.state_dict())
    copied = copy.deepcopy(bank)
    for b in (bank, twin, copied):
        b.enqueue(rows(7, 4))
    for b in (twin, copied):
        assert all(torch.equal(x, y) for x, y in zip(bank.state_dict().values(), b.state_dict().values(), strict=True))
    with pytest.raises(RuntimeError, match="size mismatch for queue"):
        MemoryBank(5, 3, torch.bfloat16).load_state_dict(bank.state_dict())


def test_memory_is_that_of_the_rows():
    bank = MemoryBank(1000, 128)
    assert sum(b.numel() * b.element_size() for b in bank.buffers()) == 1000 * 128 * 2 + 16


def test_pushing_compiles_once():
    bank, graphs = MemoryBank(5, 2, torch.float32), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    push = torch.compile(bank.enqueue, backend=backend, fullgraph=True)
    for i in range(6):
        push(rows(3 * i, 3))
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert bank.by_age()[:, 0].tolist() == [13, 14, 15, 16, 17]


def test_refusals():
    bank, named = MemoryBank(4, 2), MemoryBank(4, 2, with_ids=True)
    for call, text in (
        (lambda: MemoryBank(0, 2), "size=0"),
        (lambda: MemoryBank(2, 2, torch.int8), "dtype=torch.int8"),
        (lambda: bank.enqueue(rows(0, 1, 3)), "the bank holds rows of 2"),
        (lambda: bank.enqueue(rows(0, 1), torch.arange(1)), "keeps no ids"),
        (lambda: named.enqueue(rows(0, 1)), "keeps ids: give them"),
        (lambda: named.enqueue(rows(0, 2), torch.arange(1)), "ids have shape"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
