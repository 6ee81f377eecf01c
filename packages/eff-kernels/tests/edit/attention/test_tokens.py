"""Roles of tokens: pictures and their grids in each family, and where they go in caches, padding and generation."""

import pytest
import torch
from eff_kernels.edit.attention import (
    Role,
    Tokens,
    decoder_attention,
    find_decoder,
    observe_attention,
    tokens_of,
)
from eff_kernels.edit.caches import cache_kwargs, returned_cache

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 256,
}  # fmt: skip
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 4}
QWEN = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "patch_size": 4, "out_hidden_size": 64,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
IMAGE = 96


def _build(name, config, **more):
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**more)).eval()


def llava():
    return _build("LlavaForConditionalGeneration", "LlavaConfig", vision_config={**TOWER, "image_size": 16,
        "model_type": "clip_vision_model"},
        text_config={**TEXT, "model_type": "llama"}, image_token_id=IMAGE)  # fmt: skip


def llava_next():
    return _build("LlavaNextForConditionalGeneration", "LlavaNextConfig", vision_config={**TOWER, "image_size": 16,
        "model_type": "clip_vision_model"}, text_config={**TEXT, "model_type": "llama"}, image_token_id=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]])  # fmt: skip


def qwen(name):
    vision = {k: v for k, v in QWEN.items() if k not in ("num_position_embeddings", "deepstack_visual_indexes")}
    vision = {**vision, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 1} if name == "Qwen2VL" else vision
    return _build(f"{name}ForConditionalGeneration", f"{name}Config", text_config={**TEXT, "rope_parameters": ROPE},
        vision_config=QWEN if name == "Qwen3VL" else vision, image_token_id=IMAGE, video_token_id=95,
        vision_start_token_id=94, vision_end_token_id=93)  # fmt: skip


def internvl():
    return _build("InternVLForConditionalGeneration", "InternVLConfig", vision_config={**TOWER, "patch_size": [4, 4],
        "image_size": [16, 16]}, text_config={**TEXT, "model_type": "qwen2"}, image_token_id=IMAGE)  # fmt: skip


def idefics3(name="Idefics3"):
    return _build(f"{name}ForConditionalGeneration", f"{name}Config", vision_config={**TOWER, "image_size": 16},
        text_config={**TEXT, "model_type": "llama"}, image_token_id=IMAGE, scale_factor=2)  # fmt: skip


def gemma3():
    model = _build("Gemma3ForConditionalGeneration", "Gemma3Config", vision_config={**TOWER, "image_size": 16},
        text_config={**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        image_token_id=IMAGE, mm_tokens_per_image=4)  # fmt: skip
    model.model.multi_modal_projector.mm_input_projection_weight.data.normal_()  # zero at birth
    return model


def paligemma():
    return _build("PaliGemmaForConditionalGeneration", "PaliGemmaConfig", vision_config={**TOWER, "image_size": 16,
        "projection_dim": 64, "model_type": "siglip_vision_model"}, text_config={**TEXT, "model_type": "gemma"},
        image_token_id=IMAGE, projection_dim=64)  # fmt: skip


def roles_of(model, **inputs):
    """Roles of the keys in the last layer after one forward, and the embeddings that the decoder got."""
    seen, embeddings = [], []
    decoder = model.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda m, a, k: embeddings.append(k["inputs_embeds"].detach()), with_kwargs=True
    )
    names = decoder_attention(model)
    with observe_attention(model, lambda c, o: seen.append(c.roles), where=names, needs=("roles",)), torch.no_grad():
        model(**inputs)
    hook.remove()
    assert len(seen) == 2
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in (decoder, model, model.model))
    return seen[-1], embeddings[0]


def changed_places(model, ids, pixels, change, **inputs):
    """Cells (picture, part, line, column) of the two tokens that a change of pixels moves most, and all roles."""
    roles, before = roles_of(model, input_ids=ids, pixel_values=pixels, **inputs)
    pixels = pixels.clone()
    pixels[change] += 3.0
    _, after = roles_of(model, input_ids=ids, pixel_values=pixels, **inputs)
    moved = (after - before).norm(dim=-1).argmax()
    keys = roles.keys
    row, column = divmod(moved.item(), ids.shape[1])
    return row, tuple(int(x[row, column]) for x in (keys.picture, keys.part, keys.row, keys.column)), keys


def prompt(*pieces):
    return torch.tensor([[t for p in pieces for t in (p if isinstance(p, list) else [p])]])


def test_llava():
    # two pictures side by side and one in the other row
    rows = torch.cat([prompt(5, [IMAGE] * 32, 6, 7, 8), prompt(0, 0, 5, 6, [IMAGE] * 16, 7, [9] * 15)])
    mask = (rows != 0).long()
    cut = (2, slice(None), slice(8, 12), slice(4, 8))  # third picture, line 2, column 1
    row, cell, keys = changed_places(llava(), rows, torch.randn(3, 3, 16, 16), cut, attention_mask=mask)
    assert (row, cell) == (1, (0, 0, 2, 1))
    assert keys.grid(0, 1) == (4, 4)
    assert keys.role[1, :5].tolist() == [Role.PAD, Role.PAD, Role.SYSTEM, Role.SYSTEM, Role.PICTURE]
    assert keys.role[0, -3:].tolist() == [Role.TEXT] * 3
    assert keys.picture[0, 1:33].tolist() == [0] * 16 + [1] * 16
    with pytest.raises(ValueError, match="row 1 has no picture 1"):
        keys.grid(1, 1)


def test_pictures_smaller_than_the_config_says():
    # the config tells of 4 x 4 tokens; squares of 3 x 3 and of 5 x 5, and a run of 14 that shows no places
    ids = prompt(5, [IMAGE] * 9, 6, [IMAGE] * 25, 7, [IMAGE] * 14, 8, [IMAGE] * 32)
    config = llava().config
    tokens = Tokens.of_prompt(ids, config, {})
    assert tokens.grid(0, 0) == (3, 3)
    assert tokens.row[0, 1:10].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert tokens.column[0, 1:10].tolist() == [0, 1, 2] * 3
    assert tokens.grid(0, 1) == (5, 5)
    assert tokens.picture[0, 37:51].tolist() == [2] * 14
    assert set(tokens.row[0, 37:51].tolist() + tokens.column[0, 37:51].tolist()) == {-1}
    assert (tokens.grid(0, 3), tokens.grid(0, 4)) == ((4, 4), (4, 4))
    config.vision_feature_select_strategy = "full"  # the class token comes first and shows no place
    tokens = Tokens.of_prompt(prompt(5, [IMAGE] * 10, 6, [IMAGE] * 34), config, {})
    assert tokens.row[0, 1:11].tolist() == [-1, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (tokens.grid(0, 0), tokens.grid(0, 1), tokens.grid(0, 2)) == ((3, 3), (4, 4), (4, 4))


@pytest.mark.parametrize(("part", "tile", "cell"), [(0, 0, (2, 1)), (1, 2, (2, 5))])
def test_llava_next(part, tile, cell):
    # 16 x 32 pixels are two tiles of 4 x 4 tokens side by side
    ids = prompt(5, [IMAGE] * (16 + 4 * 9), 6)
    cut = (0, tile, slice(None), slice(8, 12), slice(4, 8))
    sizes = torch.tensor([[16, 32]])
    _, found, keys = changed_places(llava_next(), ids, torch.randn(1, 3, 3, 16, 16), cut, image_sizes=sizes)
    assert found == (0, part, *cell)
    assert keys.grid(0, 0, 0) == (4, 4)
    assert keys.grid(0, 0, 1) == (4, 8)
    assert int(((keys.part == 1) & (keys.column == -1)).sum()) == 4  # separators of lines


def test_llava_next_cuts_padding():
    # 4 x 16 pixels become 8 x 32 of 16 x 32, i.e. 2 x 8 of 4 x 8 tokens: one line at each end is cut
    ids = prompt(5, [IMAGE] * (16 + 2 * 9), 6)
    roles, _ = roles_of(llava_next(), input_ids=ids, pixel_values=torch.randn(1, 3, 3, 16, 16),
        image_sizes=torch.tensor([[4, 16]]))  # fmt: skip
    assert roles.keys.grid(0, 0, 1) == (2, 8)


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_qwen(name):
    rows = torch.cat([prompt(5, 94, [IMAGE] * 6, 93, 6), prompt(94, [IMAGE] * 4, 93, 94, [IMAGE] * 2, 93)])
    grids = torch.tensor([[1, 4, 6], [1, 4, 4], [1, 2, 4]])
    kinds = (rows == IMAGE).int()
    patches = torch.randn(24 + 16 + 8, 96)
    change = slice(24 + 8, 24 + 12)  # third merged token of the second picture
    row, cell, keys = changed_places(qwen(name), rows, patches, change, image_grid_thw=grids, mm_token_type_ids=kinds)
    assert (row, cell) == (1, (0, 0, 1, 0))
    assert keys.grid(0, 0) == (2, 3)
    assert keys.grid(1, 1) == (1, 2)
    assert keys.of(Role.SYSTEM).tolist() == [[True, True] + [False] * 8, [True] + [False] * 9]


def test_qwen_video():
    ids = prompt(5, 94, [95] * 8, 93, 94, [IMAGE] * 4, 93)
    tokens = Tokens.of_prompt(ids, qwen("Qwen2_5_VL").config, {
        "video_grid_thw": torch.tensor([[2, 4, 4]]), "image_grid_thw": torch.tensor([[1, 4, 4]])
    })  # fmt: skip
    assert tokens.picture[0].tolist() == [-1, -1, *[0] * 8, -1, -1, *[1] * 4, -1]
    assert tokens.part[0, 2:10].tolist() == [0] * 4 + [1] * 4
    assert tokens.grid(0, 0, 1) == (2, 2)


@pytest.mark.parametrize(("tile", "cell"), [(0, (0, 1, 1, 0)), (1, (0, 2, 1, 0)), (2, (0, 0, 1, 0)), (3, (1, 0, 1, 0))])
def test_internvl(tile, cell):
    ids = prompt(5, 6, [IMAGE] * 12, 7, [IMAGE] * 4, 8)  # two parts and the whole; a picture in one piece
    cut = (tile, slice(None), slice(8, 16), slice(0, 8))
    _, found, keys = changed_places(internvl(), ids, torch.randn(4, 3, 16, 16), cut)
    assert found == cell
    assert keys.grid(0, 0, 1) == (2, 2)


@pytest.mark.parametrize("name", ["Idefics3", "SmolVLM"])
@pytest.mark.parametrize(("tile", "cell"), [(1, (0, 2, 0, 1)), (2, (0, 0, 0, 1)), (3, (1, 0, 0, 1))])
def test_idefics3(name, tile, cell):
    # <fake> <row_1_col_1> part <fake> <row_1_col_2> part <newline> <fake> <global> whole <fake>, then one in one piece
    fake, whole = 90, 80
    ids = prompt(5, fake, 81, [IMAGE] * 4, fake, 82, [IMAGE] * 4, 7, fake, whole, [IMAGE] * 4, fake, 8, fake, whole,
        [IMAGE] * 4, fake)  # fmt: skip
    cut = (0, tile, slice(None), slice(0, 8), slice(8, 16))
    _, found, _ = changed_places(idefics3(name), ids, torch.randn(1, 4, 3, 16, 16), cut)
    assert found == cell


@pytest.mark.parametrize(("make", "count", "side"), [(gemma3, 4, 2), (paligemma, 16, 4)])
def test_gemma(make, count, side):
    ids = prompt(5, [IMAGE] * count, 6, [IMAGE] * count, 7)
    step = 16 // side
    cut = (1, slice(None), slice(step, 2 * step), slice(0, step))
    extra = {"token_type_ids": (ids == IMAGE).long()}
    _, found, keys = changed_places(make(), ids, torch.randn(2, 3, 16, 16), cut, **extra)
    assert found == (1, 0, 1, 0)
    assert keys.grid(0, 0) == (side, side)


@torch.no_grad()
def test_tokens_in_a_hook_on_the_decoder():
    model, seen, calls = llava(), [], []
    decoder = find_decoder(model)
    assert decoder is model.model.language_model
    ids = torch.cat([prompt(5, [IMAGE] * 16, 6), prompt(0, [IMAGE] * 16, 7)])
    inputs = {"attention_mask": (ids != 0).long(), "pixel_values": torch.randn(2, 3, 16, 16)}
    names = decoder_attention(model)
    with observe_attention(model, lambda c, o: calls.append(c.roles), where=names[-1], needs=("roles",)):
        hook = decoder.register_forward_pre_hook(lambda m, a, k: seen.append(tokens_of(k)), with_kwargs=True)
        model.generate(ids, **inputs, max_new_tokens=2, do_sample=False, eos_token_id=None)
        model(input_ids=ids[:, 1:], attention_mask=inputs["attention_mask"][:, 1:], pixel_values=inputs["pixel_values"])
        hook.remove()
    for found, roles in zip(seen, calls, strict=True):
        assert torch.equal(found.queries.role, roles.queries.role)
        assert torch.equal(found.keys.role, roles.keys.role)
        assert (found.position, found.prompt_length) == (roles.position, roles.prompt_length)
    assert [r.prompt_length for r in seen] == [18, 18, None]
    assert [r.position for r in seen] == [0, 18, 0]
    assert tokens_of({}) is None
    with pytest.raises(NotImplementedError, match="0 language decoders"):
        find_decoder(torch.nn.Linear(2, 2))


def test_offset_of_the_keys_in_a_layer_with_a_window():
    model, seen = gemma3(), []
    ids = prompt(5, [IMAGE] * 4, *range(6, 20))
    inputs = {"pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": (ids == IMAGE).long()}
    names = decoder_attention(model)
    with observe_attention(
        model, lambda c, o: seen.append((c.layer, c.roles, c.num_keys)), where=names, needs=["roles"]
    ):
        model.generate(ids, **inputs, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert [(layer, r.offset, keys) for layer, r, keys in seen[2:]] == [(0, 12, 8), (1, 0, 20)]


def letters(tokens, row=0):
    """Roles of a row as one letter each."""
    return "".join("?-psTPG"[int(r) + 2] if int(r) != Role.TEXT else "t" for r in tokens.role[row])


GENERATE = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("more", [
    {}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}, {"prefill_chunk_size": 5},
    {"prefill_chunk_size": 21}, {"prompt_lookup_num_tokens": 2},
], ids=str)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_roles_through_generation(more):
    ids = torch.cat([prompt(0, 0, 5, [IMAGE] * 16, 6, 7, 8), prompt(5, 6, 7, [IMAGE] * 16, 8, 9, 9)])
    want = ["ppsPPPPPPPPPPPPPPPPtttGGG", "sssPPPPPPPPPPPPPPPPtttGGG"]
    if "prompt_lookup_num_tokens" in more:
        ids, want = ids[1:], want[1:]
    model, seen = llava(), []
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": torch.randn(len(ids), 3, 16, 16)}
    if "prefill_chunk_size" in more:
        inputs.pop("pixel_values")  # transformers cannot fill in pictures that come in pieces

    def look(call, output):
        seen.append(call.roles)

    with observe_attention(model, look, where=decoder_attention(model), needs=("roles",)):
        model.generate(**inputs, **GENERATE, **more)
    assert all(s is not None for s in seen)
    copies = more.get("num_beams", 1)
    last = seen[-1]
    for row, letter in enumerate(want):
        got = letters(last.keys, row * copies)
        assert got.startswith(letter)
        assert set(got[len(letter) :]) <= set("-G")
        assert set(letters(last.queries, row * copies)[-1:]) <= {"G"}
    first = seen[0]
    assert first.position == 0
    got = letters(first.queries, 0)
    assert len(got) == more.get("prefill_chunk_size", 22 + ("prompt_lookup_num_tokens" in more))
    assert want[0].startswith(got)
    assert not (last.keys.picture[:, 22:] != -1).any()


def test_sliding_layers_know_their_keys():
    model, seen = gemma3(), {}
    ids = prompt(5, [IMAGE] * 4, 6, 7, 8, 9, 5, 6)

    def look(call, output):
        seen[call.layer] = call

    with observe_attention(model, look, where=decoder_attention(model), needs=("roles",)):
        model.generate(input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16), token_type_ids=(ids == IMAGE).long(),
            **GENERATE)  # fmt: skip
    assert letters(seen[1].roles.keys) == "sPPPPttttttGGG"
    assert letters(seen[0].roles.keys) == "ttttttGGG"[-seen[0].num_keys :]
    assert seen[0].num_keys == 8


def test_a_loop_of_ones_own():
    model, seen = llava(), []
    ids = prompt(5, [IMAGE] * 16, 6)
    with torch.no_grad(), observe_attention(model, lambda c, o: seen.append(c.roles), where=decoder_attention(model),
        needs="roles"):  # fmt: skip
        cache = returned_cache(model(input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16)))
        model(input_ids=prompt(7), **cache_kwargs(model, cache))
        model(input_ids=prompt(8, 9), **cache_kwargs(model, cache))
        assert letters(seen[-1].keys) == "s" + "P" * 16 + "tGtt"
        cache.crop(-3)
        model(input_ids=prompt(8), **cache_kwargs(model, cache))
        assert letters(seen[-1].keys) == "s" + "P" * 16 + "tG"
    with torch.no_grad():
        cache = returned_cache(model(input_ids=prompt(5, 6, 7)))
    with torch.no_grad(), observe_attention(model, lambda c, o: seen.append(c.roles), needs="roles"):
        model(input_ids=prompt(8, 9), **cache_kwargs(model, cache))
    assert letters(seen[-1].keys) == "???tt"
    assert not hasattr(model, "_eff_attention")
    assert "generate" not in model.__dict__


@pytest.mark.parametrize("reentrant", [False, True])
def test_roles_in_recomputed_layers(reentrant):
    model, seen = llava().train(), []
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": reentrant})

    def look(call, output):
        seen.append((call.recomputed, letters(call.roles.keys)))

    ids = prompt(5, [IMAGE] * 16, 6)
    with observe_attention(model, look, where=decoder_attention(model), needs="roles", grad=True):
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 16, 16), use_cache=False).logits.sum().backward()
    assert sorted(seen) == [(False, "s" + "P" * 16 + "t")] * 2 + [(True, "s" + "P" * 16 + "t")] * 2


def test_models_without_decoder_are_refused():
    model = transformers.ViTModel(transformers.ViTConfig(**TOWER, image_size=16))
    with pytest.raises(ValueError, match="roles of tokens"):
        observe_attention(model, print, needs="roles")
    assert not any("_eff_attention" in m.__dict__ for m in model.modules())
