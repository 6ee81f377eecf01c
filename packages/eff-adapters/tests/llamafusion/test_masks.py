import pytest
import torch
from eff_adapters.llamafusion import modality_attention_mask, picture_blocks


def test_worked_example():
    mask = modality_attention_mask(torch.tensor([[0, 1, 1, 0, 1, 1]]))
    assert mask.shape == (1, 1, 6, 6)
    assert [row.nonzero().flatten().tolist() for row in mask[0, 0]] == [
        [0], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]
    ]  # fmt: skip
    assert mask.sum() == 23


def test_neighbouring_pictures_are_two_blocks():
    ids = torch.tensor([[0, 1, 1, 1, 1, 0]])
    assert picture_blocks(ids, 2).tolist() == [[-1, 0, 0, 1, 1, -1]]
    assert picture_blocks(ids).tolist() == [[-1, 0, 0, 0, 0, -1]]
    mask = modality_attention_mask(ids, tokens_per_image=2)[0, 0]
    assert not mask[1, 3]
    assert mask[3, 1]
    assert mask[3, 4]


def test_padding_is_never_seen():
    ids = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    mask = modality_attention_mask(ids, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]))
    assert not mask[0, :, :, 0].any()
    assert not mask[1, :, :, 3].any()
    assert mask[1, 0, 0].tolist() == [True, False, False, False]


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hosts_get_the_same_mask(tiny, kind, attention):
    from eff_adapters.llamafusion.masks import host_mask

    model = tiny(kind, attn_implementation=attention)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1]])
    ids[1, 5:] = 0
    padding = torch.ones_like(ids)
    padding[0, :2] = 0
    embeds = torch.zeros(2, 8, 32)
    found = host_mask(model.config, embeds, padding, None, torch.arange(8)[None], picture_blocks(ids))
    found = found == 0 if attention == "eager" else found
    wanted = modality_attention_mask(ids, padding)
    rows = padding.bool()
    assert torch.equal(found[:, 0][rows], wanted[:, 0][rows])


@torch.no_grad()
def test_sliding_windows_stay(tiny, tower, batch, fixed):
    """Text outside of a query's window does not reach it; within a picture everything does."""
    mm = tower(model=tiny("Mistral", sliding_window=4, num_hidden_layers=1))
    data, given = batch(rows=(0,)), fixed(1)
    plain = mm(**data, **given)
    data["input_ids"] = data["input_ids"].clone()
    data["input_ids"][0, 0] = 40  # behind the window of everything from the marker on
    found = mm(**data, **given)
    assert not torch.equal(found.logits[0, 3], plain.logits[0, 3])
    assert torch.equal(found.logits[0, 4:], plain.logits[0, 4:])
    assert torch.equal(found.noise_pred, plain.noise_pred)


@pytest.mark.parametrize(
    ("ids", "n", "words"),
    [
        ([[0, 2]], None, "use 0 for text and 1"),
        ([[0, 1, 1, 1, 0]], 2, "lengths \\[3\\]"),
        ([0, 1], None, "use \\[batch, tokens\\]"),
    ],
)
def test_wrong_ids(ids, n, words):
    with pytest.raises(ValueError, match=words):
        picture_blocks(torch.tensor(ids), n)


def test_flash_attention_is_refused(tower, batch):
    mm = tower()
    mm.decoder.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'sdpa', 'eager'"):
        mm(**batch())
