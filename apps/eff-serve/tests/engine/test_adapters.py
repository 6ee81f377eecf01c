"""LoRA adapters in the decoder and the engine, on tiny random models, against PEFT."""

import asyncio
import json

import pytest
import torch
from eff_serve.engine.decoder import PAGE, Decoder
from eff_serve.engine.engine import BatchEngine
from eff_serve.engine.types import Sampling

PROMPT = list(range(5, 21))
# PEFT asks models of transformers for a name that is going to be another one.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """Make a folder as PEFT writes it."""

    def make(name, *, rank=4, targets=("q_proj", "down_proj"), seed=0, layers=None):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), layers_to_transform=layers)
        model = get_peft_model(base, config)
        for key, p in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(p, std=0.2)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, model.eval()

    return make


@pytest.fixture
def three(adapter):
    return {
        "first": adapter("first"),
        "wide": adapter(
            "wide", rank=8, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), seed=1
        ),
        "late": adapter("late", targets=("v_proj",), layers=[2], seed=2),
    }


def test_logits_are_those_of_peft(tiny_model, three):
    decoder = Decoder(tiny_model("llama"), num_pages=24)
    plain = decoder.prefill(torch.tensor(PROMPT), 0, torch.arange(2), all_logits=True)
    decoder.load_adapters({name: folder for name, (folder, _) in three.items()})
    for number, (_, model) in enumerate(three.values()):
        found = decoder.prefill(torch.tensor(PROMPT), 0, torch.arange(2), all_logits=True, adapter=number)
        with torch.no_grad():
            wanted = model(torch.tensor([PROMPT])).logits[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, plain, atol=1e-3)
    assert torch.equal(decoder.prefill(torch.tensor(PROMPT), 0, torch.arange(2), all_logits=True), plain)
    assert decoder.weight_bytes > Decoder(tiny_model("llama"), num_pages=24).weight_bytes


def test_a_mixed_batch_gives_each_its_own(tiny_model, three):
    decoder = Decoder(tiny_model("llama"), num_pages=24)
    decoder.load_adapters({name: folder for name, (folder, _) in three.items()})
    numbers = [-1, 0, 1, 2, 1]
    tables = torch.arange(10, dtype=torch.int32).view(5, 2)
    for row, number in enumerate(numbers):
        decoder.prefill(torch.tensor(PROMPT), 0, tables[row].long(), adapter=number)
    tokens, positions = torch.tensor([7, 7, 7, 7, 7]), torch.full((5,), len(PROMPT))
    together = decoder.decode(tokens, positions, tables, adapters=torch.tensor(numbers))
    for row, number in enumerate(numbers):
        alone = decoder.decode(
            tokens[:1], positions[:1], tables[row : row + 1], adapters=None if number < 0 else torch.tensor([number])
        )
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[2], together[4], rtol=0, atol=0)
    assert len({int(row.argmax()) for row in together}) > 1 or not torch.allclose(together[0], together[2])


def test_requests_choose_their_adapter(tiny_model, three):
    folder = tiny_model("llama")
    decoder = Decoder(folder, num_pages=64)
    decoder.load_adapters({name: path for name, (path, _) in three.items()})

    async def ask(engine, adapter):
        stream = engine.submit(PROMPT, Sampling(max_tokens=6, temperature=0.0, ignore_eos=True, adapter=adapter))
        return [step.token async for step in stream if step.token is not None]

    async def all_of(engine, names):
        return await asyncio.gather(*(ask(engine, name) for name in names))

    engine = BatchEngine(decoder, tokenizer_file=folder / "tokenizer.json", max_model_len=4 * PAGE)
    assert engine.adapters == ("first", "wide", "late")
    engine.start()
    try:
        names = [None, "first", "wide", "late"]
        together = asyncio.run(all_of(engine, names))
        alone = [asyncio.run(all_of(engine, [name]))[0] for name in names]
        assert together == alone
        assert together[1] != together[0]
        with pytest.raises(ValueError, match="no adapter 'other'"):
            asyncio.run(ask(engine, "other"))
    finally:
        engine.stop(0)


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "adapter_model.safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("{"), ValueError, "JSON"),
        (lambda f: change(f, lambda k: k.replace("layers.0", "layers.9")), ValueError, "does not have"),
        (lambda f: change(f, shape=True), ValueError, "another one"),
        (lambda f: change(f, nan=True), ValueError, "not finite"),
        (lambda f: settings(f, use_dora=True), ValueError, "DoRA|dora"),
    ],
)
def test_bad_folders(tiny_model, adapter, spoil, error, text):
    folder, _ = adapter("bad")
    spoil(folder)
    decoder = Decoder(tiny_model("llama"), num_pages=8)
    with pytest.raises(error, match=text):
        decoder.load_adapters({"bad": folder})
    assert decoder.adapters is None


def test_names_are_plain(tiny_model, adapter):
    with pytest.raises(ValueError, match="adapter name"):
        Decoder(tiny_model("llama"), num_pages=8).load_adapters({"a b": adapter("x")[0]})


def change(folder, rename=lambda k: k, *, shape=False, nan=False):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(k for k in tensors if "lora_A" in k)
    if shape:
        tensors[key] = tensors[key][:, :-1].contiguous()
    if nan:
        tensors[key] = tensors[key] * torch.nan
    save_file({rename(k): v for k, v in tensors.items()}, folder / "adapter_model.safetensors")


def settings(folder, **more):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
