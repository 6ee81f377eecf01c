"""LoRA adapters in the decoder and the engine, on tiny random models, against PEFT."""

import asyncio
import json

import pytest
import torch
from eff_serve.engine.decoder import PAGE, Decoder
from eff_serve.engine.engine import BatchEngine
from eff_serve.engine.types import Sampling
from eff_serve.engine_config import EngineConfig

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


def test_steps_with_adapters_are_recorded(tiny_model, three, monkeypatch):
    """Steps from the tape have the bits of steps without it, also after an adapter came or went."""
    folders = {name: folder for name, (folder, _) in three.items()}
    taped, plain = (Decoder(tiny_model("llama"), num_pages=24) for _ in range(2))
    for decoder in (taped, plain):
        decoder.load_adapters({n: folders[n] for n in ("first", "wide")})
    monkeypatch.setattr(plain, "_adapted_steps", plain._adapted_step)
    tables = torch.arange(6, dtype=torch.int32).view(3, 2)
    for decoder in (taped, plain):
        for row in range(3):
            decoder.prefill(torch.tensor(PROMPT), 0, tables[row].long())
    place = len(PROMPT)

    def steps(*batches):
        nonlocal place
        for numbers in batches:
            given = torch.tensor([7, 8, 9]), torch.full((3,), place), tables
            one, other = (d.decode(*given, adapters=torch.tensor(numbers)).clone() for d in (taped, plain))
            assert torch.equal(one, other)
            place += 1

    steps([0, 1, 0], [1, -1, 0], [-1, -1, 1])
    assert taped._adapted_steps.recorded == 1
    for decoder in (taped, plain):
        decoder.adapters.load("late", folders["late"])
    steps([2, 1, 0])
    for decoder in (taped, plain):
        decoder.adapters.unload("first")
    steps([2, 1, -1], [1, 1, 1])
    assert taped._adapted_steps.recorded == 1


def test_requests_choose_their_adapter(tiny_model, three):
    folder = tiny_model("llama")
    decoder = Decoder(folder, num_pages=64)
    decoder.load_adapters({name: path for name, (path, _) in three.items()})

    async def ask(engine, adapter):
        stream = engine.submit(PROMPT, Sampling(max_tokens=6, temperature=0.0, ignore_eos=True, adapter=adapter))
        return [step.token async for step in stream if step.token is not None]

    async def all_of(engine, names):
        return await asyncio.gather(*(ask(engine, name) for name in names))

    engine = BatchEngine(decoder, EngineConfig(max_model_len=4 * PAGE), tokenizer_file=folder / "tokenizer.json")
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


@pytest.fixture
def mixture(tiny_model, adapter, tmp_path):
    """A folder of `eff_adapters.lora_mixer` over two adapters, and the model that has the mixture."""

    def make(name="mix", **options):
        from eff_adapters.lora_mixer import LoraMixerConfig, apply_lora_mixer
        from transformers import AutoModelForCausalLM

        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
        wide = adapter(f"{name}-wide", rank=8, targets=("q_proj", "k_proj", "v_proj", "up_proj"), seed=5)[0]
        small = adapter(f"{name}-small", targets=("q_proj", "down_proj"), seed=6, layers=[0, 2])[0]
        targets = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
        config = LoraMixerConfig(target_modules=targets, router_init_std=1.0, **{"top_k": 1, **options})
        mixer = apply_lora_mixer(model, config, experts={"wide": wide, "small": small, "again": wide})
        mixer.save_pretrained(tmp_path / name)
        return tmp_path / name, model

    return make


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 2, "router_scope": "input", "temperature": 2.0}, {"top_k": 3}], ids=str
)
def test_a_mixture_is_that_of_the_library(tiny_model, mixture, options):
    folder, model = mixture(**options)
    decoder = Decoder(tiny_model("llama"), num_pages=24)
    decoder.load_adapters({"mix": folder})
    found = decoder.prefill(torch.tensor(PROMPT), 0, torch.arange(2), all_logits=True, adapter=0)
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert decoder.weight_bytes > Decoder(tiny_model("llama"), num_pages=24).weight_bytes


def test_mixtures_and_adapters_in_one_batch(tiny_model, three, mixture):
    decoder = Decoder(tiny_model("llama"), num_pages=24)
    decoder.load_adapters({"first": three["first"][0], "mix": mixture()[0], "other": mixture("other", top_k=2)[0]})
    numbers = [1, -1, 0, 2, 1]
    tables = torch.arange(10, dtype=torch.int32).view(5, 2)
    for row, number in enumerate(numbers):
        decoder.prefill(torch.tensor(PROMPT), 0, tables[row].long(), adapter=number)
    tokens, positions = torch.tensor([7] * 5), torch.full((5,), len(PROMPT))
    together = decoder.decode(tokens, positions, tables, adapters=torch.tensor(numbers))
    for row, number in enumerate(numbers):
        given = None if number < 0 else torch.tensor([number])
        alone = decoder.decode(tokens[:1], positions[:1], tables[row : row + 1], adapters=given)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(together[0], together[4])
    assert not torch.allclose(together[0], together[3], atol=1e-3)


def test_running_requests_end_on_what_they_began_with(tiny_model, adapter):
    folder = tiny_model("llama")
    old, new = adapter("old", seed=1)[0], adapter("new", rank=8, seed=2)[0]

    def engine_with(path):
        decoder = Decoder(folder, num_pages=64)
        if path is not None:
            decoder.load_adapters({"a": path})
        return BatchEngine(decoder, EngineConfig(max_model_len=4 * PAGE), tokenizer_file=folder / "tokenizer.json")

    async def tokens_of(stream, meanwhile=None):
        found = []
        async for step in stream:
            if step.token is not None:
                found.append(step.token)
                if len(found) == 3 and meanwhile is not None:
                    await asyncio.to_thread(meanwhile)
        return found

    def ask(engine):
        return engine.submit(PROMPT, Sampling(max_tokens=24, temperature=0.0, ignore_eos=True, adapter="a"))

    async def alone(path):
        return await tokens_of(ask_started(path))

    engines = []

    def ask_started(path):
        engines.append(engine_with(path))
        engines[-1].start()
        return ask(engines[-1])

    wanted_old, wanted_new = asyncio.run(alone(old)), asyncio.run(alone(new))
    assert wanted_old != wanted_new
    engine = engine_with(None)
    engines.append(engine)
    with pytest.raises(ValueError, match="holds no adapters"):
        engine.unload_adapter("a")
    engine.load_adapter("a", old)
    engine.start()

    async def exchange():
        first = ask(engine)
        found = await tokens_of(first, lambda: engine.load_adapter("a", new, replace=True))
        return found, await tokens_of(ask(engine), lambda: engine.unload_adapter("a"))

    try:
        before, after = asyncio.run(exchange())
        assert before == wanted_old
        assert after == wanted_new
        assert engine.adapters == ()
        with pytest.raises(ValueError, match="no adapter 'a'"):
            asyncio.run(alone_in(engine, ask))
    finally:
        for one in engines:
            one.stop(0)


async def alone_in(engine, ask):
    ask(engine)


def test_memory_of_unused_adapters_is_given_back(tiny_model, three, mixture):
    decoder = Decoder(tiny_model("llama"), num_pages=8)
    decoder.load_adapters({"first": three["first"][0]})
    shelf, few = decoder.adapters, decoder.adapters.nbytes
    shelf.load("wide", three["wide"][0])
    shelf.load("mix", mixture()[0])
    assert shelf.names == ("first", "wide", "mix")
    held = shelf.get("wide")
    number = held.number
    shelf.unload("wide")
    shelf.unload("mix")
    assert shelf.rows(torch.tensor([number])).slots.tolist() == [[1]]  # a request has it yet
    assert shelf.nbytes > few
    del held
    shelf.load("late", three["late"][0])
    shelf.unload("late")
    assert shelf.nbytes == few
    with pytest.raises(ValueError, match=f"no adapter of number {number}"):
        shelf.rows(torch.tensor([number]))


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_that_is_refused_changes_nothing(tiny_model, adapter, replace):
    good, bad = adapter("good")[0], adapter("bad", seed=4)[0]
    change(bad, shape=True)
    decoder = Decoder(tiny_model("llama"), num_pages=8)
    decoder.load_adapters({"a": good})
    before = decoder.prefill(torch.tensor(PROMPT), 0, torch.arange(2), adapter=0)
    with pytest.raises(ValueError, match="another one" if replace else "already"):
        decoder.adapters.load("a", bad, replace=replace)
    with pytest.raises(ValueError, match="another one"):
        decoder.adapters.load("b", bad)
    assert decoder.adapters.names == ("a",)
    assert decoder.adapters.get("a").number == 0
    assert torch.equal(decoder.prefill(torch.tensor(PROMPT), 0, torch.arange(2), adapter=0), before)


def routers(folder, **more):
    from safetensors.torch import load_file, save_file

    path = folder / "routers.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    if more.get("drop"):
        del tensors[first]
    if more.get("narrow"):
        tensors[first] = tensors[first][:, :-1].contiguous()
    if more.get("extra"):
        tensors["model.layers.0.self_attn.o_proj"] = torch.zeros(3, 2)
    save_file(tensors, path)


def mixer_config(folder, config=None, **more):
    path = folder / "mixer_config.json"
    content = json.loads(path.read_text())
    content["config"].update(config or {})
    path.write_text(json.dumps({**content, **more}))


def pickled(folder):
    expert = folder / "experts" / "small"
    (expert / "adapter_model.safetensors").rename(expert / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (lambda f: mixer_config(f, {"top_k": 4}), ValueError, "top_k=4 is more than the 3 experts"),
        (lambda f: mixer_config(f, mode="hard"), ValueError, "mode 'hard'"),
        (lambda f: mixer_config(f, version=9), ValueError, "version 9"),
        (lambda f: mixer_config(f, experts=["wide", "../x", "again"]), ValueError, "expert name"),
        (lambda f: (f / "routers.safetensors").unlink(), FileNotFoundError, "routers.safetensors"),
        (lambda f: (f / "routers.safetensors").write_bytes(b"cut"), ValueError, "complete safetensors"),
        (lambda f: routers(f, drop=True), ValueError, "it has none"),
        (lambda f: routers(f, narrow=True), ValueError, "needs a finite router"),
        (lambda f: routers(f, extra=True), ValueError, "does not say it routes"),
        (lambda f: (f / "experts" / "small" / "adapter_model.safetensors").unlink(), FileNotFoundError, "small"),
        (pickled, ValueError, "pickle"),
        (lambda f: change(f / "experts" / "wide", lambda k: k.replace("layers.0", "layers.9")), ValueError, "not have"),
        (lambda f: settings(f / "experts" / "wide", use_dora=True), ValueError, "DoRA|dora"),
    ],
)
def test_bad_mixtures(tiny_model, mixture, spoil, error, text):
    folder, _ = mixture()
    spoil(folder)
    decoder = Decoder(tiny_model("llama"), num_pages=8)
    with pytest.raises(error, match=text):
        decoder.load_adapters({"mix": folder})
    assert decoder.adapters is None


def test_a_pickle_is_never_opened(tiny_model, adapter):
    folder, _ = adapter("old")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        Decoder(tiny_model("llama"), num_pages=8).load_adapters({"old": folder})
