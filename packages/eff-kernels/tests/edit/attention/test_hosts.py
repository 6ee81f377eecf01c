"""What a host may do with a model that has rules: copy, pickle, compile, train, run in threads, wrap in PEFT."""

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
from eff_kernels.edit.attention import attend_explicit, intercept_attention, observe_attention

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

KINDS = ["llama", "gpt2", "gpt_oss", "timm_style", "sd3", "flux"]


class Scale:
    """A rule with a state of its own, which copies and pickles carry along."""

    def __init__(self, by=0.5):
        self.by = by

    def __call__(self, call, attend):
        return attend(call).out * self.by


class Twice(torch.nn.Module):
    """A rule that is a module, with a weight to learn."""

    def __init__(self):
        super().__init__()
        self.by = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, call, attend):
        return attend.with_weights(call, lambda w, part: w * self.by, heads=[0])


def halve_first(weights, part):
    return weights / 2


def steer(call, attend):
    return attend.with_weights(call, halve_first, heads=[0, 1])


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_copies_and_pickles_are_models_of_their_own(zoo, name):
    model, arguments = zoo(name)
    before = zoo.answer(model, arguments)
    rule = Scale()
    handle = intercept_attention(model, rule)
    observer = observe_attention(model, lambda c, o: None)  # a lambda cannot be pickled, and is not
    changed = zoo.answer(model, arguments)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    again = pickle.loads(pickle.dumps(twin))
    rule.by = 2.0
    for other in (twin, loaded, again):
        assert torch.equal(zoo.answer(other, arguments), changed)
    handle.remove()
    observer.remove()
    assert torch.equal(zoo.answer(model, arguments), before)
    for other in (twin, loaded, again):
        assert torch.equal(zoo.answer(other, arguments), changed)
    for parameter in twin.parameters():
        parameter.mul_(1.5)
    assert torch.equal(zoo.answer(model, arguments), before)
    assert not torch.equal(zoo.answer(twin, arguments), changed)


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_compiled_in_one_graph(zoo, name):
    model, arguments = zoo(name)
    if name == "gpt_oss":
        model.set_experts_implementation("batched_mm")
    arguments = {**arguments, **({"use_cache": False} if name in ("llama", "gpt2", "gpt_oss") else {})}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = zoo.answer(model, arguments)
    with intercept_attention(model, steer):
        torch.testing.assert_close(zoo.answer(compiled, arguments), zoo.answer(model, arguments), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(zoo.answer(compiled, arguments), before, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama", "timm_style", "dinov3", "sd3", "flux", "unet"])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_autocast(zoo, name):
    """Under autocast queries may come in another type than values; the rule's output is what the host expects."""
    model, arguments = zoo(name)
    seen = []

    def look(call, attend):
        output = attend(call)
        explicit = attend_explicit(call)
        seen.append(call.dtype)
        assert output.out.dtype == explicit.out.dtype == call.dtype == torch.bfloat16
        # both round to 8 bits; the host's kernel rounds weights as well
        assert (output.out - explicit.out).abs().max() <= 2**-6 * call.v.abs().max()
        return output

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = zoo.answer(model, arguments)
        with intercept_attention(model, look):
            assert torch.equal(zoo.answer(model, arguments), before)
        with intercept_attention(model, steer):
            assert zoo.answer(model, arguments).isfinite().all()
    assert seen


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "timm_style"])
@pytest.mark.filterwarnings("ignore")
def test_double_stays_double(zoo, name):
    model, arguments = zoo(name)
    model.double()
    if name == "gpt_oss":
        model.set_experts_implementation("eager")
    arguments = {n: x.double() if x.is_floating_point() else x for n, x in arguments.items()}
    with torch.no_grad():
        before = zoo.answer(model, arguments)
        with intercept_attention(model, lambda c, a: attend_explicit(c)):
            torch.testing.assert_close(zoo.answer(model, arguments), before, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rule", [steer, Twice])
def test_gradient_checkpointing(zoo, reentrant, rule):
    model, arguments = zoo("llama")
    model.train()
    calls = []
    rule = rule() if isinstance(rule, type) else rule

    def gradients():
        model.zero_grad()
        if isinstance(rule, Twice):
            rule.by.grad = None
        model(**arguments, labels=arguments["input_ids"], use_cache=False).loss.backward()
        extra = [rule.by.grad] if isinstance(rule, Twice) else []
        return [p.grad.clone() for p in model.parameters()] + [g.clone() for g in extra]

    with intercept_attention(model, rule), observe_attention(model, lambda c, o: calls.append(c.recomputed)):
        want = gradients()
        assert calls == [False] * 2
        calls.clear()
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(
            {"use_reentrant": reentrant}
        )
        if reentrant:
            model.enable_input_require_grads()
        for have, expected in zip(gradients(), want, strict=True):
            torch.testing.assert_close(have, expected, atol=1e-6, rtol=1e-5)
        assert calls == [False] * 2  # an observer is not told twice
    assert want[-1].abs().max() > 0


def test_flux_streams_in_recomputed_blocks(zoo):
    model, arguments = zoo("flux")
    model.train().enable_gradient_checkpointing()
    seen = []
    with observe_attention(model, lambda c, o: seen.append((c.recomputed, dict(c.streams))), grad=True):
        model(**arguments).sample.sum().backward()
    want = {"text": slice(0, 5), "image": slice(5, 21)}
    assert seen == [(False, want)] * 4 + [(True, want)] * 4


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "timm_style", "flux"])
def test_threads_do_not_meet(zoo, name):
    model, arguments = zoo(name)
    size = {"llama": "input_ids", "timm_style": "input", "flux": "encoder_hidden_states"}[name]
    inputs = [{**arguments, size: arguments[size][:, : n + 2]} for n in range(3)]
    if name == "flux":
        inputs = [{**x, "txt_ids": torch.zeros(x[size].shape[1], 3)} for x in inputs]

    def by_length(call, attend):
        text = call.streams["text"].stop if call.streams else call.num_queries
        return attend.with_weights(call, lambda w, part: w / text)

    with intercept_attention(model, by_length):
        want = [zoo.answer(model, x) for x in inputs]
        wrong = []

        def work(index):
            wrong.extend(index for _ in range(10) if not torch.equal(zoo.answer(model, inputs[index]), want[index]))

        with torch.no_grad():
            threads = [threading.Thread(target=lambda i=i: torch.no_grad()(work)(i)) for i in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not wrong


@torch.no_grad()
def test_the_hosts_implementation_can_be_changed_meanwhile(zoo):
    model, arguments = zoo("llama")
    plain = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        plain[name] = zoo.answer(model, arguments)
    with intercept_attention(model, lambda c, a: a(c)):
        for name in ("eager", "sdpa", "eager"):
            model.set_attn_implementation(name)
            assert model.config._attn_implementation == name
            assert torch.equal(zoo.answer(model, arguments), plain[name])
            assert bool(model(**arguments, output_attentions=True).attentions) == (name == "eager")
    assert torch.equal(zoo.answer(model, arguments), plain["eager"])
    assert model.model.layers[0].self_attn.config is model.config


@torch.no_grad()
def test_saved_models_know_nothing_of_rules(zoo, tmp_path):
    model, arguments = zoo("llama")
    before = zoo.answer(model, arguments)
    with intercept_attention(model, Scale()):
        model.save_pretrained(tmp_path)
        assert "eff" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(zoo.answer(loaded, arguments), before)
    assert model.model.layers[0].self_attn.config == model.config


@torch.no_grad()
@pytest.mark.parametrize("more", [
    {}, {"cache_implementation": "static"}, {"num_beams": 2}, {"prefill_chunk_size": 4},
    {"prompt_lookup_num_tokens": 2},
], ids=str)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_generation(zoo, name, more):
    model, arguments = zoo(name)
    ids = arguments["input_ids"][:1] if "prompt_lookup_num_tokens" in more else arguments["input_ids"].clone()
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        mask[1, :3] = 0
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False, **more}
    plain = model.generate(**given)
    with intercept_attention(model, lambda c, a: a(c)):
        assert torch.equal(model.generate(**given), plain)
    with intercept_attention(model, lambda c, a: attend_explicit(c)):
        assert torch.equal(model.generate(**given), plain)
    assert torch.equal(model.generate(**given), plain)


@torch.no_grad()
def test_under_peft(zoo):
    peft = pytest.importorskip("peft")
    model, arguments = zoo("llama")
    before = zoo.answer(model, arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        ).eval()
    tuned = zoo.answer(wrapped, arguments)
    with intercept_attention(wrapped, Scale(0.5)) as handle:
        assert handle.report.changed[0].name == "base_model.model.model.layers.0.self_attn"
        half = zoo.answer(wrapped, arguments)
        with wrapped.disable_adapter():
            bare = zoo.answer(wrapped, arguments)
    assert torch.equal(zoo.answer(wrapped, arguments), tuned)
    with wrapped.disable_adapter():
        assert torch.equal(zoo.answer(wrapped, arguments), before)
        with intercept_attention(wrapped, Scale(0.5)):
            assert torch.equal(zoo.answer(wrapped, arguments), bare)
    assert not torch.equal(half, bare)


def test_dropout_of_the_host_is_kept(zoo):
    from transformers import LlamaConfig, LlamaForCausalLM

    _, arguments = zoo("llama")
    config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, attention_dropout=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    model = LlamaForCausalLM(config).train()
    torch.manual_seed(1)
    before = model(**arguments).logits
    seen = []

    def look(call, attend):
        seen.append(call.dropout)
        return attend(call)

    with intercept_attention(model, look):
        torch.manual_seed(1)
        assert torch.equal(model(**arguments).logits, before)
    assert seen == [0.5]
    call = []
    with observe_attention(model, lambda c, o: call.append(c)):
        model(**arguments)
    outs = torch.stack([attend_explicit(call[0]).out for _ in range(400)])
    dense_out = attend_explicit(call[0].replace(dropout=0.0)).out
    assert (outs.mean(0) - dense_out).abs().mean() < 0.1 * dense_out.abs().mean()
    assert outs.std(0).mean() > 0.1 * dense_out.abs().mean()


@pytest.mark.filterwarnings("ignore:_compile flag")
def test_flex_attention_masks_can_be_read(zoo):
    model, arguments = zoo("llama")
    model.set_attn_implementation("sdpa")
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :4] = 0
    calls = {}
    for name in ("sdpa", "flex_attention"):
        model.set_attn_implementation(name)
        with observe_attention(model, lambda c, o, name=name: calls.setdefault(name, (c, o))), torch.no_grad():
            model(**arguments, attention_mask=mask)
    flex, own = calls["flex_attention"], calls["sdpa"]
    assert not isinstance(flex[0].mask, torch.Tensor)
    real = mask[:, None, :, None].bool()
    assert torch.equal(flex[0].keep_mask() & real, own[0].keep_mask() & real)
    torch.testing.assert_close(attend_explicit(flex[0]).out * real, own[1].out * real, atol=1e-5, rtol=1e-5)


def test_imports_of_model_libraries_stay_out():
    import subprocess
    import sys

    code = (
        "import sys, eff_kernels.edit.attention; print([m for m in ('transformers', 'diffusers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_name_alone_is_refused(zoo):
    model, arguments = zoo("llama")
    with intercept_attention(model, steer):
        pass
    model.set_attn_implementation("eff_attention")
    with pytest.raises(RuntimeError, match="is set only by intercept_attention"):
        model(**arguments)
