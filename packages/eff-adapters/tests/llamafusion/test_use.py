"""Saving, copies, threads, checkpointing, compiling, autocast, other hosts, and bad input."""

import io
import threading

import pytest
import torch
from eff_adapters.llamafusion import ModalityTowerConfig, add_modality_tower, load_modality_tower, pack, save_pretrained


@pytest.mark.parametrize(
    "changes",
    [{}, {"image_rank": 2}, {"separation": "none", "text_lr_ratio": 1.0}, {"text_lr_ratio": 0.1}, {"patchify": "unet"}],
)
@torch.no_grad()
def test_save_and_load(tiny, tower, batch, fixed, tmp_path, changes):
    mm = tower(unet_channels=(8, 16), **changes)
    if mm.config.trains_text:
        for p in mm.text_parameters().values():
            p.add_(0.01)
    wanted = mm(**batch(), **fixed()).noise_pred
    save_pretrained(mm, tmp_path / "a")
    again = load_modality_tower(tiny(), tmp_path / "a")
    assert again.config == mm.config
    assert torch.equal(again(**batch(), **fixed()).noise_pred, wanted)
    assert {f.name for f in (tmp_path / "a").iterdir()} == {"modality_config.json", "modality.safetensors"}


def test_folder_of_another_model(tiny, tower, tmp_path):
    save_pretrained(tower(), tmp_path)
    other = tiny(num_hidden_layers=3)
    with pytest.raises(ValueError, match="another model"):
        load_modality_tower(other, tmp_path)
    assert "text" not in dict(other.model.layers[0].mlp.named_children())


@torch.no_grad()
def test_copies_and_pickles(tower, batch, fixed, copies):
    mm = tower(image_rank=2)
    wanted = mm(**batch(), **fixed()).loss
    file = io.BytesIO()
    torch.save(mm, file)
    file.seek(0)
    twins = [copies(mm), torch.load(file, weights_only=False)]
    mm.remove()
    for p in mm.parameters():
        p.zero_()
    for twin in twins:
        assert torch.equal(twin(**batch(), **fixed()).loss, wanted)
        with pytest.raises(RuntimeError, match="copy"):
            twin.remove()


@pytest.mark.filterwarnings("ignore:.*checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tower, batch, fixed, reentrant):
    mm = tower().train()

    def gradients():
        mm.zero_grad()
        mm(**batch(), **fixed()).loss.backward()
        return {n: p.grad.clone() for n, p in mm.picture_parameters().items()}

    wanted = gradients()
    mm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, wanted[name], msg=name)


@torch.no_grad()
def test_two_threads(tower, batch, fixed):
    mm = tower()
    jobs = [lambda: mm(**batch(), **fixed()).loss, lambda: mm.model(torch.arange(1, 9)[None]).logits]
    wanted, found = [job() for job in jobs], []

    def work(i):
        with torch.no_grad():
            found.extend(torch.equal(jobs[i](), wanted[i]) for _ in range(10))

    both = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in both:
        t.start()
    for t in both:
        t.join()
    assert found == [True] * 20


@pytest.mark.slow
@torch.no_grad()
def test_compiled(tower, batch, fixed):
    mm = tower()
    wanted = mm(**batch(), **fixed()).noise_pred
    torch._dynamo.reset()
    found = torch.compile(mm, backend="eager")(**batch(), **fixed()).noise_pred
    torch._dynamo.reset()
    torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_bfloat16_and_autocast(tower, batch, fixed):
    mm = tower()
    wanted = mm(**batch(), **fixed())
    with torch.autocast("cpu", torch.bfloat16):
        found = mm(**batch(), **fixed())
    assert found.loss.dtype == torch.float32
    assert abs(found.loss - wanted.loss) < 0.03 * wanted.loss
    half = mm.bfloat16()(**batch(), **fixed())
    assert half.loss.dtype == torch.float32
    assert abs(half.loss - wanted.loss) < 0.05 * wanted.loss


def test_adapter_of_peft_on_both_sides(tower, batch, fixed):
    peft = pytest.importorskip("peft")
    mm = tower()
    with torch.no_grad():
        wanted = mm(**batch(), **fixed()).loss
    peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=r".*q_proj\.(text|picture)", init_lora_weights=False), mm.model
    )
    assert not torch.equal(mm(**batch(), **fixed()).loss, wanted)


@torch.no_grad()
def test_model_with_eyes(tiny, config):
    """LLaVA reads by its own eyes, which is text here, and gets a tower to draw with."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=tiny().config, image_token_id=60, vision_feature_layer=-1)
    ).eval()
    assert isinstance(model.config.text_config, LlamaConfig)
    ids = torch.tensor([[1, 60, 60, 60, 60, 7, 8]])
    seen = {"pixel_values": torch.randn(1, 3, 8, 8)}
    wanted = model(ids, **seen).logits
    mm = add_modality_tower(model, config())
    assert torch.equal(model(ids, **seen).logits, wanted)
    batch = pack([[ids[0], torch.randn(2, 4, 4)]], config())
    one = mm(**batch, **seen, timesteps=torch.tensor([5]), noise=torch.zeros(1, 2, 4, 4))
    seen["pixel_values"] += 1
    other = mm(**batch, **seen, timesteps=torch.tensor([5]), noise=torch.zeros(1, 2, 4, 4))
    assert not torch.equal(one.noise_pred, other.noise_pred)


def test_pixels(tower, batch, fixed):
    mm = tower()
    data = batch()
    data["latents"] = None
    with pytest.raises(ValueError, match="need a VAE"):
        mm(**data, pixels=torch.zeros(2, 3, 8, 8))
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, scaling_factor=0.5, shift_factor=0.1,
    ).eval()  # fmt: skip
    mm.vae = vae
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        latents = mm.encode(pixels)
        assert torch.equal(latents, (vae.encode(pixels).latent_dist.mode() - 0.1) * 0.5)
        assert torch.equal(
            mm(**data, **fixed(), pixels=pixels).loss, mm(**{**data, "latents": latents}, **fixed()).loss
        )
        torch.testing.assert_close(mm.decode(latents), vae.decode(latents / 0.5 + 0.1).sample)


def test_batches_with_dropped_captions(config):
    row = [torch.tensor([1, 5]), torch.zeros(2, 4, 4), torch.tensor([2])]
    g = torch.Generator().manual_seed(0)
    found = [pack([row], config(caption_dropout=0.3), generator=g)["input_ids"].shape[1] for _ in range(200)]
    assert set(found) == {9, 7}
    assert 0.2 < found.count(7) / 200 < 0.4
    assert pack([row], config(caption_dropout=1.0))["input_ids"].shape[1] == 9
    with pytest.raises(ValueError, match="latents have shape"):
        pack([[torch.zeros(3, 4, 4)]], config())
    with pytest.raises(TypeError, match="a part is"):
        pack([[torch.zeros(2, 2, dtype=torch.long)]], config())


def _spoil(data, name):
    if name == "short":
        data["modality_ids"][0, 7] = 0
    elif name == "no marker":
        data["input_ids"][0, 4] = 9
    elif name == "no block":
        data["input_ids"][0, -1] = 64
    elif name == "latents":
        data["latents"] = data["latents"][:1]
    elif name == "shape":
        data["latents"] = data["latents"][:, :, :2]
    elif name == "both sides":
        data["attention_mask"][1, 0] = 0
        data["attention_mask"][0, -1] = 0
    elif name == "hidden picture":
        data["attention_mask"][0, 6] = 0
    elif name == "times":
        data["timesteps"] = torch.tensor([0, 1000])
    elif name == "few times":
        data["timesteps"] = torch.tensor([0])
    elif name == "mask":
        data["attention_mask"] = data["attention_mask"][:, 1:]
    return data


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("short", "use 4 tokens a picture"),
        ("no marker", "no opening marker"),
        ("no block", "no block of picture tokens"),
        ("latents", "holds 2 pictures, latents 1"),
        ("shape", r"use \[2, 4, 4\]|use \(2, 4, 4\)|latents have shape"),
        ("both sides", "all on one side"),
        ("hidden picture", "hides picture tokens"),
        ("times", "use 0 to 999"),
        ("few times", r"use int64 \[2\]"),
        ("mask", "all tokens"),
    ],
)
def test_wrong_rows(tower, batch, name, words):
    data = _spoil(batch(), name)
    with pytest.raises(ValueError, match=words):
        tower()(**data)


def test_a_cache_may_not_cut_a_picture(tower):
    from transformers import DynamicCache

    mm = tower()
    cache = DynamicCache(config=mm.decoder.config)
    ids, modality = torch.tensor([[1, 64]]), torch.tensor([[0, 0]])
    mm.model(ids.clamp(max=63), past_key_values=cache)
    block, z = torch.tensor([[0, 0, 0, 0]]), torch.zeros(1, 2, 4, 4)
    out = mm(block, torch.ones_like(block), latents=z, past_key_values=cache)  # the marker is in the cache
    assert out.past_key_values.get_seq_length() == 6
    assert modality.sum() == 0
    with pytest.raises(ValueError, match="use 4 tokens a picture"):
        mm(block[:, :2], torch.ones_like(block[:, :2]), latents=z, past_key_values=cache)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"boi_token_id": 65}, "use two ids"),
        ({"tokens_per_image": 5}, "square"),
        ({"tokens_per_image": 9}, "divisor"),
        ({"patchify": "unet", "latent_size": 8}, "patchify='linear'"),
        ({"image_rank": 0}, "image_rank=0"),
        ({"separation": "wide"}, "'deep'"),
        ({"caption_dropout": 2.0}, "chance"),
        ({"loss_lambda": -1.0}, "0 or more"),
        ({"latent_channels": 0}, "use 1 or more"),
        ({"unet_channels": (6, 8)}, "multiples of 4"),
        ({"max_t_when_image_first": -1}, "0 or more"),
    ],
)
def test_wrong_settings(config, changes, words):
    with pytest.raises(ValueError, match=words):
        config(**changes)


def test_settings_travel(config):
    made = config(image_rank=4)
    assert ModalityTowerConfig.from_dict(made.to_dict()) == made


def test_other_models_are_refused(config):
    from transformers import GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM

    small = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    with pytest.raises(ValueError, match="is not a Llama-type model"):
        add_modality_tower(small, config())
    scaled = GraniteForCausalLM(
        GraniteConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, logits_scaling=8.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="logits_scaling"):
        add_modality_tower(scaled, config())
