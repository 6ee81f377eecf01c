import pytest
import torch
import torch.nn.functional as F
from eff_attention.contrastive_focus import (
    CarveConfig,
    PictureCache,
    attention_entropy,
    attention_regions,
    carve_answer,
    carve_answers,
    colour_complexity,
    contrast_attention,
    fuse_attention,
    mask_crop_resize,
    record_image_attention,
    record_image_attentions,
    texture_complexity,
)

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

TASK = torch.tensor([0.1, 0.4, 0.3, 0.2]).view(1, 1, 4)
GENERAL = torch.tensor([0.25, 0.25, 0.1, 0.4]).view(1, 1, 4)


def test_contrast_by_hand():
    assert contrast_attention(TASK, GENERAL).flatten().tolist() == pytest.approx([0.4, 1.6, 3.0, 0.5], abs=1e-5)
    soft = contrast_attention(TASK, GENERAL, 0.05).double().requires_grad_()
    assert soft.detach().flatten().tolist() == pytest.approx([0.3333, 1.3333, 2.0, 0.4444], abs=1e-4)
    a, g = TASK.double(), GENERAL.double()
    # its minimum is where the weighted ridge problem has its
    loss = ((soft * g - a).square() / g).sum() + 0.05 * soft.square().sum()
    (slope,) = torch.autograd.grad(loss, soft)
    assert slope.abs().max().item() < 1e-6
    torch.testing.assert_close(contrast_attention(7 * TASK, 7 * GENERAL, 0.0), contrast_attention(TASK, GENERAL, 0.0))


def test_equal_maps_keep_the_whole_picture():
    score = fuse_attention(contrast_attention(TASK, TASK, 0.0), (2, 2), (6, 8))
    mask = attention_regions(score)
    assert bool(mask.all())
    picture = Image.new("RGB", (8, 6), (10, 20, 30))
    refined, crop = mask_crop_resize(picture, mask)
    assert crop == (0, 0, 8, 6)
    assert refined.tobytes() == picture.tobytes()


def test_fusion():
    maps = torch.tensor([[0.4, 1.6, 3, 0.5], [1, 1, 2, 0]]).view(2, 1, 4)
    assert fuse_attention(maps, (2, 2), (2, 2)).flatten().tolist() == pytest.approx([2.4, 3.6, 7, 0.5])
    assert fuse_attention(maps, (2, 2), (2, 2), time="first").flatten().tolist() == pytest.approx([0.4, 1.6, 3, 0.5])
    assert fuse_attention(maps, (2, 2), (2, 2), time="last").flatten().tolist() == pytest.approx([1, 1, 2, 0])
    many = torch.rand(3, 2, 12)
    parts = sum(
        (t + 1) * fuse_attention(many[t : t + 1, i : i + 1], (3, 4), (9, 11)) for t in range(3) for i in range(2)
    )
    torch.testing.assert_close(fuse_attention(many, (3, 4), (9, 11)), parts, atol=1e-5, rtol=0)


def test_regions_are_found_in_a_dtype_that_gpus_pool(monkeypatch):
    """CUDA has no max_pool2d of integers, a CPU has."""
    pooled, pool = set(), F.max_pool2d
    monkeypatch.setattr(F, "max_pool2d", lambda x, *more: (pooled.add(x.dtype), pool(x, *more))[1])
    attention_regions(torch.rand(4, 5), 0.5)
    assert pooled == {torch.float64}


def test_threshold_and_regions():
    score = torch.randperm(60).view(6, 10).float()
    kept = [int(attention_regions(score, p, 60).sum()) for p in (0.1, 0.25, 0.5, 1.0)]
    assert kept == [6, 15, 30, 60]
    blobs = torch.zeros(5, 9)
    blobs[1, 1:3] = 5.0  # sum 10
    blobs[3, 4:7] = 2.0  # sum 6, larger
    by_score = attention_regions(blobs, 5 / 45, 1)
    assert by_score.nonzero().tolist() == [[1, 1], [1, 2]]
    assert int(attention_regions(blobs, 5 / 45, 1, rank="area").sum()) == 3
    corner = torch.zeros(4, 4)
    corner[0, 0] = corner[1, 1] = 1.0
    assert int(attention_regions(corner, 2 / 16, 1).sum()) == 1  # touching at a corner is not connected
    snake = torch.zeros(7, 7)
    snake[::2], snake[1, -1], snake[3, 0], snake[5, -1] = 1, 1, 1, 1
    assert int(attention_regions(snake, float(snake.mean()), 1).sum()) == int(snake.sum())


def test_crop():
    mask = torch.zeros(20, 40, dtype=torch.bool)
    mask[4:9, 10:20] = True
    refined, crop = mask_crop_resize(Image.new("RGB", (40, 20), (255, 0, 0)), mask)
    assert (crop, refined.size) == ((10, 4, 20, 9), (40, 20))
    two = mask.clone()
    two[15, 30] = True
    refined, crop = mask_crop_resize(Image.new("RGB", (40, 20), (255, 0, 0)), two)
    assert crop == (10, 4, 31, 16)
    assert refined.getpixel((refined.width - 1, 0)) == (0, 0, 0)
    assert mask_crop_resize(refined, torch.zeros(refined.height, refined.width, dtype=torch.bool))[0] is refined


def test_measures():
    assert float(attention_entropy(torch.ones(2, 3, 4))) == pytest.approx(1.3863, abs=1e-4)
    assert float(attention_entropy(5 * TASK)) == pytest.approx(1.2799, abs=1e-4)
    assert colour_complexity(Image.new("RGB", (8, 8), (90, 90, 90))) == 0
    hues = Image.new("HSV", (256, 4))
    hues.putdata([(x, 255, 255) for _ in range(4) for x in range(256)])
    assert colour_complexity(hues.convert("RGB")) > 0.95


def llava(seed=0):
    torch.manual_seed(seed)
    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=39, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def question(ids, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.tensor([[1, 5, *[39] * 16, *ids]]),
        "attention_mask": torch.ones(1, 18 + len(ids), dtype=torch.int64),
        "pixel_values": torch.randn(1, 3, 16, 16, generator=g),
    }


def test_recorded_rows_are_those_of_eager_attention():
    model, inputs = llava(), question([7, 8, 9])
    seen = record_image_attention(model, inputs, [1, -1], max_new_tokens=3)
    assert (seen.grid, seen.layers, seen.maps.shape) == ((4, 4), (1, 3), (3, 2, 16))
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert seen.ids.tolist() == plain[0, -3:].tolist()
    model.set_attn_implementation("eager")
    for t in range(3):
        ids = torch.cat((inputs["input_ids"], plain[:, -3:][:, :t]), 1)
        out = model(input_ids=ids, pixel_values=inputs["pixel_values"], output_attentions=True)
        for i, layer in enumerate((1, 3)):
            want = out.attentions[layer][0, :, -1, 2:18].mean(0)
            torch.testing.assert_close(seen.maps[t, i], want.detach(), atol=1e-5, rtol=0)


def test_pictures_smaller_than_the_config_says():
    """A tower that takes any size: the config's 16 tokens of 4 x 4 are 9 of 3 x 3 here, in raster order."""
    model, ids = llava(), torch.tensor([[1, 5, *[39] * 9, 7, 8]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)),
    }
    tower = model.model.vision_tower
    forward = tower.forward
    tower.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "interpolate_pos_encoding": True})
    seen = record_image_attention(model, inputs, [1], max_new_tokens=1)
    model.set_attn_implementation("eager")
    wanted = model(**inputs, output_attentions=True).attentions[1][0, :, -1, 2:11].mean(0)
    assert seen.grid == (3, 3)
    torch.testing.assert_close(seen.maps[0, 0], wanted.detach(), atol=1e-5, rtol=0)


def test_default_layers():
    seen = record_image_attention(llava(), question([7]), max_new_tokens=1)
    assert seen.layers == (0, 1, 2, 3)


class Processor:
    """Words are token ids; pictures are their mean colour."""

    def apply_chat_template(self, messages, *, add_generation_prompt):
        return list(messages[0]["content"])

    def __call__(self, *, images, text, return_tensors):
        ids = [1]
        for part in text:
            ids += [39] * 16 if part["type"] == "image" else [2 + ord(c) % 30 for c in part["text"][:6]]
        pixels = []
        for picture in images:
            small = picture.convert("RGB").resize((16, 16))
            pixels.append(
                torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1) / 255
            )
        ids = torch.tensor([ids])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.stack(pixels)}

    def decode(self, ids, *, skip_special_tokens):
        return " ".join(str(i) for i in ids.tolist())


@pytest.mark.parametrize("final", ["both", "refined"])
def test_the_whole_way(final):
    model, picture = llava(), Image.effect_noise((40, 24), 80).convert("RGB")
    config = CarveConfig(max_new_tokens=3, final=final)
    cache = PictureCache()
    out = carve_answer(model, Processor(), picture, "Where?", config, cache=cache)
    assert out.score.shape == out.mask.shape == (24, 40)
    assert 0 < int(out.mask.sum()) <= 24 * 40
    assert len(out.answer.split()) == len(out.original_answer.split()) == 3
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda *a: calls.append(1))
    again = carve_answer(model, Processor(), picture, "Where?", config, cache=cache)
    hook.remove()
    assert len(calls) == 2  # the general pass was remembered
    assert torch.equal(again.score, out.score)
    assert again.answer == out.answer
    other = carve_answer(model, Processor(), picture.rotate(180), "Where?", config, cache=cache)
    assert not torch.equal(other.score, out.score)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: contrast_attention(TASK, GENERAL[..., :3]), "same layers and places"),
        (lambda: contrast_attention(TASK, GENERAL, -1.0), "lam must not be negative"),
        (lambda: fuse_attention(TASK, (3, 2), (4, 4)), "grid"),
        (lambda: attention_regions(torch.zeros(2, 2), 0.0), "top_p"),
        (lambda: attention_regions(torch.full((2, 2), float("nan"))), "finite"),
        (lambda: mask_crop_resize(Image.new("RGB", (4, 3)), torch.ones(4, 3, dtype=torch.bool)), r"\[3, 4\]"),
        (lambda: CarveConfig(top_p=1.5), "top_p must be"),
        (lambda: record_image_attention(llava(), {"input_ids": torch.ones(2, 3)}), "one prompt at a time"),
        (
            lambda: record_image_attention(
                llava(), {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2)}, max_new_tokens=1
            ),
            "no picture 0",
        ),
        (lambda: PictureCache(0), "size must be"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_crops_keep_their_surroundings_and_the_ratio_on_request():
    pixels = torch.arange(20 * 30).remainder(251).byte().view(20, 30)
    picture = Image.fromarray(pixels.numpy()).convert("RGB")
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[2:5, 24:30] = True
    mask[5, 24] = True
    free, crop = mask_crop_resize(picture, mask)
    assert crop == (24, 2, 30, 6)
    assert free.size == (30, 20)  # 6 x 4 is in the ratio of 30 x 20
    mask[5:14, 24] = True
    kept, crop = mask_crop_resize(picture, mask, keep_outside=True, keep_ratio=True)
    left, top, right, bottom = crop
    assert (right - left) / (bottom - top) == pytest.approx(1.5)
    assert left <= 24
    assert right == 30
    assert top <= 2
    assert bottom >= 14
    assert kept.size == (30, 20)
    whole, crop = mask_crop_resize(picture, torch.ones(20, 30, dtype=torch.bool), keep_ratio=True)
    assert crop == (0, 0, 30, 20)
    assert whole.tobytes() == picture.tobytes()
    corner = torch.zeros(20, 30, dtype=torch.bool)
    corner[0, 0] = corner[19, 0] = True
    assert mask_crop_resize(picture, corner, keep_ratio=True)[1] == (0, 0, 30, 20)


@torch.no_grad()
def test_several_prompts_are_recorded_as_each_alone(zoo, family):
    """Grids of every family, left padding, a second picture, and answers that end at different steps."""
    model, prompts = zoo(family), [(1, 5, "P", 6, 7, 8), (1, "P", 9, "P", 10, 11, 12, 13, 14)]
    model.generation_config.suppress_tokens = [95, 96]
    model.generation_config.pad_token_id = 0  # transformers 5.17 takes Idefics3's, beyond this vocabulary
    together = record_image_attentions(model, zoo.ask(family, *prompts), [1, 3], max_new_tokens=4)
    model.generation_config.eos_token_id = int(together[0].ids[1])
    together = record_image_attentions(model, zoo.ask(family, *prompts), [1, 3], max_new_tokens=4)
    assert len(together[0].ids) <= 2
    assert together[0].ids[-1] == model.generation_config.eos_token_id
    for own, many in zip(zoo.each(family, prompts), together, strict=True):
        alone = record_image_attention(model, own, [1, 3], max_new_tokens=4)
        assert (alone.grid, alone.ids.tolist()) == (many.grid, many.ids.tolist())
        torch.testing.assert_close(many.maps, alone.maps, atol=1e-5, rtol=1e-3)
        assert alone.maps.shape == (len(alone.ids), 2, alone.grid[0] * alone.grid[1])
        assert float(alone.maps.min()) > 0


def test_scale_of_the_question_does_not_move_the_mask():
    general, asked = (torch.rand(3, 2, 12, generator=torch.Generator().manual_seed(s)) + 0.01 for s in (0, 1))
    scores = [fuse_attention(contrast_attention(a, general), (3, 4), (12, 16)) for a in (asked, 7 * asked)]
    torch.testing.assert_close(scores[1], 7 * scores[0])
    masks = [attention_regions(s) for s in scores]
    assert torch.equal(*masks)
    smaller = None
    for p in (0.1, 0.3, 0.6, 1.0):  # monotone: what a smaller share keeps, a larger one keeps as well
        mask = attention_regions(scores[0], p, 192)
        assert smaller is None or bool((mask | ~smaller).all())
        smaller = mask
    picture = Image.effect_noise((16, 12), 80).convert("RGB")
    refined, crop = mask_crop_resize(picture, smaller)
    assert (refined.tobytes(), crop) == (picture.tobytes(), (0, 0, 16, 12))


def test_a_plain_picture_has_no_texture():
    pytest.importorskip("skimage")
    assert texture_complexity(Image.new("RGB", (16, 16), (90, 90, 90))) == 0
    assert 0 < texture_complexity(Image.effect_noise((64, 64), 80)) < 1


def test_no_map_of_all_queries_is_made(largest_tensors):
    """A prompt of 600 tokens with 4 heads: no [H, T, T], recorded layers included."""
    model, inputs = llava(), question([7] * 582)
    with largest_tensors(10**9) as seen:
        record_image_attention(model, inputs, [1, 2], max_new_tokens=2)
    assert seen.largest < 4 * 600 * 600


@pytest.mark.parametrize(
    ("name", "grid", "columns"),
    [
        ("Qwen2VL", (2, 3), range(3, 9)),
        ("Qwen2_5_VL", (2, 3), range(3, 9)),
        ("LlavaNext", (4, 4), range(2, 18)),
        ("Idefics3", (2, 2), range(10, 14)),
        ("Gemma3", (2, 2), range(2, 6)),
    ],
)
def test_grids_are_rows_first_and_of_the_whole_picture(zoo, name, grid, columns):
    """A landscape picture where the family keeps its ratio; of a picture in parts the small one of the whole."""
    model, inputs = zoo(name), zoo.ask(name, (1, 5, "P", 6, 7))
    seen = record_image_attention(model, inputs, max_new_tokens=1)
    assert seen.grid == grid
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    wanted = torch.stack([attentions[i][0, :, -1, list(columns)].mean(0) for i in seen.layers])
    torch.testing.assert_close(seen.maps[0], wanted, atol=1e-5, rtol=1e-3)


def test_portrait_and_landscape_crops_lie_in_the_picture():
    model, config = llava(), CarveConfig(max_new_tokens=2, final="refined")
    for size in ((40, 24), (24, 40)):
        out = carve_answer(model, Processor(), Image.effect_noise(size, 80).convert("RGB"), "Where?", config)
        assert out.score.shape == (size[1], size[0])
        rows, columns = out.mask.any(1).nonzero()[:, 0], out.mask.any(0).nonzero()[:, 0]
        assert out.crop == (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        left, top, right, bottom = out.crop
        scale = max(size[0] / (right - left), size[1] / (bottom - top))
        assert out.refined.size == (round((right - left) * scale), round((bottom - top) * scale))


@torch.no_grad()
def test_several_questions_are_answered_as_each_alone():
    class Batches(Processor):
        def __call__(self, *, images, text, return_tensors, padding=False, padding_side=None):
            if not padding:
                return super().__call__(images=images, text=text, return_tensors=return_tensors)
            assert padding_side == "left"
            each = [
                super(Batches, self).__call__(images=i, text=t, return_tensors="pt")
                for i, t in zip(images, text, strict=True)
            ]
            width = max(e["input_ids"].shape[1] for e in each)
            found = {}
            for k in ("input_ids", "attention_mask"):
                found[k] = torch.cat([torch.nn.functional.pad(e[k], (width - e[k].shape[1], 0)) for e in each])
            return {**found, "pixel_values": torch.cat([e["pixel_values"] for e in each])}

    model, config = llava(), CarveConfig(max_new_tokens=3, suffix="")
    pictures = [Image.effect_noise((40, 24), 80).convert("RGB"), Image.effect_noise((20, 20), 40).convert("RGB")]
    pictures.append(pictures[0])
    questions, cache = ["Where?", "Who", "What is it?"], PictureCache()
    together = carve_answers(model, Batches(), pictures, questions, config, cache=cache)
    for picture, asked, many in zip(pictures, questions, together, strict=True):
        one = carve_answer(model, Batches(), picture, asked, config)
        assert (one.original_answer, one.answer, one.crop) == (many.original_answer, many.answer, many.crop)
        torch.testing.assert_close(one.score, many.score, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="one question for each"):
        carve_answers(model, Batches(), pictures, questions[:1], config)
