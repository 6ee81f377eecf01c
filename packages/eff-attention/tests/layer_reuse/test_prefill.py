import torch
from eff_attention.layer_reuse import LayerReuseConfig, apply_layer_reuse
from eff_attention.layer_reuse.prefill import Prompt
from eff_kernels.edit.caches import cache_kwargs
from hypothesis import given, settings
from hypothesis import strategies as st

BOTH = LayerReuseConfig(top_k=192, block_size=32, min_seq_len=192, phase="both")


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def brute(q, k, v, taken, block_q, block_k, scale):
    """Softmax over each query's own block up to itself and the blocks of keys that were taken."""
    length, group = q.size(2), q.size(1) // k.size(1)
    rows, columns = torch.arange(length)[:, None], torch.arange(length)
    seen = (rows // block_q == columns // block_q) & (columns <= rows)
    seen = seen | (taken.repeat_interleave(block_q, 2)[:, :, :length].repeat_interleave(block_k, 3)[..., :length] > 0)
    k, v = (t.repeat_interleave(group, 1).double() for t in (k, v))
    return (scale * q.double() @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ v


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 500),
    st.sampled_from([8, 24, 128, 160]),
    st.integers(3, 12),
    st.booleans(),
    st.sampled_from([(2, 1), (4, 2), (3, 3)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 999),
)
def test_attention_is_over_the_chosen_blocks(length, block, blocks, shared, heads, dtype, seed):
    config = LayerReuseConfig(
        top_k=block * blocks, block_size=block, min_seq_len=block * blocks, shared_heads=shared, phase="both"
    )
    q, k, v = (draw(2, h, length + 5, 16, seed=seed + i, dtype=dtype) for i, h in enumerate((heads[0], *heads[1:] * 2)))
    one = Prompt(length, config)
    q = q[:, :, :length]  # k and v may be a static cache with room beyond
    one.select_by_means(3, q, k, 0.25)
    found = one.attend(3, q, k, v, 0.25)
    taken = one.chosen[3]
    wanted = brute(q, k[:, :, :length], v[:, :, :length], taken, one.block_q, block, 0.25)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert found.dtype == dtype
    assert (found.double() - wanted).norm() <= limit * wanted.norm()
    # As many as there is room for, before the block of queries, the first and the last among them.
    each = one.block_q // block
    room = max(0, blocks - each)
    for m in range(taken.size(2)):
        row = taken[:, :, m]
        assert bool((row.sum(-1) == min(room, m * each)).all())
        assert not row[..., m * each :].any()
        if m and room:
            assert row[..., m * each - 1].all() or (room == 1 and row[..., 0].all())
        if m and room > 1:
            assert row[..., 0].all()


def test_the_heaviest_blocks_by_hand():
    config = LayerReuseConfig(top_k=48 * 4, block_size=48, min_seq_len=48 * 4, must_select=(-1,), phase="both")
    one = Prompt(480, config)
    assert one.block_q == 96
    q, k = draw(1, 2, 480, 16), draw(1, 1, 480, 16, seed=1)
    one.select_by_means(0, q, k, 1.0)
    means = k[0, 0].unflatten(0, (10, 48)).mean(1)
    for m in range(1, 5):
        score = q[0].unflatten(1, (5, 96)).mean(2)[:, m] @ means[: 2 * m].mT
        wanted = set(score.softmax(-1).sum(0).topk(min(2, 2 * m)).indices.tolist())
        for head in range(2):
            assert set(one.chosen[0][0, head, m].nonzero().flatten().tolist()) == wanted


def test_a_prompt_up_to_the_limit_is_dense(any_model, mixed, prompt):
    tokens = prompt(2, 600)
    config = LayerReuseConfig(top_k=192, block_size=32, min_seq_len=600, phase="both")
    with torch.no_grad():
        wanted = any_model(tokens).logits
        with apply_layer_reuse(any_model, mixed, config):
            assert torch.equal(any_model(tokens).logits, wanted)


def test_the_sparse_path_with_every_block_is_dense(any_model, monkeypatch, mixed, prompt):
    tokens = prompt(2, 600)
    wanted = any_model(tokens).logits
    monkeypatch.setattr(LayerReuseConfig, "num_blocks", 1000)
    with torch.no_grad(), apply_layer_reuse(any_model, mixed, BOTH):
        found = any_model(tokens).logits
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert not torch.equal(found, wanted)


def test_long_prompts_are_read_by_the_policy(any_model, mixed, policy, prompt):
    tokens = prompt(1, 600)
    with torch.no_grad():
        wanted = any_model(tokens).logits
        with apply_layer_reuse(any_model, policy("F" * 6), BOTH):
            assert torch.equal(any_model(tokens).logits, wanted)
        errors = []
        for keys in (192, 320, 448, 576):
            config = LayerReuseConfig(top_k=keys, block_size=32, min_seq_len=576, phase="both")
            with apply_layer_reuse(any_model, mixed, config):
                found = any_model(tokens).logits
            torch.testing.assert_close(found[:, :128], wanted[:, :128], rtol=1e-4, atol=1e-4)
            errors.append((found - wanted).norm().item())
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.5 * errors[0]
        assert torch.equal(any_model(tokens).logits, wanted)


def test_static_cache_and_generation(any_model, mixed, prompt):
    tokens = prompt(2, 300)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with apply_layer_reuse(any_model, mixed, BOTH):
        dynamic, static = (
            any_model.generate(tokens, cache_implementation=kind, disable_compile=True, **options)
            for kind in ("dynamic", "static")
        )
    assert torch.equal(dynamic, static)


def test_padded_and_continued_prompts_are_dense(any_model, mixed, prompt):
    from transformers import DynamicCache

    tokens, mask = prompt(2, 400), torch.ones(2, 400, dtype=torch.long)
    mask[0, :50] = 0
    with torch.no_grad():
        wanted = any_model(tokens, attention_mask=mask).logits
        with apply_layer_reuse(any_model, mixed, BOTH):
            assert torch.equal(any_model(tokens, attention_mask=mask).logits, wanted)
        results = []
        for apply in (False, True):
            cache = DynamicCache(config=any_model.config)
            any_model(tokens[:, :100], **cache_kwargs(any_model, cache))
            if apply:
                handle = apply_layer_reuse(any_model, mixed, BOTH)
            results.append(any_model(tokens[:, 100:], **cache_kwargs(any_model, cache)).logits)
        handle.remove()
    assert torch.equal(*results)
