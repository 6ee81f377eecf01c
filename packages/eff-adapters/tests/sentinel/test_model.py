"""Collating, sampling and training with a model of transformers."""

import copy
import dataclasses

import pytest
import torch
from eff_adapters.sentinel import (
    CDPOConfig,
    ContextPreferenceCollator,
    SentenceSampler,
    add_lora,
    answer_prefix,
    c_dpo_loss,
    c_dpo_step,
    pair_logps,
    train_c_dpo,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # by PEFT
SMALL = CDPOConfig(lora_r=4, lora_alpha=8, lr=2e-3, batch_size=4, micro_batch_size=2)


def _words(processor, ids):
    return processor.tokenizer.convert_ids_to_tokens(ids)


def test_labels_are_on_the_sentence_alone(processor, image, pair):
    batch = ContextPreferenceCollator(processor)([(image(), pair(win_ended=True)), (image(1), pair(context=""))])
    assert batch["input_ids"].shape == batch["labels"].shape
    assert len(batch["labels"]) == len(batch["pixel_values"]) == 4
    told = [_words(processor, row[row != -100]) for row in batch["labels"]]
    win, lose = ["The", "dog", "has", "a", "bone", "."], ["The", "dog", "and", "a", "cat", "are", "there", "."]
    assert told == [[*win, "</s>"], win, lose, lose]
    row = _words(processor, batch["input_ids"][0][batch["attention_mask"][0].bool()])
    assert row[0] == "<s>"
    assert row.count("<s>") == 1
    assert row.count("<image>") == 4
    assert row[-15:] == ["assistant:", *["A", "dog", "is", "near", "the", "tree", "."], *win, "</s>"]


def test_tokens_over_the_boundary():
    class Characters:
        """A processor whose tokens are characters, but a full stop and a following space are one."""

        class tokenizer:
            eos_token, bos_token = "!", None

        def __call__(self, images, text, **options):
            rows = [[ord(c) for c in t.replace(". ", "\x01")] for t in text]
            width = max(map(len, rows))
            ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
            return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    from eff_adapters.sentinel import PreferencePair

    collator = ContextPreferenceCollator(Characters(), prompt=lambda q: q + ": ")
    pair = PreferencePair(question="Q", context="Go.", y_win="Up.", y_lose="Down.")
    batch = collator([(None, pair)])
    assert batch["labels"][0][batch["labels"][0] != -100].tolist() == [1, *map(ord, "Up.")]
    assert collator.merged == 2
    first = collator([(None, dataclasses.replace(pair, context=""))])
    assert first["labels"][0][first["labels"][0] != -100].tolist() == list(map(ord, " Up."))


def test_long_pairs_are_left_out(processor, image, pair):
    long = pair(context=" ".join(["The dog is there."] * 8))
    collator = ContextPreferenceCollator(processor, max_length=40)
    with pytest.warns(UserWarning, match="1 pairs longer than 40"):
        batch = collator([(image(), long), (image(), pair())])
    assert len(batch["labels"]) == 2
    assert collator.dropped == 1
    with pytest.raises(ValueError, match="all 1 pairs"):
        collator([(image(), long)])
    with pytest.raises(ValueError, match="at least one pair"):
        collator([])
    with pytest.raises(ValueError, match="max_length=1"):
        ContextPreferenceCollator(processor, max_length=1)


def test_answer_prefix(processor):
    assert answer_prefix(processor, "there?").endswith("there? assistant: ")
    plain = copy.copy(processor)
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        answer_prefix(plain, "?")
    plain.chat_template = "<image> only the user"
    with pytest.raises(ValueError, match="does not hold"):
        answer_prefix(plain, "?")


def test_labels_on_the_context_change_nothing(llava, processor, image, pair):
    model = add_lora(llava, SMALL, init_lora_weights=False)
    with torch.no_grad():  # a policy away from its reference
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(0.3)
    found = []
    for also in (False, True):
        batch = ContextPreferenceCollator(processor, label_context=also)([(image(), pair()), (image(1), pair())])
        model.zero_grad()
        loss, _ = c_dpo_step(model, batch, SMALL)
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
    assert (batch["labels"] != -100).sum() > 40
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-5)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(grad, found[1][1][name], rtol=1e-4, atol=1e-5)


def test_padding_and_order_do_not_matter(llava, processor, image, pair):
    collator = ContextPreferenceCollator(processor)
    examples = [(image(), pair()), (image(1), pair(context="", y_win="A bone."))]
    with torch.no_grad():
        chosen, rejected = pair_logps(llava, collator(examples))
        for i in (0, 1):
            one, other = pair_logps(llava, collator(examples[i : i + 1]))
            torch.testing.assert_close(one[0], chosen[i], rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(other[0], rejected[i], rtol=1e-5, atol=1e-4)


def test_only_lora_trains(llava, processor, image, pair):
    before = {n: v.clone() for n, v in llava.state_dict().items()}
    inputs = ContextPreferenceCollator(processor)([(image(), pair())])
    plain = {k: v for k, v in inputs.items() if k != "labels"}
    with torch.no_grad():
        wanted = llava(**plain).logits
    model = add_lora(llava, SMALL)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".language_model." in n and "lora_" in n for n in trained)
    assert len(trained) == 2 * 2 * 7  # all linear layers of the two layers
    log = train_c_dpo(model, ContextPreferenceCollator(processor), [(image(i), pair()) for i in range(6)], SMALL)
    assert len(log) == 2
    assert {n for n, p in model.named_parameters() if p.grad is not None} <= trained
    with torch.no_grad():
        assert not torch.equal(model(**plain).logits, wanted)
        with model.disable_adapter():
            assert torch.equal(model(**plain).logits, wanted)
    again = model.unload()
    assert all(torch.equal(again.state_dict()[n], v) for n, v in before.items())


def test_training_prefers_good_sentences_on_pictures_it_has_not_seen(llava, processor, image, pair):
    def example(seed):
        first, second = ("dog", "cat") if seed % 2 else ("cat", "dog")
        context = f"The {first} is there."
        return image(seed), pair(context=context, y_win=f"The {first} has a bone.", y_lose=f"The {second} is near.")

    model, collator = add_lora(llava, SMALL), ContextPreferenceCollator(processor)
    with torch.no_grad():
        assert float(c_dpo_step(model, collator([example(90)]), SMALL)[0]) == pytest.approx(0.693147, abs=1e-6)
    config = dataclasses.replace(SMALL, epochs=6)
    seen = []
    log = train_c_dpo(model, collator, [example(i) for i in range(16)], config, on_update=seen.append)
    assert seen == log
    assert len(log) == 24
    assert log[-1].loss < 0.5
    assert log[-1].accuracy == 1
    with torch.no_grad():
        _, margins = c_dpo_step(model, collator([example(i) for i in range(90, 98)]), SMALL)
    assert (margins > 0).all()


def test_small_forwards_add_up_to_an_update(processor, image, pair, llava):
    examples = [(image(i), pair(y_win="A bone." if i else "The dog.")) for i in range(4)]
    logs = []
    for micro in (1, 4):
        model = add_lora(copy.deepcopy(llava), SMALL)
        torch.manual_seed(0)
        for n, p in model.named_parameters():
            if "lora_A" in n:
                torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(len(n)))
        logs.append(
            train_c_dpo(
                model,
                ContextPreferenceCollator(processor),
                examples,
                dataclasses.replace(SMALL, micro_batch_size=micro),
            )
        )
    assert logs[0][0].gradient == pytest.approx(logs[1][0].gradient, rel=1e-3)
    with pytest.raises(ValueError, match="0 pairs"):
        train_c_dpo(model, ContextPreferenceCollator(processor), [], SMALL)


def test_rate():
    from eff_adapters.sentinel.train import rate_at

    rates = [rate_at(i, 100, 0.03) for i in range(100)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates[-1] < 0.001
    assert rate_at(0, 1, 0.03) == 1


def test_sampling(llava, processor, image):
    sampler = SentenceSampler(llava, processor, max_new_tokens=12)
    state = torch.get_rng_state()
    found = sampler(image(), "there?", "A dog is near.", n=4, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(found) == 4
    assert found == sampler(image(), "there?", "A dog is near.", n=4, seed=5)
    assert found != sampler(image(), "there?", "A dog is near.", n=4, seed=6)
    assert any(s.text for s in found)


def test_where_a_sampled_sentence_ends(llava, processor, image, monkeypatch):
    tokenizer = processor.tokenizer

    def say(text):
        ids = tokenizer(text, add_special_tokens=False).input_ids

        def generate(input_ids, stopping_criteria, **kwargs):
            for token in ids:
                input_ids = torch.cat([input_ids, torch.tensor([[token]])], 1)
                if bool(stopping_criteria(input_ids, None)[0]):
                    break
            return input_ids

        monkeypatch.setattr(llava, "generate", generate)
        return SentenceSampler(llava, processor)(image(), "there?", "", n=1, seed=0)[0]

    assert say("A dog . The cat .") == ("A dog .", False)
    assert say("A dog . </s>") == ("A dog .", True)
    assert say("A dog </s>") == ("A dog", True)
    assert say("</s>") == ("", True)
    assert say("A dog .") == ("A dog .", False)  # cut by the limit of tokens


def test_loss_of_trl(processor, tmp_path):
    """One batch of text by TRL's trainer and by ours: context in the prompt, sentence as completion."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
    config = LlamaConfig(vocab_size=len(processor.tokenizer), **shape, **special)
    policy, reference = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    rows = [("A dog is near .", "The dog has a bone .", "A cat ."), ("The tree .", "A chair .", "The man is there .")]
    data = datasets.Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), beta=0.1, use_cpu=True, report_to="none", per_device_train_batch_size=2, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        policy, reference, args=arguments, train_dataset=data, processing_class=processor.tokenizer
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    with torch.no_grad():
        theirs = trainer.compute_loss(policy.eval(), dict(batch))
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        ours = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        found = c_dpo_loss(*pair_logps(policy, ours), *pair_logps(reference, ours), beta=0.1).loss
    assert float(found) != pytest.approx(0.6931, abs=1e-2)
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=1e-6)
