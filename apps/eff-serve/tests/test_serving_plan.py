"""What a server of one model says of its memory."""

from types import SimpleNamespace

from eff_serve.api import Settings
from eff_serve.serving_plan import one_model


def test_the_memory_of_a_model_is_its_weights_and_its_room_for_keys():
    shape = SimpleNamespace(architecture="LlamaForCausalLM", eos_token_ids=frozenset({2}))
    engine = SimpleNamespace(
        decoder=SimpleNamespace(config=shape, weight_bytes=40),
        max_model_len=8,
        start=lambda: None,
        stats=lambda: None,
    )
    tokenizer = SimpleNamespace(vocab_size=3, dialect=None, thinks=False)
    model = SimpleNamespace(
        engine=engine, tokenizer=tokenizer, quantization="int8", fingerprint="eff-1", memory=70, eyes=None
    )
    models = one_model(model, Settings(model_id="a"))
    settings = models.default.settings
    assert (settings.family, settings.quantization, settings.weight_bytes) == ("llama", "int8", 40)
    assert models.memory == 70
    assert 'eff_model_memory_bytes{model_name="a"} 70.0' in models.families.render().decode()
